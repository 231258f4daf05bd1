"""Ways to hand KV over, on every SGLang that has them: random decisions change no token.

Each cell is a pair of stock servers and one with random legal decisions, with the same flags.
``make test-transfers`` runs all of it (half an hour; KAIROS_TEST_VERSIONS="0.5.19 …" fewer versions)
and installs NIXL in a folder of its own; of the newest version, `test_flags` draws cells by date.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from identity import check_same, run_pair, spec_of
from pd_client import Counters, doomed_jobs, long_tail_jobs, stock_outputs

from helpers.trees import NEWEST, TESTED_VERSIONS, sglang_folder
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.other_sglang import first_on_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

JOBS = long_tail_jobs(60, seed=5)
DOOMED = doomed_jobs(6, 6, seed=8, span_s=3.0)


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to hand over: its flags, the first SGLang with it, what the logs say when it is in use."""

    flags: str
    since: str
    says: str
    needs: str = ""
    pauses: bool = True


OPTIONS = {
    "mooncake_tcp": Option(
        "--disaggregation-transfer-backend mooncake_tcp",
        "0.5.16",
        "disaggregation transfer backend 'mooncake_tcp' -> mooncake",
    ),
    "nixl": Option(
        "--disaggregation-transfer-backend nixl", "0.5.16", "initialized with backend: UCX", "nixl"
    ),
    "checksum": Option(
        "--disaggregation-enable-kv-checksum", "0.5.21", "'disaggregation_enable_kv_checksum': True"
    ),
    "prefill_complete": Option(
        "--disaggregation-decode-allocation-policy prefill_complete",
        "0.5.22",
        "'disaggregation_decode_allocation_policy': 'prefill_complete'",
        pauses=False,  # every prefill may be queued again by upstream, which looks for it in the slot
    ),
}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


CELLS = [
    (version, name)
    for version in TESTED_VERSIONS
    for name, option in OPTIONS.items()
    if numbers(version) >= numbers(option.since)
]


@pytest.fixture(scope="module", params=TESTED_VERSIONS)
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[str, Zygote, dict[str, str]]]:
    """A version, what forks its servers, and the environment that finds it."""
    version = request.param
    env = first_on_path(sglang_folder(version)) if version != NEWEST else {}
    strict = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
    with Zygote(env={**env, **strict}) as started:
        yield version, started, env


@pytest.mark.parametrize("name", OPTIONS)
def test_random_decisions_change_no_token_however_kv_is_handed_over(
    servers: tuple[str, Zygote, dict[str, str]], name: str, tiny_model: str, out_dir: Path
) -> None:
    version, zygote, env = servers
    option = OPTIONS[name]
    if (version, name) not in CELLS:
        pytest.skip(f"SGLang {version} has no {option.flags}")
    if option.needs and importlib.util.find_spec(option.needs) is None:
        pytest.skip(f"{option.needs} is not installed: make test-transfers does it")
    args, logs = shlex.split(option.flags), out_dir / "transfers" / f"{name}-{version}"

    def enough(prefill: Counters, decode: Counters) -> bool:
        return decode["parked"] >= 20 and (prefill["pauses"] >= 3 or not option.pauses)

    stock = stock_outputs(spec_of(zygote, tiny_model, logs / "stock", args, env=env), JOBS)
    run = run_pair(
        zygote,
        tiny_model,
        logs,
        kairos={"chaos_seed": 3},
        jobs=[*JOBS, *DOOMED],
        args=args,
        env=env,
        enough=enough,
    )
    check_same(run, stock)
    counters = Counter(run.prefill["counters"]), Counter(run.decode["counters"])
    assert enough(*counters), counters
    assert not [key for each in counters for key in each if key.endswith("_errors")], counters
    said = [path.read_text(errors="replace") for path in sorted(logs.glob("*.log"))]
    assert len(said) == 2 and all(option.says in log for log in said)


@pytest.mark.parametrize("share", [0.3])
def test_a_checksum_that_does_not_match_ends_its_own_request_only(
    share: float, tiny_model: str, out_dir: Path
) -> None:
    """SGLang makes up mismatches; whoever is not hit has every token of stock SGLang's."""
    logs, flag = out_dir / "transfers" / "mismatch", "--disaggregation-enable-kv-checksum"
    env = {"SGLANG_TEST_DISAGG_KV_CHECKSUM_MISMATCH_PROB": str(share)}
    with Zygote() as zygote:
        stock = stock_outputs(spec_of(zygote, tiny_model, logs / "stock"), JOBS)
        run = run_pair(
            zygote,
            tiny_model,
            logs,
            kairos={"chaos_seed": 4},
            jobs=JOBS,
            args=[flag],
            env=env,
        )
    (answers,) = run.rounds
    hit = [index for index, answer in enumerate(answers) if "KV checksum mismatch" in str(answer)]
    assert len(JOBS) * share / 3 < len(hit) < len(JOBS) * share * 3
    kept = [index for index in range(len(JOBS)) if index not in hit]
    check_same(
        dataclasses.replace(run, rounds=[[answers[index] for index in kept]]),
        [stock[index] for index in kept],
    )
