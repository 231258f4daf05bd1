"""What is sent to real servers: warm-up, the measuring of prefill capacity, and the trace."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmark.harness import servers
from benchmark.harness.loads import PacedTrace
from benchmark.harness.servers import Say
from sglang_kairos.cluster.run import Cluster, ClusterError
from sglang_kairos.loads.replay import Result, failures, make_jobs, replay, run
from sglang_kairos.loads.traces import Request

REHEARSED = 80
RELAXED_MS = 1e5
WARM_SIZES = (32, 100, 300, 600, 1200, 2500, 600, 100)


def send(
    cluster: Cluster,
    rows: Sequence[Request],
    ttft_ms: Any = RELAXED_MS,
    tpot_ms: Any = RELAXED_MS,
    *,
    seed: int,
    url: str = "",
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Sends rows at their times and waits for the last answer. `options` are those of `replay`."""
    jobs = make_jobs(rows, ttft_ms, tpot_ms, seed=seed, extra=extra)
    return run(replay(url or cluster.url, jobs, check=cluster.check, **options))


def warm_up(cluster: Cluster) -> None:
    """Sends the same few requests for every policy, then empties the caches."""
    send(cluster, [Request(0.0, size, 8) for size in WARM_SIZES], seed=-1, concurrency=2)
    servers.forget(cluster)


def measure_prefill(
    cluster: Cluster, rows: Sequence[Request], utilisation: float, say: Say
) -> np.ndarray:
    """Returns prefill seconds of each request while the cluster also decodes, shape (len(rows),).

    Single prompts of four lengths give time over length. A rehearsal then shows by how much steps
    take longer when everything else runs as well. Its requests are spread evenly over the trace's
    lengths, at about the load to come. Raises ClusterError.
    """
    sizes = [128, 512, 2048, max(4096, max(row.input_tokens for row in rows))]
    alone = send(cluster, [Request(0.0, size, 1) for size in sizes], seed=-2, concurrency=1)
    if any(not outcome.ok for outcome in alone.outcomes):
        raise ClusterError(f"measuring failed: {failures(alone.outcomes)[0]}")
    times = [outcome.ttft_ms / 1e3 for outcome in alone.outcomes]
    shown = (f"{size} tokens {t * 1e3:.0f} ms" for size, t in zip(sizes, times, strict=True))
    say(f"prefill of one prompt: {', '.join(shown)}")

    def alone_s(some: Sequence[Request]) -> np.ndarray:
        # Straight lines between logarithms: power laws, as steep as the machine's attention.
        lengths = np.log([row.input_tokens for row in some])
        return np.exp(np.interp(lengths, np.log(sizes), np.log(times)))

    ordered = sorted(rows, key=lambda row: row.input_tokens)
    count = min(REHEARSED, len(rows))
    sample = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    random.Random(0).shuffle(sample)
    gap_s = float(alone_s(sample).sum()) / count / utilisation
    sample = [replace(row, arrival_s=at * gap_s) for at, row in enumerate(sample)]
    before = servers.prefill_busy_s(cluster)
    send(cluster, sample, seed=-3)
    factor = (servers.prefill_busy_s(cluster) - before) / float(alone_s(sample).sum())
    if math.isnan(factor):
        raise ClusterError("this SGLang does not count its prefill time: state a --rate")
    say(f"rehearsed {count} requests: × {factor:.2f}")
    servers.forget(cluster)
    return alone_s(rows) * factor


def drive(cluster: Cluster, plan: PacedTrace, say: Say) -> tuple[Result, float]:
    """Sends the trace, telling how far it is. Returns the result and the prefill seconds it took."""
    ticks = itertools.count(1)

    def progress(sent: int, done: int, total: int) -> None:
        if next(ticks) % 10 == 0:
            say(f"sent {sent}/{total}, answered {done}")

    before = servers.prefill_busy_s(cluster)
    targets = plan.ttft_ms, plan.tpot_ms
    options: dict[str, Any] = {"timeout_s": servers.TIMEOUT_S, "progress": progress}
    result = send(cluster, plan.rows, *targets, seed=plan.seed, **options)
    if result.lag_ms > 100:
        say(f"note: the driver was up to {result.lag_ms:.0f} ms late in sending")
    tell_failures(result, say)
    return result, servers.prefill_busy_s(cluster) - before


def tell_failures(result: Result, say: Say) -> None:
    """Prints each kind of failure."""
    for line in failures(result.outcomes):
        say(f"failed: {line[:200]}")


def summary(result: Result) -> str:
    """Returns one run in a line."""
    metrics = result.metrics
    return (
        f"done in {result.duration_s:.0f} s: TTFT met {100 * metrics.ttft_attainment:.1f} %, "
        f"TPOT met {100 * metrics.tpot_attainment:.1f} %, both {100 * metrics.e2e_attainment:.1f} %"
    )
