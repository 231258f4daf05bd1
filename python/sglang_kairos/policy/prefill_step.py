"""Chooses which requests a prefill step computes, within the step's token budget.

Why choose it: stock SGLang gives the budget to whoever came first. A long prompt then makes many
short ones late. Here the budget goes down the order of `policy.urgency`, and a long prefill can be
paused between two chunks.

The rule. Walk the requests in order of urgency.
- A request that fits whole is admitted.
- One that does not fit starts as a new chunked prefill with what is left of the budget. It may do
  so only if nobody else stays in the chunk slot beyond this step.
- If it may not start, the most urgent begun prefill runs in its place: only that unblocks it.

Begun prefills. All but the one in the chunk slot sit paused, at most `max_paused` of them. A begun
prefill takes all that is left of the step, or nothing: a small chunk is not worth rereading its
prefix. Nobody is admitted who would leave begun prefills too little KV (`policy.reserve`), nor
anybody behind.

Deadlines. Every first token in a step comes when the step ends. So a step is full once the next
request would end it after the deadline of a member that would otherwise be on time.

Formula, in seconds, for n tokens of a request in steps of C tokens with a fixed cost a per step:
    saved = min(SHARED * a * (ceil(n / C) - n / C), work)        what sharing steps may save
    job   = (work - saved, deadline - SHARED * a)                what `urgency` orders

Trade-offs. Paused prefills hold KV, and each resumption rereads a prefix. Nobody starves: see
`prefill_planner` (starvation, pauses).
Source: our own design; both ends of SHARED are measured in docs/simulator.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.reserve import Reserve
from sglang_kairos.policy.urgency import Floats, Mask, urgency_order

# How full the coming steps will be is unknown, so half is assumed (docs/simulator.md).
SHARED = 0.5


@dataclass(frozen=True, slots=True)
class PrefillQueue:
    """All requests with prefill work left, one entry per request in each array, (n,).

    `work_s`: seconds predicted for `tokens` in steps of their own. `fixed_s`: seconds that each
    step costs whatever is in it. `deadline_s`: seconds from now. `tokens`: left to compute, without
    the cached prefix. `partial`: half-done chunked prefills. `starving`: requests entitled to go
    first now. `cached`: prompt tokens in the prefix cache, read for requests that have not begun;
    None: none are.
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
    """One prefill step.

    `order`: waiting indices to offer to SGLang, those that run now first. `slot`: the begun prefill
    in the chunk slot; -1: none runs. `chunk_limit`: most tokens it may take; None: no limit.
    `on_time`: how many requests are predicted to meet their deadline. `hold`: waiting indices that
    must not be offered. `starving`: index put first because it starves; -1: none.
    """

    order: list[int]
    slot: int
    chunk_limit: int | None
    on_time: int
    hold: list[int]
    starving: int = -1


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
    """Returns the next step, of at most `chunk_tokens` (>= `page_size`) tokens.

    `current`: begun prefill in the chunk slot, -1: none; it cannot be paused when `max_paused` is
    0. `forced`: begun prefill that runs now without a limit, -1: none.
    `least_tokens`: least share of a step for a begun prefill, 0: an eighth of the chunk.
    `free_tokens`: KV tokens, of which `evictable_tokens` are cached.

    A request is done only when its step is. So work counts without half of what sharing steps can
    save (`_saved_s`), and deadlines are earlier by half a step's fixed cost.
    """
    urgency = urgency_order(
        np.asarray(queue.work_s, float) - _saved_s(queue, chunk_tokens),
        np.asarray(queue.deadline_s, float) - SHARED * queue.fixed_s,
        queue.weight,
        queue.starving,
    )
    step = _StepWalk(
        queue, urgency.order, chunk_tokens, page_size, least_tokens, max_paused, current
    )
    reserve = Reserve(
        step.begun_left,
        free_tokens=free_tokens,
        evictable_tokens=evictable_tokens,
        page_size=page_size,
    )
    if forced >= 0:
        step.run_begun(forced)
    order, hold = step.walk(urgency.order, reserve)
    return PrefillPlan(order, step.slot, step.chunk_limit, urgency.on_time, hold)


