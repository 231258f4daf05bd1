"""A prefill server: SGLang's chunked prefill, ordered by its own policies or by Kairos'.

One step computes at most `chunk_tokens` new tokens: the chunked request in the slot first, then the
waiting ones in order, up to the first that does not fit; that one starts as the next chunked
request if there is none. `_plan` mirrors `engine/prefill.py` (`_decide`, `_apply_plan`) line by
line, on the same policy functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from sglang_kairos.policy.urgency import LateShare, PrefillPlan, PrefillQueue, plan_prefill
from sglang_kairos.sim.cache import PrefixCache
from sglang_kairos.sim.clock import Clock
from sglang_kairos.sim.orders import CACHE_AWARE, ORDERS, chunk_limit
from sglang_kairos.sim.policies import Policy
from sglang_kairos.sim.predictions import Predictor
from sglang_kairos.sim.request import NEVER, SimRequest
from sglang_kairos.sim.times import System

# As in engine/prefill.py.
REMATCH_EVERY_PLANS = 16
REMATCH_ALL_BELOW = 32

Arrived = Callable[[SimRequest], None]


class PrefillServer:
    """`prefilled` is called when a request's last chunk is done, `arrived` when its KV has crossed."""

    def __init__(
        self,
        clock: Clock,
        system: System,
        policy: Policy,
        predictor: Predictor,
        block_tokens: int,
        prefilled: Arrived,
        arrived: Arrived,
    ) -> None:
        self._clock, self._system, self._policy = clock, system, policy
        self._predictor, self._prefilled, self._arrived = predictor, prefilled, arrived
        self.cache = PrefixCache(system.prefill_kv_tokens, block_tokens)
        self.waiting: list[SimRequest] = []
        self.slot: SimRequest | None = None
        self.paused: list[SimRequest] = []
        self.counters: Counter[str] = Counter()
        self.busy_s = 0.0
        self._late_share = LateShare(policy.config.late_share)
        self._processed = 0
        self._plans = 0
        self._busy = False
        self._link_free_s = 0.0
        self.watch: Callable[[PrefillServer, PrefillPlan], None] | None = None
        """Sees every plan, before it is carried out."""

    def add(self, req: SimRequest) -> None:
        """A decode server has reserved KV for `req`: it may be computed."""
        req.arrival_processed_tokens, req.matched_at_plan = self._processed, NEVER
        self.waiting.append(req)
        if not self._busy:
            self._busy = True
            self._clock.at(self._clock.now_s, self._step)

    def _step(self) -> None:
        batch = self._next_batch()
        if not batch:
            # Memory is short until a transfer ends; see `_sent`.
            self._busy = False
            return
        new = [tokens for _, tokens in batch]
        prefix = [req.done for req, _ in batch]
        seconds = self._system.times.prefill_s(new, prefix)
        self._busy = True
        self.busy_s += seconds
        self.counters["prefill_steps"] += 1
        self._clock.at(
            self._clock.now_s + seconds, lambda: self._ended(batch, new, prefix, seconds)
        )

    def _ended(
        self,
        batch: list[tuple[SimRequest, int]],
        new: list[int],
        prefix: list[int],
        seconds: float,
    ) -> None:
        self._predictor.saw_prefill(new, prefix, seconds)
        total = sum(new)
        self._processed += total
        self._late_share.earn(total)
        for req, tokens in batch:
            if req.starving:
                self._late_share.spend(tokens)
            unsent = tokens + (req.hit if req.computed == 0 else 0)
            req.computed += tokens
            req.done += tokens
            self._send(req, unsent)
            if req.done == req.prompt:
                self._cache_prompt(req)
                self._prefilled(req)
        self._step()

    def _send(self, req: SimRequest, tokens: int) -> None:
        system, now = self._system, self._clock.now_s
        start = max(now, self._link_free_s)
        self._link_free_s = start + tokens * system.kv_bytes / system.link_bytes_per_s
        if req.done == req.prompt:
            self._clock.at(self._link_free_s + system.link_latency_s, lambda: self._sent(req))

    def _sent(self, req: SimRequest) -> None:
        self.cache.release(req.blocks, req.held)
        self._arrived(req)
        if not self._busy and (self.waiting or self.slot or self.paused):
            self._busy = True
            self._clock.at(self._clock.now_s, self._step)

    def _cache_prompt(self, req: SimRequest) -> None:
        size = self.cache.block_tokens
        tail = req.prompt - len(req.blocks) * size
        self.cache.insert(req.blocks[-(-req.hit // size) :], req.held, tail)
        req.held = tail

    def _next_batch(self) -> list[tuple[SimRequest, int]]:
        if self._policy.urgent:
            if not self.waiting and not self.paused:
                return self._fill(None)
            return self._planned_batch()
        limit = None
        order = self._policy.order
        if self.waiting:
            if order in CACHE_AWARE:
                for req in self.waiting:
                    self._match(req)
            ORDERS[order](self.waiting, self._processed, self.cache.block_tokens)
        if self.slot is not None and order == "shortest-prefill-first":
            remaining = self.slot.prompt - self.slot.done
            limit = chunk_limit(remaining, self.waiting, self._system.chunk_tokens)
        return self._fill(limit)

    def _planned_batch(self) -> list[tuple[SimRequest, int]]:
        plan, jobs, starts_with = self._plan()
        chosen = None if plan.slot < 0 else jobs[plan.slot]
        if chosen is not self.slot:
            if self.slot is not None:
                self.slot.paused_since_s = self._clock.now_s
                self.paused.append(self.slot)
                self.counters["pauses"] += 1
            self.slot = None
            if chosen is not None:
                self._resume(chosen)
        held = [jobs[index] for index in plan.hold]
        without = set(plan.hold)
        rest = [i for i in range(starts_with) if i not in without]
        rank = {index: place for place, index in enumerate(plan.order)}
        rest.sort(key=lambda index: rank.get(index, len(rank)))
        self.waiting = [jobs[index] for index in rest]
        batch = self._fill(plan.chunk_limit)
        if not batch and self.slot is None and self.paused:
            self._resume(self.paused[0])
            self.counters["forced_resumes"] += 1
            batch = self._fill(None)
        self.waiting.extend(held)
        return batch

    def _resume(self, req: SimRequest) -> None:
        self.paused.remove(req)
        req.paused_s += self._clock.now_s - req.paused_since_s
        self.slot = req
        self.counters["resumes"] += 1

    def _match(self, req: SimRequest) -> None:
        hit = self.cache.match(req.blocks) * self.cache.block_tokens
        req.matched = min(hit, req.prompt - 1)

    def _fill(self, limit: int | None) -> list[tuple[SimRequest, int]]:
        """The step's requests and their tokens; takes them off the queue and into memory."""
        left = self._system.chunk_tokens
        batch: list[tuple[SimRequest, int]] = []
        slot, cache = self.slot, self.cache
        if slot is not None:
            remaining = slot.prompt - slot.done
            take = min(remaining, left if limit is None else limit)
            batch.append((slot, take))
            left -= take
            if take == remaining:
                self.slot = None
        admitted = 0
        for req in self.waiting:
            if left <= 0:
                break
            self._match(req)
            hit = req.blocks[: -(-req.matched // cache.block_tokens)]
            need = req.prompt - req.matched
            if not cache.fits(need, hit) or (need > left and self.slot is not None):
                break
            cache.hold(need, hit)
            req.hit = req.done = req.matched
            req.held = need
            take = min(need, left)
            if take < need:
                self.slot = req
            batch.append((req, take))
            left -= take
            admitted += 1
        del self.waiting[:admitted]
        return batch

    def _plan(self) -> tuple[PrefillPlan, list[SimRequest], int]:
        """The plan, what its indices mean, and how many of those are waiting (they come first)."""
        self._plans += 1
        now, config, waiting = self._clock.now_s, self._policy.config, self.waiting
        chunk_tokens = self._system.chunk_tokens
        partials = [] if self.slot is None else [self.slot]
        partials += self.paused
        match_all = len(waiting) <= REMATCH_ALL_BELOW
        for req in waiting:
            if req.blocks and (
                match_all or self._plans - req.matched_at_plan >= REMATCH_EVERY_PLANS
            ):
                self._match(req)
                req.matched_at_plan = self._plans
        jobs = waiting + partials
        tokens = [req.prompt - req.matched for req in waiting]
        tokens += [req.prompt - req.done for req in partials]
        count = np.array(tokens, np.int64)
        prefix = np.array([req.prompt for req in jobs], np.int64) - count
        model = self._predictor.prefill
        work = model.remaining_s(count, prefix, chunk_tokens) * (1 + config.margin)
        work = work * np.array([req.work_error for req in jobs])
        slack = np.array([req.due_s - now for req in jobs]) - config.handoff_ms / 1e3
        self._mark_starving(jobs)
        queue = PrefillQueue(
            work_s=work,
            deadline_s=slack,
            tokens=count,
            partial=[False] * len(waiting) + [True] * len(partials),
            starving=[req.starving for req in jobs],
            fixed_s=model.step_s((), ()) * (1 + config.margin),
            cached=prefix,
        )
        current = len(waiting) if self.slot is not None else -1
        begun = float(prefix[len(waiting) :].max(initial=0.0))
        plan = plan_prefill(
            queue,
            chunk_tokens=chunk_tokens,
            current=current,
            free_tokens=self.free_tokens,
            evictable_tokens=self.cache.evictable_tokens,
            max_paused=config.max_paused if config.pause else 0,
            forced=self._overdue(len(waiting) + (self.slot is not None)),
            least_tokens=model.worthwhile_tokens(begun, chunk_tokens),
        )
        if self.watch is not None:
            self.watch(self, plan)
        return plan, jobs, len(waiting)

    @property
    def free_tokens(self) -> int:
        """KV tokens as a server counts them: free or evictable. Here a prompt's KV is set aside as
        it begins, there chunk by chunk."""
        begun = [*self.paused, *([] if self.slot is None else [self.slot])]
        return self.cache.free_tokens + sum(min(req.held, req.prompt - req.done) for req in begun)

    def _mark_starving(self, jobs: list[SimRequest]) -> None:
        """Let the oldest request past the starvation bound go first, within the late share."""
        now, bound = self._clock.now_s, self._policy.config.max_wait
        starving: SimRequest | None = None
        for req in jobs:
            req.starving = False
            if now - req.arrival_s > bound * req.ttft_s and (
                starving is None or req.arrival_s < starving.arrival_s
            ):
                starving = req
        if starving is not None and self._late_share.may_spend():
            starving.starving = True

    def _overdue(self, first: int) -> int:
        """Index of a request paused for too long in all, -1 when there is none."""
        now, limit_s = self._clock.now_s, self._policy.config.max_pause_ms / 1e3
        if self.slot is not None and self.slot.paused_s > limit_s:
            return first - 1
        for offset, req in enumerate(self.paused):
            if req.paused_s + now - req.paused_since_s > limit_s:
                return first + offset
        return -1
