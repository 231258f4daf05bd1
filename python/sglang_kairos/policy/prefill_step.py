"""Chooses what one prefill step computes: the urgency order, walked with the step's token budget.

The rule:
- A request that fits whole is admitted.
- One that does not fit starts as a new chunked prefill with the budget that is left. It may not if
  another stays in the chunk slot beyond this step. Then the most urgent begun prefill runs in its
  place, since only that frees the slot.
- Of the begun prefills, one is in the chunk slot; at most `max_paused` others sit paused. A begun
  one takes all that is left of the step or nothing. Less than `least_tokens` is not worth rereading
  its prefix for.
- No request is admitted that would leave begun ones too little KV for their rest
  (`policy.reserve`), nor any request behind it.
- All in a step get their first token when the step ends. So the step is full when the next request
  would end it after the deadline of a member that is on time without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.reserve import Reserve
from sglang_kairos.policy.urgency import Floats, Mask, urgency_order

# Nobody knows how full the coming steps will be: the middle (docs/simulator.md has both ends).
SHARED = 0.5


@dataclass(frozen=True, slots=True)
class PrefillQueue:
    """All requests with prefill work left: one entry per request in each array, tokens and seconds.

    `tokens`: left to compute, prefix cache excluded. `work_s`: the time predicted for them in steps
    of their own; each step has the fixed cost `fixed_s`. `partial`: half-done chunked prefills.
    `starving`: those entitled to go first now. `cached`: tokens of each prompt in the prefix cache,
    None for none; read for requests that have not begun.
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
    """One prefill step, by indices into the queue.

    `order`: waiting requests to offer, those that run now first. `slot`: the begun request in the
    chunk slot, -1 for none. `chunk_limit`: tokens it may take, None for no cap. `on_time`: how many
    requests are predicted to meet their deadline. `hold`: waiting requests that must not be
    offered. `starving`: the request put first because it starves, -1 for none.
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
    """Returns what runs in the next step of at most `chunk_tokens` (>= `page_size`) tokens.

    `current`: the request in the chunk slot, -1 for none; it cannot be paused when `max_paused` is
    0. `forced`: a begun request that runs now, without a cap; -1 for none. `least_tokens`: the
    least share of a step for a begun request; 0 means an eighth of the chunk. Of `free_tokens` KV
    tokens, `evictable_tokens` are cached.

    Requests share steps, which saves fixed cost. So the on-time set counts work less half of what
    sharing can save (`_saved_s`). A request is done only when its step is, so its deadline counts
    half a step's fixed cost earlier.
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
    """A step that is being filled. `left`: tokens of its budget that no request has taken."""

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
        # Who may get the slot, the most urgent first; without pausing it stays where it is.
        self._may_run = [current] if max_paused == 0 and current >= 0 else begun
        self._must_run = len(begun) > max_paused
        self.left, self.slot = chunk_tokens, -1
        self.chunk_limit: int | None = None
        self._slot_stays = False  # the slot is taken beyond this step
        self._too_little = False  # too little was left to be worthwhile for a begun prefill

    def walk(self, order: list[int], reserve: Reserve) -> tuple[list[int], list[int]]:
        """Fills the step in this order. Returns waiting indices: whom to offer, whom to hold."""
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
        # Upstream looks at nobody else once the step is full; if it is not, they must not slip in.
        return (offer + rest, hold) if self._full() else (offer, hold + rest)

    def _admit(self, index: int, reserve: Reserve) -> bool | None:
        """Returns whether a waiting request comes in; None: neither it nor any behind it."""
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
        """Gives a begun prefill the chunk slot and all tokens left, if that is worthwhile."""
        count, room = self._tokens[index], self._whole_pages(self.left)
        if not self._must_run:
            in_time = self._clock.tokens_in_time(index)
            if in_time < min(count, room):
                room = self._whole_pages(in_time)
        if room < min(self._whole_pages(self._least), count):
            self._too_little = True
            return
        self.slot, self._slot_stays = index, count > room
        self.chunk_limit = None if room == self._whole_pages(self._chunk) else room
        self._clock.add(index, min(count, room))
        self.left -= min(self._pages_of(count), room)

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
    """When the step would end as it stands, and by when it must, in seconds."""

    def __init__(self, queue: PrefillQueue, chunk_tokens: int) -> None:
        self._queue, self._chunk = queue, chunk_tokens
        self._ends_s, self._latest_s = queue.fixed_s, math.inf

    def allows(self, index: int, tokens: int) -> bool:
        """Returns whether the step may take that many tokens of it without making a member late."""
        return self.tokens_in_time(index) >= tokens

    def tokens_in_time(self, index: int) -> int:
        """Returns how many tokens of a request the step may take without making a member late."""
        count, per_token_s = int(self._queue.tokens[index]), self._seconds_per_token(index)
        if self._latest_s == math.inf or per_token_s <= 0:
            return count
        return int(min(count, max(0.0, (self._latest_s - self._ends_s) / per_token_s)))

    def add(self, index: int, tokens: int) -> None:
        """Adds tokens of a request. One that ends in this step, on time so far, is a member."""
        self._ends_s += tokens * self._seconds_per_token(index)
        due_s = float(self._queue.deadline_s[index])
        if tokens == self._queue.tokens[index] and self._ends_s <= due_s:
            self._latest_s = min(self._latest_s, due_s)

    def _seconds_per_token(self, index: int) -> float:
        """Seconds per token, the steps' fixed cost left out."""
        count = int(self._queue.tokens[index])
        own = self._queue.work_s[index] - self._queue.fixed_s * -(-count // self._chunk)
        return max(0.0, float(own)) / max(1, count)


def _saved_s(queue: PrefillQueue, chunk_tokens: int) -> NDArray[np.float64]:
    """Returns by how many seconds sharing steps makes each request cheaper than its `work_s`, (n,).

    Alone, a request bears the fixed cost of all its steps. In full steps, it bears only its share
    of the tokens. What it saves lies between nothing and that difference.
    """
    tokens, work = np.asarray(queue.tokens, float), np.asarray(queue.work_s, float)
    spare = np.ceil(tokens / chunk_tokens) - tokens / chunk_tokens
    return np.asarray(np.minimum(SHARED * queue.fixed_s * spare, work), float)
