"""Which prefill goes next: as many first tokens on time as possible, nobody waiting for ever.

Times are seconds, deadlines relative to now (negative = passed), all arrays 1-D of one length n.

On-time set (Moore 1968, the Moore-Hodgson algorithm): walk the jobs by deadline, add up their work,
and whenever the sum passes a deadline drop the longest job so far. No other set of jobs has more
members on time. With weights the job with the least weight per second goes first: a heuristic, the
weighted problem is NP-hard (Karp 1972); equal weights give Moore-Hodgson exactly.

Order: starving requests by deadline, then the on-time set by deadline (EDF: feasible if anything
is; a burst's equal deadlines shortest first, or each step would begin one more and finish none),
then the late ones shortest first (SPT: least mean delay). Ties fall to the lower index.

Size of a step: whoever is in it has its first token when the step ends, so a step is not filled
beyond the deadline of a member that would make it without the filling.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.reserve import Reserve

Floats = Sequence[float] | NDArray[np.float64]
Mask = Sequence[bool] | NDArray[np.bool_]

# Nobody knows how full the coming steps will be: the middle (docs/simulator.md has both ends).
SHARED = 0.5


@dataclass(frozen=True, slots=True)
class UrgencyOrder:
    """`order`: all indices, most urgent first. `on_time`: how many meet their deadline in it."""

    order: list[int]
    on_time: int


@dataclass(frozen=True, slots=True)
class PrefillQueue:
    """Everything with prefill work left, one entry per request in each array.

    `tokens` left to compute (prefix cache excluded), `work_s` the time predicted for them in steps
    of their own, of which `fixed_s` is what each step costs whatever is in it; `partial` marks
    half-done chunked prefills, `starving` those entitled to go first now; `cached` tokens of each
    prompt are in the prefix cache (None: none are; read for those that have not begun).
    """

    work_s: Floats
    deadline_s: Floats
    tokens: Sequence[int] | NDArray[np.int64]
    partial: Mask
    weight: Floats | None = None
    starving: Mask | None = None
    fixed_s: float = 0.0
    cached: Sequence[int] | NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One step. `order`: waiting indices to offer, those that run now first. `slot`: the partial in
    the chunk slot (-1: none runs), `chunk_limit`: tokens it may take (None: no cap). `on_time`: how
    many are predicted to meet their deadline. `hold`: waiting indices that must not be offered."""

    order: list[int]
    slot: int
    chunk_limit: int | None
    on_time: int
    hold: list[int]


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


