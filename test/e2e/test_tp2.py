"""Two tensor-parallel ranks whose clocks disagree decide alike: stock's outputs, and no hang.

Every rank schedules for itself. The ranks' clocks are made to differ by far more than any deadline
here and their measured step times by half (`KAIROS_CHAOS_CLOCK_MS`), so that each rank on its own
would order, pause and park differently; the counters show that they would have.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pd_client import Counters, doomed_jobs, long_tail_jobs, rounds_of, stock_outputs

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cpu.zygote import Zygote

# An all-reduce between two processes on shared cores costs more than this model's arithmetic.
JOBS = [dataclasses.replace(job, tokens=min(job.tokens, 32)) for job in long_tail_jobs(60, seed=9)]
DOOMED = doomed_jobs(6, 6, seed=10, span_s=6.0)
SIZES = ("--chunked-prefill-size", "256", "--max-total-tokens", "49152")


def spec_of(zygote: Zygote, model: str, log_dir: Path, *args: str, **more: Any) -> ClusterSpec:
    return ClusterSpec(
        model_path=model,
        router="none",
        zygote=zygote,
        log_dir=log_dir,
        server_args=(*args, *SIZES),
        **more,
    )


@pytest.fixture(scope="module")
def stock(zygote: Zygote, tiny_model: str, out_dir: Path) -> list[tuple[int, Any]]:
    """The outputs of a stock pair with one rank each."""
    return stock_outputs(spec_of(zygote, tiny_model, out_dir / "tp1-stock"), JOBS)


@pytest.mark.one_of
@pytest.mark.parametrize("chaos_seed", [-1, 21], ids=["policies", "random-decisions"])
def test_two_ranks_with_different_clocks_decide_alike(
    zygote: Zygote,
    tiny_model: str,
    out_dir: Path,
    stock: list[tuple[int, Any]],
    chaos_seed: int,
) -> None:
    def enough(prefill: Counters, decode: Counters) -> bool:
        least = min(prefill["decisions"], decode["decisions"]) >= 50 and prefill["pauses"] >= 5
        if chaos_seed >= 0:
            return least and decode["subset_steps"] >= 50
        # Otherwise the clocks did not matter, and nothing is proven.
        return least and min(prefill["disagreements"], decode["disagreements"]) >= 3

    spec = spec_of(
        zygote,
        tiny_model,
        out_dir / f"tp2-chaos{chaos_seed}",
        *("--tp", "2"),
        kairos={"chaos_seed": chaos_seed, "ttft_ms": 2000.0, "tpot_ms": 5.0},
        env={"KAIROS_CHAOS_CLOCK_MS": "1500", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    )
    rounds, prefill, decode = rounds_of(spec, [*JOBS, *DOOMED], enough)
    for outputs in rounds:
        different = [i for i, want in enumerate(stock) if outputs[i] != want]
        assert not different, f"{len(different)} of {len(stock)} differ, first {different[:5]}"
    seen = Counter(prefill["counters"]), Counter(decode["counters"])
    assert enough(*seen), seen
    assert prefill["paused"] == 0
