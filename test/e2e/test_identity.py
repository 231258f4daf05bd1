"""Whatever Kairos decides, every output token is stock SGLang's.

The decisions are random but legal (``--kairos-chaos-seed``): parking, pausing, order, admission. The
pair is real: SGLang's scheduler processes, KV over Mooncake, float32, greedy.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pd_client import (
    Counters,
    Enough,
    Job,
    PdClient,
    doomed_jobs,
    long_tail_jobs,
    once,
    stock_outputs,
    trouble_in,
)

from helpers.trees import sglang_folder
from sglang_kairos.cluster import Cluster
from sglang_kairos.cluster_layout import ClusterSpec
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.engine.seams import SEAMS, SUPPORTED_VERSIONS
from sglang_kairos.other_sglang import first_on_path

JOBS = long_tail_jobs(200, seed=7)
DOOMED = doomed_jobs(24, 40, seed=8, span_s=9.0)
SERVER_ARGS = ("--chunked-prefill-size", "512", "--max-total-tokens", "49152")


@dataclasses.dataclass
class Run:
    """What one run of the workload left behind."""

    rounds: list[list[tuple[int, Any]]]
    prefill: dict[str, Any]
    decode: dict[str, Any]
    settled: bool
    trouble: list[str]


def spec_of(
    zygote: Zygote, model: str, log_dir: Path, args: Sequence[str] = (), **more: Any
) -> ClusterSpec:
    return ClusterSpec(
        model_path=model,
        router="none",
        server_args=(*SERVER_ARGS, *args),
        zygote=zygote,
        log_dir=log_dir,
        **more,
    )


def run_pair(
    zygote: Zygote,
    model: str,
    log_dir: Path,
    *,
    kairos: dict[str, Any],
    jobs: Sequence[Job],
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    contested: bool = False,
    enough: Enough = once,
) -> Run:
    """Start a pair, run `jobs` until it is `enough`, stop it.

    `contested`: with a TPOT target that not all can meet.
    """
    spec = spec_of(zygote, model, log_dir, args, kairos=kairos, env=env or {})
    with Cluster(spec) as cluster:
        client = PdClient(cluster)
        if contested:
            tpot_ms = client.contested_tpot_ms()
            jobs = [dataclasses.replace(job, tpot_ms=tpot_ms) for job in jobs]
        rounds = client.run_until(list(jobs), enough)
        settled = client.settles()
        prefill, decode = client.kairos()
        return Run(rounds, prefill, decode, settled, trouble_in(cluster.logs))


@pytest.fixture(scope="module")
def stock(zygote: Zygote, tiny_model: str, out_dir: Path) -> list[tuple[int, Any]]:
    """The outputs of stock SGLang, Kairos off."""
    return stock_outputs(spec_of(zygote, tiny_model, out_dir / "stock"), JOBS)


def check_same(run: Run, stock: list[tuple[int, Any]]) -> None:
    """Every token as stock SGLang's, and nothing left behind."""
    for outputs in run.rounds:
        different = [i for i, want in enumerate(stock) if outputs[i] != want]
        assert not different, f"{len(different)} of {len(stock)} differ, first {different[:5]}"
    distinct = {token for _, tokens in stock for token in tokens}
    assert len(distinct) > 100, "outputs must vary, or identity proves little"
    assert run.settled, "a server did not become idle after the last request"
    assert run.prefill["paused"] == 0
    assert not run.trouble, "\n".join(run.trouble)


def much_happened(prefill: Counters, decode: Counters) -> bool:
    """Whether so much was paused, parked and aborted that unchanged tokens prove something."""
    # Which of the two depends on whether prefill hears first from the client or from decode.
    aborted = prefill["paused_aborts"] + prefill["paused_failures"] >= 1
    paused = prefill["pauses"] >= 20 and prefill["resumes"] >= 10
    parked = decode["subset_steps"] >= 100 and decode["parked"] >= 200
    return aborted and paused and parked and decode["parked_aborts"] >= 1


def check(
    run: Run, stock: list[tuple[int, Any]], *, tree: bool, version: str = SUPPORTED_VERSIONS[0]
) -> None:
    """Everything the identity test promises of random decisions."""
    check_same(run, stock)
    seen = Counter(run.prefill["counters"]), Counter(run.decode["counters"])
    assert much_happened(*seen), seen
    where = "tree" if tree else "hooks"
    for report in (run.prefill, run.decode):
        assert report["seams"]["hooks" if tree else "tree"] == 0
        # All of them, the HTTP server's too: these schedulers are forked from it.
        assert report["seams"][where] == sum(version in seam.fingerprints for seam in SEAMS)


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


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS[1:])
def test_random_decisions_change_no_token_of_an_older_sglang(
    version: str, tiny_model: str, out_dir: Path
) -> None:
    jobs, doomed = JOBS[:120], doomed_jobs(16, 20, seed=8, span_s=5.0)
    env = first_on_path(sglang_folder(version))
    logs = out_dir / f"chaos-{version}"
    with Zygote(env={**env, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}) as zygote:
        stock = stock_outputs(spec_of(zygote, tiny_model, logs / "stock", env=env), jobs)
        run = run_pair(
            zygote,
            tiny_model,
            logs,
            kairos={"chaos_seed": 11},
            jobs=[*jobs, *doomed],
            enough=much_happened,
            env=env,
        )
    check(run, stock, tree=False, version=version)


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
