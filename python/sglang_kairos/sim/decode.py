"""A decode server: KV reservation, admission, retraction and stepping as in SGLang.

Between two steps, in this order: retracted requests come back, KV is reserved for new ones (only
then may their prefill start), requests whose KV has arrived join the running batch, which streams
their first token, and the most recent ones are retracted if the next step's KV does not fit.
`_choose` mirrors `engine/decode.py` (`_choose`, `_pack`) on the same policy function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.admission import (
    PRESSED,
    Occupancy,
    Waiting,
    deadline_order,
    plan_admission,
)
from sglang_kairos.policy.packing import choose_step, horizon_of, pace_s, reserve_of, room_s
from sglang_kairos.policy.retraction import keep_order
from sglang_kairos.policy.urgency import LateShare
from sglang_kairos.predict.stay import BEST, Stay
from sglang_kairos.sim.clock import Clock
from sglang_kairos.sim.policies import Policy
from sglang_kairos.sim.predictions import Predictor
from sglang_kairos.sim.request import SimRequest
from sglang_kairos.sim.times import System

# SGLang's CLIP_MAX_NEW_TOKEN: longer outputs are planned for as if this long.
CLIP_TOKENS = 4096
# SGLang's default of both time-outs; the simulator loses nobody to them, but has the same rule.
GIVE_UP_S = 300.0
# Rows of the running batch's table.
CONTEXT, EMITTED, LEFT, FIRST_S, TPOT_S, LAST_S, SERVED = range(7)
_TOKEN = np.array([[1.0], [1.0], [-1.0]])


class DecodeServer:
    """`reserved` is called when a request's KV is set aside, `finished` after its last token."""

    def __init__(
        self,
        clock: Clock,
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
        """Reserved and running."""
        self.max_kv_tokens = 0
        self.counters: Counter[str] = Counter()
        self.busy_s = 0.0
        self.watch: Callable[[DecodeServer, list[int] | None], None] | None = None
        """Sees who runs (None: everybody) of `running` before each step that packing may change."""
        self._table: NDArray[np.float64] = np.zeros((7, system.max_running))
        self._context = 0
        # Reserved but not here yet, and since when; let in although they cannot be kept on pace.
        self._coming: dict[SimRequest, float] = {}
        self._unkept: set[SimRequest] = set()
        self._starving: SimRequest | None = None
        self._share, self._stay = LateShare(policy.config.late_share), Stay()
        self._soonest = 0
        self._tightest_s = 0.0
        self._busy = False

    def ask(self, req: SimRequest) -> None:
        """A new request wants its KV reserved."""
        self.asking.append(req)
        self._wake()

    def receive(self, req: SimRequest) -> None:
        """A reserved request's KV has arrived."""
        self.in_flight -= 1
        if req in self._coming:
            self._stay.started(req.prompt, self._clock.now_s - self._coming.pop(req))
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
        if self.watch is not None:
            self.watch(self, keep)
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
                self._stay.ended(req.output)
                self._finished(req)
            self._drop(left > 0.0)
        self._step()

    def _restore(self) -> None:
        """Retracted requests return, oldest first, as soon as memory allows."""
        while self.retracted:
            req = self.retracted[0]
            need = req.context + min(self._system.reserved_tokens, req.output - req.emitted)
            if need > self._allocatable():
                return
            self.kv_tokens += req.context
            self.ready.append(self.retracted.pop(0))

    def _allocatable(self) -> int:
        """Tokens that may be given away: free, less what the active may still grow by."""
        active = len(self.running) + self.in_flight + len(self.ready)
        free = self._system.decode_kv_tokens - self.kv_tokens
        return free - active * self._system.reserved_tokens

    def _reserve(self) -> None:
        if not self.asking:
            return
        room = self._allocatable()
        keep = self._system.reserved_tokens
        slots = self._system.max_running - len(self.running) - self.in_flight - len(self.ready)
        kept = most = len(self.asking)
        if self._policy.gate:
            kept, most = self._plan(self._system.max_running - slots)
        else:
            self._sort(self.asking)
        count = 0
        for req in self.asking:
            grown = req.prompt + min(req.output, CLIP_TOKENS) - self._context
            if count >= min(slots, most) or max(req.prompt + keep, grown) > room:
                break
            room -= req.prompt + keep
            count += 1
        admitted, self.asking = self.asking[:count], self.asking[count:]
        for place, req in enumerate(admitted):
            self.kv_tokens += req.prompt
            self.in_flight += 1
            if self._policy.gate:
                self._let_in(req, place < kept)
            self._reserved(req)

    def _plan(self, used_slots: int) -> tuple[int, int]:
        """Orders the queue as `engine/admission.py` does: how many are kept, how many come in."""
        now, config, system = self._clock.now_s, self._policy.config, self._system
        queue, running = self.asking, self._table[:, : len(self.running)]
        self._starving = None
        prompt = np.array([req.prompt for req in queue], float)
        growth = [max(system.reserved_tokens, min(req.output, CLIP_TOKENS)) for req in queue]
        least_kv = prompt + np.array(growth, float)
        can = least_kv <= system.decode_kv_tokens
        oldest = min(compress(queue, can), key=lambda req: req.arrival_s, default=queue[0])
        if now - oldest.arrival_s > config.max_wait * oldest.ttft_s and self._share.may_spend():
            self._starving = oldest
        joining = [req for req in (*self._coming, *self.ready) if req not in self._unkept]
        kept = running[:, running[SERVED] > 0.0]
        lead = kept[FIRST_S] + (kept[EMITTED] - 1.0) * kept[TPOT_S] - now
        joining_tpot = [req.tpot_s for req in joining]
        due = np.array([req.due_s for req in queue]) - now
        tpot = np.array([req.tpot_s for req in queue])
        clock = self._clock_left(queue)
        horizon = horizon_of(self._stay.output_tokens)
        pace = pace_s(lead, kept[TPOT_S], self._reserve_tokens(), horizon)
        plan = plan_admission(
            Waiting(
                prompt,
                due,
                self._stay.lead_s(prompt),
                self._stay.lead_s(prompt, BEST),
                np.array([req.ttft_s for req in queue]),
                tpot,
                starving=np.array([req is self._starving for req in queue]),
                clock=clock if clock.min() <= PRESSED else None,
                least_kv=None if can.all() else least_kv,
            ),
            Occupancy(
                np.append(kept[CONTEXT], [req.context for req in joining]),
                np.append(np.minimum(pace, kept[TPOT_S]), joining_tpot),
                system.decode_kv_tokens,
                system.max_running,
                self.kv_tokens,
                used_slots,
            ),
            self._predictor.decode_step(0.0),
            expected_output=self._stay.output_tokens,
            min_throughput=config.min_throughput,
        )
        self.asking = [queue[index] for index in plan.order]
        return plan.kept, plan.count

    def _let_in(self, req: SimRequest, kept: bool) -> None:
        self._coming[req] = self._clock.now_s
        if not kept:
            self._unkept.add(req)
        self._share.earn(req.prompt)
        if req is self._starving:
            self._share.spend(req.prompt)

    def _clock_left(self, queue: list[SimRequest]) -> NDArray[np.float64]:
        arrival = np.array([req.arrival_s for req in queue])
        return np.clip(1.0 - (self._clock.now_s - arrival) / GIVE_UP_S, 0.0, 1.0)

    def _sort(self, queue: list[SimRequest]) -> None:
        """Kairos: `deadline_order`, as `engine/decode.py` without the gate."""
        if len(queue) < 2:
            return
        if self._policy.by_deadline:
            now = self._clock.now_s
            due, prompt = [req.due_s - now for req in queue], [float(req.prompt) for req in queue]
            clock = self._clock_left(queue) if queue is self.asking else None
            queue[:] = [queue[index] for index in deadline_order(due, prompt, clock)]
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
        """SGLang: the fewest output tokens go first and, among those, the longest prompt."""
        table, count = self._table, len(self.running)
        for index, req in enumerate(self.running):
            req.emitted = int(table[EMITTED, index])
        if self._policy.park:
            due = table[FIRST_S, :count] + (table[EMITTED, :count] - 1.0) * table[TPOT_S, :count]
            lead = due - self._clock.now_s
            order = keep_order(lead, table[TPOT_S, :count], table[CONTEXT, :count])
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

    def _reserve_tokens(self) -> float:
        return reserve_of(self._predictor.decode_error)

    def _choose(self) -> list[int] | None:
        """Indices of the running requests that take part, None for everybody."""
        count, config = len(self.running), self._policy.config
        if count < 2:
            return None
        step: Any = self._predictor.decode_step(0.0)
        reserve, horizon = self._reserve_tokens(), horizon_of(self._stay.output_tokens)
        room = room_s(self._tightest_s, reserve, horizon)
        if float(step(count, float(self._context))) <= room:
            return None
        table, now = self._table[:, :count], self._clock.now_s
        choice = choose_step(
            table[FIRST_S] + table[EMITTED] * table[TPOT_S] - now,
            table[TPOT_S],
            table[CONTEXT],
            now - table[LAST_S],
            step,
            served=table[SERVED] > 0.0,
            reserve_tokens=reserve,
            horizon_tokens=horizon,
            min_throughput=config.min_throughput,
            max_itl_s=config.max_itl_ms / 1e3,
        )
        table[SERVED] = choice.served
        self.counters[f"steps_{choice.reason}"] += 1
        return None if len(choice.run) == count else choice.run
