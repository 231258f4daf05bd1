"""Simulates a prefill server: SGLang's chunked prefill, ordered by its own policies or by Kairos'.

One step computes at most `chunk_tokens` new tokens. The chunked request in the slot comes first.
Then come the waiting ones in order, up to the first that does not fit. That one starts as the next
chunked request if there is none. `policy.prefill_planner` decides, as on a real server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from sglang_kairos.policy.prefill_planner import NEVER, PrefillPlanner, PrefillView
from sglang_kairos.sim.baselines.order import ORDERS
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.core.clock import EventClock
from sglang_kairos.sim.core.predictions import Predictor
from sglang_kairos.sim.core.prefix_cache import PrefixCache
from sglang_kairos.sim.core.request import SimRequest
from sglang_kairos.sim.hardware.times import System

Arrived = Callable[[SimRequest], None]


class SimPrefillServer:
    """One prefill server.

    `prefilled` is called when a request's last chunk is done, `arrived` when its KV has crossed the
    link.
    """

    def __init__(
        self,
        clock: EventClock,
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
        self._planner = PrefillPlanner(policy.config)
        self._starving: SimRequest | None = None
        self._processed = 0
        self._busy = False
        self._link_free_s = 0.0

    def add(self, req: SimRequest) -> None:
        """Takes `req`, for which a decode server has reserved KV: it may be computed."""
        req.arrival_processed_tokens, req.matched_at_plan = self._processed, NEVER
        self.waiting.append(req)
        if not self._busy:
            self._busy = True
            self._clock.at(self._clock.now_s, self._step)

    def _step(self) -> None:
        batch = self._next_batch()
        if not batch:
            # Memory is short until a transfer ends (`_sent`).
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
        self._planner.ran(total, sum(tokens for req, tokens in batch if req is self._starving))
        for req, tokens in batch:
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
        order = ORDERS[self._policy.order]
        if self.waiting:
            if order.cache_aware:
                for req in self.waiting:
                    self._match(req)
            order.sort(self.waiting, self._processed, self.cache.block_tokens)
        if self.slot is not None and order.chunk_limit is not None:
            remaining = self.slot.prompt - self.slot.done
            limit = order.chunk_limit(remaining, self.waiting, self._system.chunk_tokens)
        return self._fill(limit)

    def _planned_batch(self) -> list[tuple[SimRequest, int]]:
        waiting = self.waiting
        jobs = [*waiting, *([] if self.slot is None else [self.slot]), *self.paused]
        self._look_up_prefixes(waiting)
        plan = self._planner.plan(self._view(jobs), self._predictor.prefill)
        self._starving = None if plan.starving < 0 else jobs[plan.starving]
        chosen = None if plan.slot < 0 else jobs[plan.slot]
        if chosen is not self.slot:
            if self.slot is not None:
                self.slot.paused_since_s = self._clock.now_s
                self.paused.append(self.slot)
                self.counters["pauses"] += 1
            self.slot = None
            if chosen is not None:
                self._resume(chosen)
        self.waiting = [waiting[index] for index in plan.order]
        batch = self._fill(plan.chunk_limit)
        if not batch and self.slot is None and self.paused:
            self._resume(self.paused[0])
            self.counters["forced_resumes"] += 1
            batch = self._fill(None)
        self.waiting.extend(waiting[index] for index in plan.hold)
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
        """Returns the step's requests and their tokens; takes them off the queue and into memory."""
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

    def _look_up_prefixes(self, waiting: list[SimRequest]) -> None:
        last = np.array([req.matched_at_plan for req in waiting], np.int64)
        for index in self._planner.to_look_up(last):
            self._match(waiting[index])
            waiting[index].matched_at_plan = self._planner.plans

    def _view(self, jobs: list[SimRequest]) -> PrefillView:
        """Returns the planner's view: the waiting requests and, behind them, those that have begun."""
        now, begun = self._clock.now_s, jobs[len(self.waiting) :]
        done = [req.matched for req in self.waiting] + [req.done for req in begun]
        prefix = np.array(done, np.int64)
        paused = [req.paused_s + now - req.paused_since_s for req in self.paused]
        return PrefillView(
            now_s=now,
            arrival_s=np.array([req.arrival_s for req in jobs]),
            ttft_s=np.array([req.ttft_s for req in jobs]),
            tokens=np.array([req.prompt for req in jobs], np.int64) - prefix,
            prefix=prefix,
            chunk_tokens=self._system.chunk_tokens,
            paused_s=paused if self.slot is None else [self.slot.paused_s, *paused],
            in_slot=self.slot is not None,
            free_tokens=self.free_tokens,
            evictable_tokens=self.cache.evictable_tokens,
            max_paused=self._policy.config.max_paused if self._policy.config.pause else 0,
            work_factor=np.array([req.work_error for req in jobs]),
        )

    @property
    def free_tokens(self) -> int:
        """Returns the KV tokens that are free or evictable, counted as a server does.

        Here a prompt's KV is set aside when it begins; a server takes it chunk by chunk.
        """
        begun = [*self.paused, *([] if self.slot is None else [self.slot])]
        return self.cache.free_tokens + sum(min(req.held, req.prompt - req.done) for req in begun)
