"""Who gets KV on a decode server, and so may start to prefill: the ones that can be sustained on pace.

All arrays have shape (n,), one entry per waiting request; times in seconds.
    share_i = the largest of  cost_i / (tpot_i - base),  its part of the KV cache, and of the slots
    work_i  = share_i * expected output tokens * tpot_i       how long the server would be his alone

Waiting here costs nothing until the first token is due; running behind one's TPOT costs with every
token. So whoever would make the steps too long for those running waits. The order is Moore-
Hodgson's on (work, latest start): as many in time as possible, late ones last, shortest first. In
that order they are *sustained*, admitted to run at their TPOT, while
    base / min tpot + sum of cost / tpot over the committed and the sustained <= TARGET
(`load`). While memory is plentiful, shutting others out saves nothing: who would else miss its
first token is let in too, to be parked until there is room for it (`packing`). So is, at once, whose
TPOT target is out of reach: shorter than a step of its own. Where nobody's is within reach, there is
no gate. And as many are let in as it takes to make `min_throughput` times the tokens per second of
a server that lets in all it has memory for.

Two things come before all of that, because a request is lost otherwise, not late:
- *The clock.* SGLang gives a request up that waits too long. Whoever has used up half of that time
  (*pressed*) goes first, least time left first, and is let in whatever the load; where memory is
  short nobody passes it, as in stock. Whose time is up, which may be lost already, goes behind it.
- *No circular wait between prefill's and decode's memory.* Only requests that are `ready`, that
  could be reserved this moment, are planned. Where prefill computes first and asks then
  (``prefill_complete``), ready means that its KV waits there; a place sustained for somebody who still
  needs room on prefill would wait for those very requests. The other such wait, of requests that
  prefill computed before it was asked to, ends on the prefill server (`policy.standstill`).
Our own design. Constants: chosen in simulation, flat around these values (docs/decode.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.load import Array, StepTime, step_costs, within_reach
from sglang_kairos.policy.urgency import urgency_order
from sglang_kairos.predict.request_statistics import BEST, RequestStatistics

TARGET = 0.99
PLENTY = 0.8
LAST_CALL = 0.3
PRESSED = 0.5


@dataclass(frozen=True, slots=True)
class QueueView:
    """Who waits, for KV or for a slot. Columns (n,), seconds of any one clock, tokens.

    `clock_s`: when SGLang's time-out of it began, `now_s` if it has not; None: it has none here.
    `weight`: of its SLO class, None where all are equal. `ready`: who can be reserved now, None for
    all. `growth_tokens`: that must be free beside its prompt before an empty server takes it, None
    for none.
    """

    now_s: float
    arrival_s: Array
    ttft_s: Array
    tpot_s: Array
    prompt_tokens: Array
    clock_s: Array | None = None
    weight: Array | None = None
    ready: NDArray[np.bool_] | None = None
    growth_tokens: Array | None = None

    @property
    def due_s(self) -> Array:
        """Time left until the first token is due, (n,)."""
        return self.arrival_s + self.ttft_s - self.now_s

    @property
    def places(self) -> NDArray[np.intp]:
        """Indices of who is ready."""
        if self.ready is None:
            return np.arange(len(self.prompt_tokens))
        return np.flatnonzero(self.ready)

    def never_fits(self, kv_tokens: float) -> NDArray[np.bool_]:
        """Whom a server of this size can never take, (n,)."""
        growth = 0.0 if self.growth_tokens is None else self.growth_tokens
        return self.prompt_tokens + growth > kv_tokens


@dataclass(frozen=True, slots=True)
class Occupancy:
    """A decode server. `context_tokens`, `tpot_s` (m,): of the sustained, be they running, in transfer or
    about to join. `kv_tokens`, `slots`: what it has; `used_tokens`, `used_slots`: by whomever."""

    context_tokens: Array
    tpot_s: Array
    kv_tokens: float
    slots: int
    used_tokens: float
    used_slots: int


@dataclass(frozen=True, slots=True)
class AdmissionPlan:
    """`order`: all indices, first come first. The first `count` may come in now, and the first
    `sustained` of these can be sustained on pace. `starving`: who goes first as it has waited too long, -1:
    nobody."""

    order: list[int]
    sustained: int
    count: int
    starving: int = -1


def plan_admission(
    queue: QueueView,
    server: Occupancy,
    step_s: StepTime,
    statistics: RequestStatistics,
    *,
    starving: int = -1,
    clock: Array | None = None,
    min_throughput: float = 0.0,
) -> AdmissionPlan:
    """Order of the queue and how many of it may come in; somebody if the server keeps nobody.

    Those who are not ready stand behind all others, as they came, and are not counted. `starving`:
    one that is entitled to go first. `clock` (n,): the part of SGLang's time-out that is left, 1 to
    0; None where nobody's matters. `min_throughput`: 0 to 1.
    """
    here = queue.places
    if here.size == 0:
        return AdmissionPlan(list(range(len(queue.prompt_tokens))), 0, 0)
    prompt, tpot, due = queue.prompt_tokens[here], queue.tpot_s[here], queue.due_s[here]
    held, held_tpot = server.context_tokens, server.tpot_s
    reach = within_reach(step_s, prompt, tpot)
    if reach is None:
        reach = np.ones(prompt.size, bool)
    gated = held.size > 0 or bool(reach.any())
    aimed_at = tpot if reach.all() or not gated else tpot[reach]
    tightest = float(min(held_tpot.min(initial=np.inf), aimed_at.min(initial=np.inf)))
    base, held_cost, cost = step_costs(step_s, held, tightest, prompt)
    free = np.maximum(tpot - base, 0.05 * tpot)
    memory = np.maximum(prompt / server.kv_tokens, 1.0 / server.slots)
    share = np.where(reach, np.maximum(cost / free, memory), memory)
    work = share * statistics.output_tokens * tpot
    hopeful = due - statistics.startup_s(prompt, BEST)
    latest_end = np.where(hopeful > 0.0, hopeful + work, -1.0)
    never = queue.never_fits(server.kv_tokens)[here]
    left = np.ones(here.size) if clock is None else clock[here]
    starves, pressed = (here == starving) & ~never, (left <= PRESSED) & ~never
    weight = None if queue.weight is None else queue.weight[here]
    first = starves if starving >= 0 else None
    order = np.asarray(urgency_order(work, latest_end, weight, first).order, np.intp)
    may_be_sustained = (reach | starves | pressed) & ~never
    group = np.where(never, 2, np.where(may_be_sustained | (not gated), 0, 1))
    if pressed.any():
        turn = np.where(pressed, _time_left(left), 0.0)
        order = order[np.lexsort((turn[order], np.where(pressed, -1, group)[order]))]
    else:
        order = order[group[order].argsort(kind="stable")]
    others = [] if queue.ready is None else np.flatnonzero(~queue.ready).tolist()
    if not gated:
        return AdmissionPlan([*here[order].tolist(), *others], 0, order.size, starving)

    load = base / tightest + float((held_cost / held_tpot).sum())
    loads = np.where(may_be_sustained, cost / tpot, np.inf)[order]
    sustained = int(np.count_nonzero(load + loads.cumsum() <= TARGET))
    if held.size == 0:
        sustained = max(1, sustained)
    rest = order[sustained:]
    start_by = due[rest] - statistics.startup_s(prompt[rest])
    called = (due[rest] > 0.0) & (start_by <= LAST_CALL * queue.ttft_s[here[rest]])
    called |= ~reach[rest] | pressed[rest]
    tokens = server.used_tokens + prompt[order[:sustained]].sum()
    called &= tokens + (called * prompt[rest]).cumsum() <= PLENTY * server.kv_tokens
    called &= server.used_slots + sustained + called.cumsum() <= PLENTY * server.slots
    called |= pressed[rest]
    final = np.concatenate((order[:sustained], rest[called], rest[~called]))
    count = sustained + int(np.count_nonzero(called))
    if min_throughput > 0.0:
        count = max(count, _least_count(prompt[final], server, step_s, min_throughput))
    return AdmissionPlan([*here[final].tolist(), *others], sustained, count, starving)


def deadline_order(queue: QueueView, clock: Array | None = None) -> list[int]:
    """All indices where there is no gate: pressed ones by their clock, then by deadline, late last.

    Those late already go shortest prompt first. Ties fall to the lower index.
    """
    due = queue.due_s
    late = due <= 0.0
    group, key = late.astype(int), np.where(late, queue.prompt_tokens, due)
    if clock is not None:
        pressed = clock <= PRESSED
        group, key = np.where(pressed, -1, group), np.where(pressed, _time_left(clock), key)
    order: list[int] = np.lexsort((key, group)).tolist()
    return order


def _time_left(clock: Array) -> Array:
    """What pressed ones are ordered by: whose time is up may be lost already, and goes behind."""
    return np.where(clock > 0.0, clock, 1.0)


def _least_count(prompt: Array, server: Occupancy, step_s: StepTime, min_throughput: float) -> int:
    """How many must come in, in this order, for that share of the tokens/s with all that fit."""
    batch = server.used_slots + np.arange(prompt.size + 1)
    tokens = server.used_tokens + np.append(0.0, np.cumsum(prompt))
    fit = np.flatnonzero((batch <= server.slots) & (tokens <= server.kv_tokens))
    if fit.size == 0:
        return 0
    batch, tokens = np.maximum(batch[fit], 1), tokens[fit]
    rate = batch / step_s(batch, tokens)
    return int(np.argmax(rate >= min_throughput * rate[-1]))