def plan_prefill(
    queue: PrefillQueue,
    *,
    chunk_tokens: int,
    current: int,
    free_tokens: int,
    max_paused: int,
    page_size: int = 1,
    forced: int = -1,
    least_tokens: int = 0,
    evictable_tokens: int = 0,
) -> PrefillPlan:
    """What runs in the next step of at most `chunk_tokens` (>= `page_size`) tokens.

    The urgency order is walked with that budget. A waiting request that fits is admitted. One that
    does not fit starts as a new chunked prefill with what is left if the chunk slot is free and at
    most `max_paused` partials then sit paused; if it may not, the most urgent partial runs in its
    place, as only that unblocks it. Beside partials nobody is admitted who would leave them too
    little of `free_tokens` (`evictable_tokens` of them cached) for their rest (`policy.reserve`),
    nor anybody behind it. A partial gets all that is left or nothing: `least_tokens` (0: an eighth
    of the chunk) is the least worth rereading its prefix for. `current` (-1: none) cannot be paused
    when `max_paused` is 0. `forced` (-1: none) is a partial that runs now, uncapped. The step is
    full once what comes next would end it after a member's deadline.

    Work in the on-time set counts with half of what sharing steps can save (`_saved_s`), its
    deadlines half a step's fixed cost earlier, as a request is done only when its step is.
    """
    tokens = np.asarray(queue.tokens, np.int64).tolist()
    begun = np.flatnonzero(np.asarray(queue.partial, bool)).tolist()
    saved_s = _saved_s(queue, chunk_tokens)
    urgency = urgency_order(
        np.asarray(queue.work_s, float) - saved_s,
        np.asarray(queue.deadline_s, float) - SHARED * queue.fixed_s,
        queue.weight,
        queue.starving,
    )
    partial = frozenset(begun)
    partials = begun if len(begun) < 2 else [i for i in urgency.order if i in partial]
    candidates = [current] if max_paused == 0 and current >= 0 else partials
    must_run = len(partials) > max_paused
    reserve = Reserve(
        [tokens[index] for index in begun],
        free_tokens=free_tokens,
        evictable_tokens=evictable_tokens,
        page_size=page_size,
    )
    cached = [0] * len(tokens) if queue.cached is None else np.asarray(queue.cached).tolist()
    least = min(max(page_size, least_tokens or chunk_tokens // 8), chunk_tokens)
    left, slot, limit = chunk_tokens, -1, None
    clock = _StepClock(queue, chunk_tokens)
    unfinished = skipped = False  # slot taken beyond this step; a partial found too little left
    admitted: list[int] = []
    waiting: list[int] = []
    hold: list[int] = []

    def pages(count: int) -> int:
        return -(-count // page_size) * page_size

    def take_slot(index: int) -> bool:
        nonlocal left, slot, limit, unfinished, skipped
        room = left // page_size * page_size
        in_time = tokens[index] if must_run else clock.tokens_in_time(index)
        if in_time < min(tokens[index], room):
            room = in_time // page_size * page_size
        if room < min(least // page_size * page_size, tokens[index]):
            skipped = True
            return False
        slot, limit = index, None if room // page_size == chunk_tokens // page_size else room
        unfinished = tokens[index] > room
        clock.add(index, min(tokens[index], room))
        left -= min(pages(tokens[index]), room)
        return True

    def may_chunk() -> bool:
        paused = len(partials) - (slot >= 0)
        return not (unfinished or skipped) and left >= page_size and paused <= max_paused

    if forced >= 0:
        take_slot(forced)
    for at, index in enumerate(urgency.order):
        if left == 0:
            rest = urgency.order[at:]
            waiting += [i for i in rest if i not in partial] if partial else rest
            break
        if index in partial:
            if slot < 0 and not unfinished and index in candidates:
                take_slot(index)
            continue
        while True:
            owed = min(least, pages(tokens[candidates[0]])) if must_run and slot < 0 else 0
            whole = pages(tokens[index]) <= left - owed
            if not reserve.fits(tokens[index], cached[index]):
                if slot < 0 and not (unfinished or skipped):
                    take_slot(candidates[0])
                (waiting if left < page_size else hold).extend(
                    i for i in urgency.order[at:] if i not in partial
                )
                return PrefillPlan(admitted + waiting, slot, limit, urgency.on_time, hold)
            if whole or may_chunk():
                take = min(tokens[index], left)
                if clock.tokens_in_time(index) < take:
                    if must_run and slot < 0:
                        take_slot(candidates[0])
                    hold += [i for i in urgency.order[at:] if i not in partial]
                    return PrefillPlan(admitted, slot, limit, urgency.on_time, hold)
                clock.add(index, take)
                admitted.append(index)
                reserve.take(tokens[index], cached[index])
                if whole:
                    left -= pages(take)
                else:
                    left, unfinished = left % page_size, True
            elif slot < 0 and candidates and not (unfinished or skipped):
                if take_slot(candidates[0]):
                    continue
                hold.append(index)
            else:
                (waiting if left < page_size else hold).append(index)
            break
    return PrefillPlan(admitted + waiting, slot, limit, urgency.on_time, hold)


def _saved_s(queue: PrefillQueue, chunk_tokens: int) -> NDArray[np.float64]:
    """Seconds by which each request is cheaper than its `work_s` as it shares steps, (n,).

    Of a step's fixed cost a request has to bear between all, alone in it, and its share of the
    tokens, if steps are full: what is saved lies between nothing and the difference.
    """
    tokens, work = np.asarray(queue.tokens, float), np.asarray(queue.work_s, float)
    spare = np.ceil(tokens / chunk_tokens) - tokens / chunk_tokens
    return np.asarray(np.minimum(SHARED * queue.fixed_s * spare, work), float)


class _StepClock:
    """When the step would end as it stands, and by when it has to."""

    def __init__(self, queue: PrefillQueue, chunk_tokens: int) -> None:
        self._queue, self._chunk = queue, chunk_tokens
        self._ends_s, self._latest_s = queue.fixed_s, math.inf

    def tokens_in_time(self, index: int) -> int:
        """Tokens of that request which the step may take without making a member late."""
        count, pace_s = int(self._queue.tokens[index]), self._pace_s(index)
        if self._latest_s == math.inf or pace_s <= 0:
            return count
        return int(min(count, max(0.0, (self._latest_s - self._ends_s) / pace_s)))

    def add(self, index: int, tokens: int) -> None:
        """The step takes so many tokens of it; one that ends in it, on time so far, is a member."""
        self._ends_s += tokens * self._pace_s(index)
        due_s = float(self._queue.deadline_s[index])
        if tokens == self._queue.tokens[index] and self._ends_s <= due_s:
            self._latest_s = min(self._latest_s, due_s)

    def _pace_s(self, index: int) -> float:
        """Seconds a token, the steps' fixed cost left out."""
        count = int(self._queue.tokens[index])
        own = self._queue.work_s[index] - self._queue.fixed_s * -(-count // self._chunk)
        return max(0.0, float(own)) / max(1, count)


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
