"""Which prefill goes next: as many first tokens on time as possible, nobody waiting for ever.

Times are seconds, deadlines relative to now (negative = passed), all arrays 1-D of one length n.

On-time set (Moore 1968, the Moore-Hodgson algorithm): walk the jobs by deadline, add up their work,
and whenever the sum passes a deadline drop the longest job so far. No other set of jobs has more
members on time. With weights the job with the least weight per second goes first: a heuristic, the
weighted problem is NP-hard (Karp 1972); equal weights give Moore-Hodgson exactly.

Order: starving requests by deadline, then the on-time set by deadline (EDF: feasible if anything
is; a burst's equal deadlines shortest first, or each step would begin one more and finish none),
then the late ones shortest first (SPT: least mean delay). Ties fall to the lower index. What of that
order runs in one step: `prefill_step`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = Sequence[float] | NDArray[np.float64]
Mask = Sequence[bool] | NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class UrgencyOrder:
    """`order`: all indices, most urgent first. `on_time`: how many meet their deadline in it."""

    order: list[int]
    on_time: int


def moore_hodgson(
    work_s: Floats, deadline_s: Floats, weight: Floats | None = None
) -> NDArray[np.bool_]:
    """Mask of the jobs that end on time when run in deadline order and all others dropped."""
    work, deadline = np.asarray(work_s, float), np.asarray(deadline_s, float)
    on_time = work <= deadline  # a job that cannot make it alone must not push others out
    jobs = np.flatnonzero(on_time)
    jobs = jobs[np.argsort(deadline[jobs], kind="stable")]
    end, due = np.cumsum(work[jobs]), deadline[jobs]
    overflow = np.flatnonzero(end > due)
    if overflow.size == 0:
        return on_time
    key = -work if weight is None else np.asarray(weight, float) / np.maximum(work, 1e-12)
    # Ranks stand for (key, later deadline first): a heap of ints is several times faster.
    by_rank = np.lexsort((-np.arange(jobs.size), key[jobs]))
    rank = np.empty_like(by_rank)
    rank[by_rank] = np.arange(jobs.size)
    ranks, work_of = rank.tolist(), work[jobs[by_rank]].tolist()
    first = int(overflow[0])
    heap = ranks[:first]
    heapq.heapify(heap)
    push, push_pop = heapq.heappush, heapq.heappushpop  # a look-up each in a loop of thousands
    dropped: list[int] = []
    total = float(end[first - 1]) if first else 0.0
    steps = zip(ranks[first:], work[jobs[first:]].tolist(), due[first:].tolist(), strict=True)
    for place, seconds, latest in steps:
        total += seconds
        if total <= latest:
            push(heap, place)
            continue
        worst = push_pop(heap, place)
        total -= work_of[worst]
        dropped.append(worst)
        while total > latest and heap:
            worst = heapq.heappop(heap)
            total -= work_of[worst]
            dropped.append(worst)
    on_time[jobs[by_rank[dropped]]] = False
    return on_time


def urgency_order(
    work_s: Floats,
    deadline_s: Floats,
    weight: Floats | None = None,
    starving: Mask | None = None,
) -> UrgencyOrder:
    """All indices in the order to run them; see the module's text for the rule."""
    work, deadline = np.asarray(work_s, float), np.asarray(deadline_s, float)
    first = np.zeros(len(work), bool) if starving is None else np.asarray(starving, bool)
    head = np.flatnonzero(first)
    head = head[np.argsort(deadline[head], kind="stable")]
    end = np.cumsum(work[head])
    rest = np.flatnonzero(~first)
    ahead = float(end[-1]) if head.size else 0.0
    weights = None if weight is None else np.asarray(weight, float)[rest]
    keeps = moore_hodgson(work[rest], deadline[rest] - ahead, weights)
    good, late = rest[keeps], rest[~keeps]
    good = good[np.lexsort((work[good], deadline[good]))]
    late = late[np.lexsort((deadline[late], work[late]))]
    met = int(np.count_nonzero(end <= deadline[head])) + good.size
    return UrgencyOrder([*head.tolist(), *good.tolist(), *late.tolist()], met)


class LateShare:
    """Token bucket of the starvation bound: starving requests get at most `share` of all tokens.

    Over any run, spent <= share * earned + the largest single spend. Savings stop at
    `burst_tokens`, so a quiet hour does not buy a starving burst.
    """

    def __init__(self, share: float, burst_tokens: float = 8192.0) -> None:
        self._share, self._burst, self._balance = share, burst_tokens, 0.0

    def earn(self, tokens: float) -> None:
        """`tokens` prefill tokens were executed, whoever's."""
        self._balance = min(self._burst, self._balance + self._share * tokens)

    def may_spend(self) -> bool:
        """Whether a starving request may go first now."""
        return self._share > 0.0 and self._balance >= 0.0

    def spend(self, tokens: float) -> None:
        """`tokens` were executed for a request that went first because it was starving."""
        self._balance -= tokens