class _StepWalk:
    """A step that is being filled. `left`: tokens of its budget that are not taken yet."""

    def __init__(
        self,
        queue: PrefillQueue,
        order: list[int],
        chunk_tokens: int,
        page_size: int,
        least_tokens: int,
        max_paused: int,
        current: int,
    ) -> None:
        self._tokens: list[int] = np.asarray(queue.tokens, np.int64).tolist()
        self._cached, self._clock = queue.cached, _StepClock(queue, chunk_tokens)
        self._chunk, self._page, self._max_paused = chunk_tokens, page_size, max_paused
        self._least = min(max(page_size, least_tokens or chunk_tokens // 8), chunk_tokens)
        begun: list[int] = np.flatnonzero(np.asarray(queue.partial, bool)).tolist()
        self._begun = frozenset(begun)
        self.begun_left = [self._tokens[index] for index in begun]
        if len(begun) > 1:
            begun = [index for index in order if index in self._begun]
        # Candidates for the slot, the most urgent first. Without pausing it stays where it is.
        self._may_run = [current] if max_paused == 0 and current >= 0 else begun
        self._must_run = len(begun) > max_paused
        self.left, self.slot = chunk_tokens, -1
        self.chunk_limit: int | None = None
        self._slot_stays = False  # taken beyond this step, by a begun one or one that begins
        self._too_little = False  # a begun one found less left than a chunk's least size

    def walk(self, order: list[int], reserve: Reserve) -> tuple[list[int], list[int]]:
        """Fills the step in this order. Returns the waiting indices to offer, and those to hold back."""
        offer: list[int] = []
        hold: list[int] = []
        end = len(order)
        for place, index in enumerate(order):
            if self._full():
                end = place
                break
            if index in self._begun:
                if self.slot < 0 and not self._slot_stays and index in self._may_run:
                    self.run_begun(index)
                continue
            admitted = self._admit(index, reserve)
            if admitted is None:
                end = place
                break
            (offer if admitted or self._full() else hold).append(index)
        rest = order[end:]
        if self._begun:
            rest = [index for index in rest if index not in self._begun]
        # SGLang looks at nobody behind a full step. In a step that is not full they must not slip in.
        return (offer + rest, hold) if self._full() else (offer, hold + rest)

    def _admit(self, index: int, reserve: Reserve) -> bool | None:
        """Returns whether a waiting request is admitted. None: neither it nor anybody behind it."""
        tokens, cached = self._tokens[index], 0
        if self._cached is not None:
            cached = int(self._cached[index])
        if not reserve.fits(tokens, cached):
            self._run_most_urgent()
            return None
        if not self._has_place(index):
            self._run_most_urgent()  # only that makes one
        if not self._has_place(index):
            return False
        taken = min(tokens, self.left)
        if not self._clock.allows(index, taken):
            if self._must_run:
                self._run_most_urgent()
            return None
        reserve.take(tokens, cached)
        self._clock.add(index, taken)
        if self._fits_whole(index):
            self.left -= self._pages_of(tokens)
        else:  # it starts as a chunked prefill
            self.left, self._slot_stays = self.left % self._page, True
        return True

    def run_begun(self, index: int) -> None:
        """Gives a begun prefill the slot and all that is left, if that is enough to be worth a chunk."""
        count, budget = self._tokens[index], self._whole_pages(self.left)
        if not self._must_run:
            in_time = self._clock.tokens_in_time(index)
            if in_time < min(count, budget):
                budget = self._whole_pages(in_time)
        if budget < min(self._whole_pages(self._least), count):
            self._too_little = True
            return
        self.slot, self._slot_stays = index, count > budget
        self.chunk_limit = None if budget == self._whole_pages(self._chunk) else budget
        self._clock.add(index, min(count, budget))
        self.left -= min(self._pages_of(count), budget)

    def _run_most_urgent(self) -> None:
        if self.slot < 0 and self._may_run and not (self._slot_stays or self._too_little):
            self.run_begun(self._may_run[0])

    def _has_place(self, index: int) -> bool:
        return self._fits_whole(index) or self._may_start_chunking()

    def _fits_whole(self, index: int) -> bool:
        owed = 0
        if self._must_run and self.slot < 0:
            owed = min(self._least, self._pages_of(self._tokens[self._may_run[0]]))
        return self._pages_of(self._tokens[index]) <= self.left - owed

    def _may_start_chunking(self) -> bool:
        paused = len(self._begun) - (self.slot >= 0)
        free = not (self._slot_stays or self._too_little)
        return free and self.left >= self._page and paused <= self._max_paused

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self._page) * self._page

    def _whole_pages(self, tokens: int) -> int:
        return tokens // self._page * self._page

    def _full(self) -> bool:
        return self.left < self._page


class _StepClock:
    """When the step would end as filled so far, and when it must end. Times are in seconds."""

    def __init__(self, queue: PrefillQueue, chunk_tokens: int) -> None:
        self._queue, self._chunk = queue, chunk_tokens
        self._ends_s, self._latest_s = queue.fixed_s, math.inf

    def allows(self, index: int, tokens: int) -> bool:
        """Returns whether the step may take `tokens` of that request without making a member late."""
        return self.tokens_in_time(index) >= tokens

    def tokens_in_time(self, index: int) -> int:
        """Returns the tokens of that request that the step may take without making a member late."""
        count, token_s = int(self._queue.tokens[index]), self._token_s(index)
        if self._latest_s == math.inf or token_s <= 0:
            return count
        return int(min(count, max(0.0, (self._latest_s - self._ends_s) / token_s)))

    def add(self, index: int, tokens: int) -> None:
        """Adds `tokens` of a request. It is a member if it ends in this step and is on time so far."""
        self._ends_s += tokens * self._token_s(index)
        due_s = float(self._queue.deadline_s[index])
        if tokens == self._queue.tokens[index] and self._ends_s <= due_s:
            self._latest_s = min(self._latest_s, due_s)

    def _token_s(self, index: int) -> float:
        """Returns the seconds per token, without the steps' fixed cost."""
        count = int(self._queue.tokens[index])
        own = self._queue.work_s[index] - self._queue.fixed_s * -(-count // self._chunk)
        return max(0.0, float(own)) / max(1, count)


def _saved_s(queue: PrefillQueue, chunk_tokens: int) -> NDArray[np.float64]:
    """Returns by how many seconds each request is cheaper than `work_s` as it shares steps, (n,).

    Alone, a request bears the fixed cost of all its steps; in full steps it bears its share by tokens.
    What it saves lies between nothing and the difference. SHARED of the difference is assumed.
    """
    tokens, work = np.asarray(queue.tokens, float), np.asarray(queue.work_s, float)
    spare = np.ceil(tokens / chunk_tokens) - tokens / chunk_tokens
    return np.asarray(np.minimum(SHARED * queue.fixed_s * spare, work), float)
