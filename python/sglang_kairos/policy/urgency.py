"""Chooses which prefill goes next: as many first tokens on time as possible, nobody waits for ever.

Times are in seconds; deadlines are relative to now, negative if passed. Arrays have shape (n,).

On-time set (Moore 1968, the Moore-Hodgson algorithm): walk the jobs by deadline and add up their
work. Whenever the sum passes a deadline, drop the longest job so far. No other set of jobs has more
members on time. With weights, the job with the least weight per second is dropped. That is a
heuristic, since the weighted problem is NP-hard (Karp 1972). Equal weights give Moore-Hodgson
exactly.

Order, ties to the lower index: 1. Starving requests, by deadline. `LateShare` bounds the tokens
that they may take. 2. The on-time set by deadline (EDF), which meets all deadlines if any order
does. Equal deadlines
   of a burst go shortest first, or each step would begin one more and finish none.
3. The late ones, shortest first (SPT), for the least mean delay.

Why choose it: first come, first served lets one long prompt make all behind it late. Shortest first
ignores who can still make it. Trade-off: a long prompt that is late waits behind others, until it
starves and the late share pays for it.

`prefill_step` says what of that order runs in one step.
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
    """Returns the mask (n,) of jobs on time when run by deadline with all others dropped."""
    work, deadline = np.asarray(work_s, float), np.asarray(deadline_s, float)
    order = np.argsort(deadline, kind="stable")
    weights = None if weight is None else np.asarray(weight, float)[order]
    on_time = np.empty(work.size, bool)
    on_time[order] = _on_time(work[order], deadline[order], weights)[0]
    return on_time


def urgency_order(
    work_s: Floats,
    deadline_s: Floats,
    weight: Floats | None = None,
    starving: Mask | None = None,
) -> UrgencyOrder:
    """Returns all indices in the order to run them; see the module's docstring for the rule."""
    work, deadline = np.asarray(work_s, float), np.asarray(deadline_s, float)
    order = np.argsort(deadline)  # not a stable sort, which takes twice as long
    due = deadline[order]
    if (due[1:] == due[:-1]).any():
        order = np.lexsort((work, deadline))
    head: list[int] = []
    ahead, met = 0.0, 0
    if starving is not None and np.any(starving):
        first = np.asarray(starving, bool)[order]
        ends = np.cumsum(work[order[first]])
        met = int(np.count_nonzero(ends <= deadline[order[first]]))
        head, ahead, order = order[first].tolist(), float(ends[-1]), order[~first]
    weights = None if weight is None else np.asarray(weight, float)
    if weights is not None:
        alike = weights.size == 0 or weights.min() == weights.max()
        weights = None if alike else weights[order]  # where all are alike, the exact algorithm
    on_time, by_work = _on_time(work[order], deadline[order] - ahead, weights)
    good, late = order[on_time], order[by_work[~on_time[by_work]]]
    return UrgencyOrder([*head, *good.tolist(), *late.tolist()], met + good.size)


def _on_time(
    work: NDArray[np.float64], due: NDArray[np.float64], weight: NDArray[np.float64] | None
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Returns `moore_hodgson` of jobs sorted by deadline; if it drops any, all indices by work."""
    on_time = work <= due  # a job that cannot make it alone must not push others out
    ends = np.cumsum(np.where(on_time, work, 0.0))
    spare = np.where(on_time, due - ends, np.inf)
    # What is dropped makes everybody behind earlier, so the next to be late has less to spare than
    # everybody before: only these are looked at.
    least = np.minimum.accumulate(spare)
    tight = np.flatnonzero((spare < 0.0) & np.append(True, spare[1:] < least[:-1]))
    if tight.size == 0 and on_time.all():
        return on_time, np.zeros(0, np.intp)
    by_work = np.argsort(work, kind="stable")
    if tight.size == 0:
        return on_time, by_work
    worth = (
        by_work if weight is None else np.argsort(-weight / np.maximum(work, 1e-12), kind="stable")
    )
    # Ranks stand for (longest or least worth, later deadline first): a heap of ints is faster.
    by_rank = worth[::-1]
    rank = np.empty_like(by_rank)
    rank[by_rank] = np.arange(by_rank.size)
    jobs = np.flatnonzero(on_time)
    ranks, seen = rank[jobs].tolist(), 0
    push, pop = heapq.heappush, heapq.heappop  # a look-up each in a loop of thousands
    heap: list[int] = []
    dropped: list[int] = []
    saved = 0.0
    upto = np.searchsorted(jobs, tight, side="right").tolist()
    ends_at, due_at = ends[tight].tolist(), due[tight].tolist()
    for end, latest, known in zip(ends_at, due_at, upto, strict=True):
        if end - saved <= latest:
            continue
        if heap:
            for job in ranks[seen:known]:
                push(heap, job)
        else:
            heap = ranks[seen:known]
            heapq.heapify(heap)
        seen = known
        while end - saved > latest and heap:
            worst = by_rank.item(pop(heap))
            saved += work.item(worst)
            dropped.append(worst)
    on_time[dropped] = False
    return on_time, by_work


class LateShare:
    """Token bucket of the starvation bound: starving requests get at most `share` of all tokens.

    Over any run, spent <= share * earned + the largest single spend. Savings stop at
    `burst_tokens`, so a quiet hour does not buy a starving burst.
    """

    def __init__(self, share: float, burst_tokens: float = 8192.0) -> None:
        self._share, self._burst, self._balance = share, burst_tokens, 0.0

    def ran(self, tokens: float, of_starving: float) -> None:
        """Records `tokens` executed, `of_starving` of them for a request that starved."""
        self.earn(tokens)
        if of_starving:
            self.spend(of_starving)

    def earn(self, tokens: float) -> None:
        """Records `tokens` prefill tokens executed for any request."""
        self._balance = min(self._burst, self._balance + self._share * tokens)

    def may_spend(self) -> bool:
        """Returns whether a starving request may go first now."""
        return self._share > 0.0 and self._balance >= 0.0

    def spend(self, tokens: float) -> None:
        """Records `tokens` executed for a request that went first because it was starving."""
        self._balance -= tokens
