"""Counts the jobs that can be on time on servers that may preempt at any instant, or bounds them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.sim.bound.work import Jobs, Whole

# Up to this many pairs of (job, interval) the program's relaxation is solved in seconds.
MAX_PAIRS = 120_000
# Counts are whole. A count this little short of the next one is the solver's rounding.
TOLERANCE = 1e-4


def most_on_time(jobs: Jobs, servers: int, time_limit_s: float) -> tuple[int, int, str]:
    """Returns (most that can be on time, number found to be on time, method).

    Both numbers are of the relaxation; they are equal when it was solved.
    """
    if not len(jobs):
        return 0, 0, "in order"
    agreeable = bool((np.diff(jobs.deadline_s) >= 0).all())
    most = in_order(jobs, servers) if agreeable else len(jobs)
    if agreeable and servers == 1:
        return most, most, "in order"
    bound, found = by_intervals(jobs, servers, time_limit_s)
    if agreeable and most < bound:
        return most, min(found, most), "in order, pooled"
    return bound, found, "mip"


def in_order(jobs: Jobs, servers: int = 1) -> int:
    """Returns the most jobs on time when deadlines are in the order of releases; O(n^2).

    Those that are served are then served in that order. So all that matters of the first jobs is
    how early k of them can be done: the classic recursion of 1 | agreeable | sum U_j. Servers are
    pooled into one that is as many times as fast, which is exact for one server and optimistic for
    more.
    """
    done_s = np.full(len(jobs) + 1, np.inf)
    done_s[0] = -np.inf
    for release_s, deadline_s, work_s in zip(
        jobs.release_s, jobs.deadline_s, jobs.work_s / servers, strict=True
    ):
        end_s = np.maximum(done_s[:-1], release_s) + work_s
        end_s[end_s > deadline_s] = np.inf
        done_s[1:] = np.minimum(done_s[1:], end_s)
    return int(np.flatnonzero(done_s < np.inf).max())


def by_intervals(jobs: Jobs, servers: int, time_limit_s: float) -> tuple[int, int]:
    """Returns (upper bound, found) by the mixed integer program

        max sum x_j,  sum_k y_jk >= work_j x_j,  y_jk <= len_k x_j,  sum_j y_jk <= servers len_k

    with x_j in {0, 1} and y_jk the work on job j in interval k of its window. Intervals lie between
    one release or deadline and the next. With preemption, the order inside an interval never
    matters (McNaughton's wrap-around rule). Where there would be too many pairs (j, k), windows are
    widened to a grid. That lets more jobs be on time, never fewer; nothing then counts as found.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    edges, first, last, widened = _intervals(jobs)
    length, n = np.diff(edges), len(jobs)
    span = last - first
    job = np.repeat(np.arange(n), span)
    pairs = len(job)
    interval = np.arange(pairs) - np.repeat(np.cumsum(span) - span, span) + first[job]
    y, x = n + np.arange(pairs), np.arange(n)
    cap = np.minimum(length[interval], jobs.work_s[job])

    def matrix(rows: int, *entries: tuple[NDArray[Any], Whole, Whole]) -> csr_array:
        value, row, column = (np.concatenate(part) for part in zip(*entries, strict=True))
        return csr_array((value, (row, column)), shape=(rows, n + pairs))

    one = np.ones(pairs)
    limits = [
        LinearConstraint(matrix(len(length), (one, interval, y)), -np.inf, servers * length),
        LinearConstraint(matrix(n, (one, job, y), (-jobs.work_s, x, x)), 0, np.inf),
    ]
    if servers > 1:
        # With one server the capacity says so already for whole x.
        each = np.arange(pairs)
        limits.append(
            LinearConstraint(matrix(pairs, (one, each, y), (-cap, each, job)), -np.inf, 0)
        )
    result = milp(
        np.concatenate([-np.ones(n), np.zeros(pairs)]),
        integrality=np.concatenate([np.ones(n), np.zeros(pairs)]),
        bounds=Bounds(0, np.concatenate([np.ones(n), cap])),
        constraints=limits,
        options={"time_limit": time_limit_s},
    )
    dual = result.mip_dual_bound
    bound = n
    if dual is not None and math.isfinite(dual):
        bound = min(n, math.floor(-dual + TOLERANCE))
    found = 0 if widened or result.x is None else round(-result.fun)
    return bound, min(found, bound)


def _intervals(
    jobs: Jobs,
) -> tuple[NDArray[np.float64], Whole, Whole, bool]:
    """Returns the intervals' edges, each job's first and past-the-last one, and whether widened."""
    release, deadline, grid_s = jobs.release_s, jobs.deadline_s, 0.0
    while True:
        edges = np.unique(np.concatenate([release, deadline]))
        first, last = np.searchsorted(edges, release), np.searchsorted(edges, deadline)
        if (last - first).sum() <= MAX_PAIRS:
            return edges, first, last, grid_s > 0
        grid_s = 2 * grid_s or float((deadline - jobs.release_s).min()) / 256
        release = np.floor(jobs.release_s / grid_s) * grid_s
        deadline = np.ceil(jobs.deadline_s / grid_s) * grid_s
