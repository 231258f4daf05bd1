"""Whatever Kairos decides, every output token is stock SGLang's: the newest version, in every way.

What the runs share is in `identity`; other versions are in test_versions.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from identity import DOOMED, JOBS, check, check_same, much_happened, run_pair, spec_of
from pd_client import Counters, stock_outputs

from sglang_kairos.cpu.zygote import Zygote


@pytest.fixture(scope="module")
def stock(zygote: Zygote, tiny_model: str, out_dir: Path) -> list[tuple[int, Any]]:
    """The outputs of stock SGLang, Kairos off."""
    return stock_outputs(spec_of(zygote, tiny_model, out_dir / "stock"), JOBS)


@pytest.mark.one_of
@pytest.mark.parametrize(
    "args", [(), ("--disable-overlap-schedule",)], ids=["overlap", "no-overlap"]
)
def test_random_decisions_change_no_token(
    args: Sequence[str],
    zygote: Zygote,
    tiny_model: str,
    stock: list[tuple[int, Any]],
    out_dir: Path,
) -> None:
    run = run_pair(
        zygote,
        tiny_model,
        out_dir / f"chaos{''.join(args)}",
        kairos={"chaos_seed": 11},
        jobs=[*JOBS, *DOOMED],
        enough=much_happened,
        args=args,
    )
    check(run, stock, tree=False)


@pytest.fixture(scope="module")
def retracting() -> Iterator[Zygote]:
    """Servers that retract requests now and then, whether they must or not."""
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    with Zygote(env=env) as started:
        yield started


def test_random_decisions_change_no_token_under_forced_retraction(
    retracting: Zygote, tiny_model: str, stock: list[tuple[int, Any]], out_dir: Path
) -> None:
    run = run_pair(
        retracting,
        tiny_model,
        out_dir / "chaos-retract",
        kairos={"chaos_seed": 12},
        jobs=[*JOBS, *DOOMED],
        enough=much_happened,
    )
    check(run, stock, tree=False)
    logs = (out_dir / "chaos-retract").glob("*")
    assert any("Testing retraction" in path.read_text(errors="replace") for path in logs)


def test_the_policies_change_no_token_under_pressure_and_forced_retraction(
    retracting: Zygote, tiny_model: str, stock: list[tuple[int, Any]], out_dir: Path
) -> None:
    def enough(prefill: Counters, decode: Counters) -> bool:
        parked = decode["subset_steps"] >= 50 and decode["parked"] >= 100
        return parked and decode["retractions"] >= 1

    # Targets that cannot be met by all, and no breaker: whatever the machine, there is much to decide.
    run = run_pair(
        retracting,
        tiny_model,
        out_dir / "policies",
        kairos={"ttft_ms": 500.0, "max_step_error": 100.0},
        jobs=[*JOBS, *DOOMED],
        contested=True,
        enough=enough,
    )
    check_same(run, stock)
    prefill, decode = run.prefill["counters"], run.decode["counters"]
    assert enough(Counter(prefill), Counter(decode)), (prefill, decode)
    assert not any(name.endswith("_errors") for name in (*prefill, *decode)), (prefill, decode)


@pytest.mark.one_of("long and unlikely to break alone")
def test_a_patched_tree_behaves_as_the_plugin(
    patched_tree: Path, tiny_model: str, stock: list[tuple[int, Any]], out_dir: Path
) -> None:
    path = os.pathsep.join(filter(None, [str(patched_tree), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    with Zygote(env=env) as zygote:
        run = run_pair(
            zygote,
            tiny_model,
            out_dir / "chaos-patched",
            kairos={"chaos_seed": 13},
            jobs=[*JOBS, *DOOMED],
            enough=much_happened,
        )
    check(run, stock, tree=True)
