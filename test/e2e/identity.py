"""What tests of identity share: a workload, random legal decisions on a real pair, what is promised.

The decisions are random but legal (``--kairos-chaos-seed``): parking, pausing, order, admission. The
pair is real: SGLang's scheduler processes, KV over Mooncake, float32, greedy.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pd_client import (
    Counters,
    Enough,
    Job,
    PdClient,
    doomed_jobs,
    long_tail_jobs,
    once,
    trouble_in,
)

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS

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
