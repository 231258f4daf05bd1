"""Orders prefills so that most first tokens are on time, and nobody waits for ever.

Why choose it: first come, first served makes a whole queue late behind one long prompt. By deadline
alone (EDF), an overloaded server is late with everybody. This drops the few jobs that cost most.

Formula. Arrays have shape (n,). Times are seconds, deadlines relative to now (negative: passed).
1. On-time set by the Moore-Hodgson algorithm: walk the jobs by deadline and add up their work.
   Whenever the sum passes a deadline, drop the longest job so far. No other set of jobs has more
   members on time (Moore 1968).
   With weights, drop the job with the least weight per second. That is a heuristic: the weighted
   problem is NP-hard (Karp 1972). Equal weights give Moore-Hodgson exactly.
2. Order: starving requests by deadline, then the on-time set by deadline, then the late ones.
   By deadline the set is feasible if any order is (EDF). Equal deadlines of a burst go shortest
   first; otherwise each step would begin one more prefill and finish none.
   Late jobs go shortest first: least mean delay (SPT). Ties fall to the lower index.

`prefill_step` says how much of that order runs in one step.

Trade-offs and starvation. Under overload long prompts are dropped first, and new short ones keep
passing them. `LateShare` bounds that: a request that waited too long goes first, as long as such
requests take at most a fixed share of the tokens.
Source: Moore, Management Science 15 (1968); Karp, "Reducibility among combinatorial problems"
(1972).
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
    """`order`: all indices, most urgent first. `on_time`: how many of them meet their deadline in it."""

    order: list[int]
    on_time: int


def moore_hodgson(
    work_s: Floats, deadline_s: Floats, weight: Floats | None = None
) -> NDArray[np.bool_]:
    """Returns the mask (n,) of jobs that end on time when run by deadline with all others dropped.

    `work_s`, `deadline_s` (n,): seconds. `weight` (n,): relative importance; None: all are equal.
    """
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
    """Returns all indices in the order to run them; the module's text has the rule.

    `work_s`, `deadline_s` (n,): seconds. `weight` (n,): None: all equal. `starving`: mask (n,).
    """
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
    """Returns `moore_hodgson` of jobs sorted by deadline; and if it drops any, all indices by work."""
    on_time = work <= due  # a job that cannot make it alone must not push others out
    ends = np.cumsum(np.where(on_time, work, 0.0))
    spare = np.where(on_time, due - ends, np.inf)
    # A drop makes all jobs behind it earlier. So the next late one has less to spare than all before
    # it, and only these need a look.
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
    """Token bucket of the starvation bound: starving requests get at most `share` of all prefill tokens.

    Over any run, spent <= share * earned + the largest single spend. Savings stop at
    `burst_tokens`, so that a quiet hour does not pay for a burst of starving requests.
    """

    def __init__(self, share: float, burst_tokens: float = 8192.0) -> None:
        self._share, self._burst, self._balance = share, burst_tokens, 0.0

    def ran(self, tokens: float, of_starving: float) -> None:
        """Notes that `tokens` were computed, `of_starving` of them for one that went first for that."""
        self.earn(tokens)
        if of_starving:
            self.spend(of_starving)

    def earn(self, tokens: float) -> None:
        """Notes that `tokens` prefill tokens were computed, for any request."""
        self._balance = min(self._burst, self._balance + self._share * tokens)

    def may_spend(self) -> bool:
        """Returns whether a starving request may go first now."""
        return self._share > 0.0 and self._balance >= 0.0

    def spend(self, tokens: float) -> None:
        """Notes that `tokens` were computed for a request that went first because it was starving."""
        self._balance -= tokens
