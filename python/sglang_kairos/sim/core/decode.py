"""Simulates a decode server: KV reservation, admission, retraction and steps as in SGLang.

Between two steps, in this order:
    1. Retracted requests come back.
    2. KV is reserved for new ones; only then may their prefill start.
    3. Requests whose KV has arrived join the running batch, which streams their first token.
    4. If the next step's KV does not fit, the most recent ones are retracted.

Kairos' decisions are the planner's own answers (`policy.decode_planner`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.admission import Occupancy, QueueView
from sglang_kairos.policy.decode_planner import DecodePlanner, RunningView
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.core.clock import EventClock
from sglang_kairos.sim.core.predictions import Predictor
from sglang_kairos.sim.core.request import SimRequest
from sglang_kairos.sim.hardware.times import System

# SGLang's CLIP_MAX_NEW_TOKEN: SGLang plans for longer outputs as if they were this long.
CLIP_TOKENS = 4096
# Rows of the running batch's table.
CONTEXT, EMITTED, LEFT, FIRST_S, TPOT_S, LAST_S, SERVED = range(7)
_TOKEN = np.array([[1.0], [1.0], [-1.0]])


class SimDecodeServer:
    """One decode server. `reserved` is called when KV is set aside, `finished` after the last token."""

    planner_kind: type[DecodePlanner] = DecodePlanner

    def __init__(
        self,
        clock: EventClock,
        system: System,
        policy: Policy,
        predictor: Predictor,
        reserved: Callable[[SimRequest], None],
        finished: Callable[[SimRequest], None],
    ) -> None:
        self._clock, self._system, self._policy = clock, system, policy
        self._predictor, self._reserved, self._finished = predictor, reserved, finished
        self.asking: list[SimRequest] = []
        self.in_flight = 0
        self.ready: list[SimRequest] = []
        self.running: list[SimRequest] = []
        self.retracted: list[SimRequest] = []
        self.kv_tokens = 0
        """KV tokens of reserved and running requests."""
        self.max_kv_tokens = 0
        self.counters: Counter[str] = Counter()
        self.busy_s = 0.0
        self.planner = self.planner_kind(policy.config, self.counters)
        self._table: NDArray[np.float64] = np.zeros((7, system.max_running))
        self._context = 0
        # Requests that are reserved but not here yet, and since when. Then those that were admitted
        # although they cannot be kept on pace.
        self._coming: dict[SimRequest, float] = {}
        self._unkept: set[SimRequest] = set()
        self._soonest = 0
        self._tightest_s = 0.0
        self._busy = False

    def ask(self, req: SimRequest) -> None:
        """Takes a new request, which wants its KV reserved."""
        self.asking.append(req)
        self._wake()

    def receive(self, req: SimRequest) -> None:
        """Takes the KV of a reserved request."""
        self.in_flight -= 1
        if req in self._coming:
            self.planner.statistics.started(req.prompt, self._clock.now_s - self._coming.pop(req))
        self.ready.append(req)
        self._wake()

    def _wake(self) -> None:
        if not self._busy:
            self._busy = True
            self._clock.at(self._clock.now_s, self._step)

    def _step(self) -> None:
        now = self._clock.now_s
        self._restore()
        if not self.retracted:
            self._reserve()
        self._admit()
        if self.kv_tokens + len(self.running) > self._system.decode_kv_tokens:
            self._retract()
        self.max_kv_tokens = max(self.max_kv_tokens, self.kv_tokens)
        count = len(self.running)
        self._busy = count > 0
        if not count:
            return
        keep = self._choose() if self._policy.park else None
        table = self._table
        batch = count if keep is None else len(keep)
        if keep is None:
            table[:3, :count] += _TOKEN
            self._context += count
        else:
            table[:3, keep] += _TOKEN
            self._context += batch
            self.counters["subset_steps"] += 1
            self.counters["parked"] += count - batch
        self.kv_tokens += batch
        self.max_kv_tokens = max(self.max_kv_tokens, self.kv_tokens)
        read = self._context if keep is None else int(table[CONTEXT, keep].sum())
        seconds = self._system.times.decode_s(batch, read)
        self.busy_s += seconds
        self.counters["decode_steps"] += 1
        self._clock.at(now + seconds, lambda: self._ended(keep, batch, read, seconds))

    def _ended(self, keep: list[int] | None, batch: int, read: int, seconds: float) -> None:
        now, count = self._clock.now_s, len(self.running)
        if self._policy.park:
            self._predictor.saw_decode(batch, read, seconds)
            self._table[LAST_S, slice(count) if keep is None else keep] = now
        self._soonest -= 1
        if self._soonest <= 0:
            left = self._table[LEFT, :count]
            for index in np.flatnonzero(left == 0.0).tolist():
                req = self.running[index]
                self._leave(req, index)
                req.finish(now)
                self.planner.statistics.ended(req.output)
                self._finished(req)
            self._drop(left > 0.0)
        self._step()

    def _restore(self) -> None:
        """Brings retracted requests back, oldest first, as soon as memory allows."""
        while self.retracted:
            req = self.retracted[0]
            need = req.context + min(self._system.reserved_tokens, req.output - req.emitted)
            if need > self._allocatable():
                return
            self.kv_tokens += req.context
            self.ready.append(self.retracted.pop(0))

    def _allocatable(self) -> int:
        """Returns the KV tokens to give away: free ones, less what active requests may grow by."""
        active = len(self.running) + self.in_flight + len(self.ready)
        free = self._system.decode_kv_tokens - self.kv_tokens
        return free - active * self._system.reserved_tokens

    def _reserve(self) -> None:
        if not self.asking:
            return
        kept = most = len(self.asking)
        starving: SimRequest | None = None
        if self._policy.gate:
            plan = self.planner.admit(
                self._queue(self.asking),
                self._running(),
                self._taken(),
                self._predictor.decode_times(),
            )
            starving = self.asking[plan.starving] if plan.starving >= 0 else None
            self.asking = [self.asking[index] for index in plan.order]
            kept, most = plan.kept, plan.count
        else:
            self._sort(self.asking)
        headroom, keep = self._allocatable(), self._system.reserved_tokens
        slots = self._system.max_running - len(self.running) - self.in_flight - len(self.ready)
        count = 0
        for req in self.asking:
            grown = req.prompt + min(req.output, CLIP_TOKENS) - self._context
            if count >= min(slots, most) or max(req.prompt + keep, grown) > headroom:
                break
            headroom -= req.prompt + keep
            count += 1
        admitted, self.asking = self.asking[:count], self.asking[count:]
        for place, req in enumerate(admitted):
            self.kv_tokens += req.prompt
            self.in_flight += 1
            if self._policy.gate:
                self._coming[req] = self._clock.now_s
                if place >= kept:
                    self._unkept.add(req)
                self.planner.let_in(req.prompt, req is starving)
            self._reserved(req)

    def _queue(self, queue: list[SimRequest]) -> QueueView:
        arrival = np.array([req.arrival_s for req in queue])
        system, asking = self._system, queue is self.asking
        growth = [max(system.reserved_tokens, min(req.output, CLIP_TOKENS)) for req in queue]
        return QueueView(
            self._clock.now_s,
            arrival,
            np.array([req.ttft_s for req in queue]),
            np.array([req.tpot_s for req in queue]),
            np.array([req.prompt for req in queue], float),
            clock_s=arrival if asking else None,
            growth_tokens=np.array(growth, float),
        )

    def _running(self) -> RunningView:
        table = self._table[:, : len(self.running)]
        return RunningView(
            self._clock.now_s,
            table[FIRST_S],
            table[EMITTED],
            table[TPOT_S],
            table[LAST_S],
            table[SERVED] > 0.0,
            table[CONTEXT],
            self._tightest_s,
        )

    def _taken(self) -> Occupancy:
        joining = [req for req in (*self._coming, *self.ready) if req not in self._unkept]
        return Occupancy(
            np.array([req.context for req in joining]),
            np.array([req.tpot_s for req in joining]),
            self._system.decode_kv_tokens,
            self._system.max_running,
            self.kv_tokens,
            len(self.running) + self.in_flight + len(self.ready),
        )

    def _sort(self, queue: list[SimRequest]) -> None:
        if len(queue) < 2:
            return
        if self._policy.by_deadline:
            queue[:] = [queue[index] for index in self.planner.order(self._queue(queue))]
        elif self._policy.order == "priority":
            queue.sort(key=lambda req: req.priority)

    def _admit(self) -> None:
        if not self.ready:
            return
        self._sort(self.ready)
        now, table = self._clock.now_s, self._table
        for req in self.ready:
            if req.emitted == 0:
                req.first_token_s, req.emitted = now, 1
                if req.output == 1:
                    self.kv_tokens -= req.prompt
                    req.finish(now)
                    self._finished(req)
                    continue
            table[:, len(self.running)] = (
                req.context,
                req.emitted,
                req.output - req.emitted,
                req.first_token_s,
                req.tpot_s,
                now,
                req not in self._unkept,
            )
            self._context += req.context
            self.running.append(req)
        self.ready.clear()
        self._changed()

    def _retract(self) -> None:
        """Retracts as SGLang does: the fewest output tokens first, then the longest prompt."""
        table, count = self._table, len(self.running)
        for index, req in enumerate(self.running):
            req.emitted = int(table[EMITTED, index])
        if self._policy.park:
            order = self.planner.retract(self._running())
        else:
            order = sorted(
                range(count), key=lambda i: (-self.running[i].emitted, self.running[i].prompt)
            )
        keep = np.ones(count, bool)
        while order and self.kv_tokens + len(order) > self._system.decode_kv_tokens:
            index = order.pop()
            keep[index] = False
            req = self.running[index]
            self._leave(req, index)
            self.retracted.append(req)
            self.counters["retractions"] += 1
        self.retracted.sort(key=lambda req: req.arrival_s)
        self._drop(keep)

    def _leave(self, req: SimRequest, index: int) -> None:
        context = int(self._table[CONTEXT, index])
        req.emitted = int(self._table[EMITTED, index])
        self.kv_tokens -= context
        self._context -= context

    def _drop(self, keep: NDArray[np.bool_]) -> None:
        count, left = len(self.running), int(np.count_nonzero(keep))
        if left < count:
            self._table[:, :left] = self._table[:, :count][:, keep]
            self.running = [self.running[i] for i in np.flatnonzero(keep).tolist()]
        self._changed()

    def _changed(self) -> None:
        count = len(self.running)
        if count:
            self._soonest = int(self._table[LEFT, :count].min())
            self._tightest_s = float(self._table[TPOT_S, :count].min())

    def _choose(self) -> list[int] | None:
        """Returns the indices of the running requests that take part; None: all."""
        count = len(self.running)
        if count < 2:
            return None
        choice = self.planner.choose(self._running(), self._predictor.decode_times())
        if choice is None:
            return None
        self._table[SERVED, :count] = choice.served
        return None if len(choice.run) == count else choice.run
