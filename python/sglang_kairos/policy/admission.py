"""Who gets KV on a decode server, and so may start to prefill: the ones that can be kept on pace.

All arrays have shape (n,), one entry per waiting request; times in seconds.
    share_i = the largest of  cost_i / (tpot_i - base),  its part of the KV cache, and of the slots
    work_i  = share_i * expected output tokens * tpot_i       how long the server would be his alone

Waiting here costs nothing until the first token is due; running behind one's TPOT costs with every
token. So whoever would make the steps too long for those running waits. The order is Moore-
Hodgson's on (work, latest start): as many in time as possible, late ones last, shortest first. In
that order they are *kept*, admitted to run at their TPOT, while
    base / min tpot + sum of cost / tpot over the committed and the kept <= TARGET
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
  (``prefill_complete``), ready means that its KV waits there; a place kept for somebody who still
  needs room on prefill would wait for those very requests. The other such wait, of requests that
  prefill computed before it was asked to, ends on the prefill server (`policy.standstill`).
Our own design. Constants: chosen in simulation, flat around these values (docs/decode.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.load import Floats, StepTime, step_costs, within_reach
from sglang_kairos.policy.urgency import Mask, urgency_order

TARGET = 0.99
PLENTY = 0.8
LAST_CALL = 0.3
PRESSED = 0.5


@dataclass(frozen=True, slots=True)
class Waiting:
    """The queue. `due_s`: time left until the first token is due; `ttft_s`: what it was at arrival;
    `lead_s`: time from the reservation of KV to the first token, `least_lead_s` when all goes well:
    only whom that leaves no time is late. `starving`: entitled to go first. `clock`: the part of
    SGLang's time-out that is left, 1 to 0. `ready`: who can be reserved now, if not all. `least_kv`:
    tokens without which not even an empty server takes it; whom it can never take goes last.
    """

    prompt_tokens: Floats
    due_s: Floats
    lead_s: Floats
    least_lead_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    weight: Floats | None = None
    starving: Mask | None = None
    clock: Floats | None = None
    ready: Mask | None = None
    least_kv: Floats | None = None

    def only(self, places: NDArray[np.intp]) -> Waiting:
        """These of the queue, all of them ready."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        columns: dict[str, Any] = {
            name: np.asarray(column)[places]
            for name, column in given.items()
            if column is not None and name != "ready"
        }
        return Waiting(**columns)


@dataclass(frozen=True, slots=True)
class Occupancy:
    """A decode server. `context_tokens`, `tpot_s` (m,): of the kept, be they running, in transfer or
    about to join. `kv_tokens`, `slots`: what it has; `used_tokens`, `used_slots`: by whomever."""

    context_tokens: Floats
    tpot_s: Floats
    kv_tokens: float
    slots: int
    used_tokens: float
    used_slots: int


@dataclass(frozen=True, slots=True)
class AdmissionPlan:
    """`order`: all indices, first come first. The first `count` may come in now, and the first
    `kept` of these can be kept on pace. `starving`: who goes first as it has waited too long, -1:
    nobody."""

    order: list[int]
    kept: int
    count: int
    starving: int = -1


def plan_admission(
    waiting: Waiting,
    server: Occupancy,
    step_s: StepTime,
    *,
    expected_output: float,
    min_throughput: float = 0.0,
) -> AdmissionPlan:
    """Order of the queue and how many of it may come in; somebody if the server keeps nobody.

    Those who are not ready stand behind all others, as they came, and are not counted.
    `expected_output`: tokens, the mean of recent requests (lengths are not known before the end).
    `min_throughput`: 0 to 1.
    """
    ready = None if waiting.ready is None else np.asarray(waiting.ready, bool)
    if ready is None or ready.all():
        return _plan(waiting, server, step_s, expected_output, min_throughput)
    here = np.flatnonzero(ready)
    plan = _plan(waiting.only(here), server, step_s, expected_output, min_throughput)
    order = [*here[plan.order].tolist(), *np.flatnonzero(~ready).tolist()]
    return AdmissionPlan(order, plan.kept, plan.count)


def deadline_order(due_s: Floats, prompt_tokens: Floats, clock: Floats | None = None) -> list[int]:
    """All indices where there is no gate: pressed ones by their clock, then by deadline, late last.

    Those late already go shortest prompt first. Ties fall to the lower index.
    """
    due = _floats(due_s)
    late = due <= 0.0
    group, key = late.astype(int), np.where(late, _floats(prompt_tokens), due)
    if clock is not None:
        pressed = _floats(clock) <= PRESSED
        group, key = np.where(pressed, -1, group), np.where(pressed, _time_left(clock), key)
    order: list[int] = np.lexsort((key, group)).tolist()
    return order


def _plan(
    waiting: Waiting,
    server: Occupancy,
    step_s: StepTime,
    expected_output: float,
    min_throughput: float,
) -> AdmissionPlan:
    prompt, tpot = np.asarray(waiting.prompt_tokens, float), np.asarray(waiting.tpot_s, float)
    if prompt.size == 0:
        return AdmissionPlan([], 0, 0)
    due = np.asarray(waiting.due_s, float)
    start_by = due - np.asarray(waiting.lead_s, float)
    held, held_tpot = np.asarray(server.context_tokens, float), np.asarray(server.tpot_s, float)
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
    work = share * expected_output * tpot
    hopeful = due - np.asarray(waiting.least_lead_s, float)
    latest_end = np.where(hopeful > 0.0, hopeful + work, -1.0)
    nobody = np.zeros(prompt.size, bool)
    never = nobody if waiting.least_kv is None else _floats(waiting.least_kv) > server.kv_tokens
    starving = nobody if waiting.starving is None else np.asarray(waiting.starving, bool) & ~never
    clock = None if waiting.clock is None else _floats(waiting.clock)
    pressed = nobody if clock is None else (clock <= PRESSED) & ~never
    order = np.asarray(urgency_order(work, latest_end, waiting.weight, starving).order, np.intp)
    may_be_kept = (reach | starving | pressed) & ~never
    group = np.where(never, 2, np.where(may_be_kept | (not gated), 0, 1))
    if clock is None:
        order = order[np.argsort(group[order], kind="stable")]
    else:
        left = np.where(pressed, _time_left(clock), 0.0)
        order = order[np.lexsort((left[order], np.where(pressed, -1, group)[order]))]
    if not gated:
        return AdmissionPlan(order.tolist(), 0, order.size)

    load = base / tightest + float((held_cost / held_tpot).sum())
    loads = np.where(may_be_kept, cost / tpot, np.inf)[order]
    kept = int(np.count_nonzero(load + loads.cumsum() <= TARGET))
    if held.size == 0:
        kept = max(1, kept)
    rest = order[kept:]
    called = (due[rest] > 0.0) & (
        start_by[rest] <= LAST_CALL * np.asarray(waiting.ttft_s, float)[rest]
    )
    called |= ~reach[rest] | pressed[rest]
    tokens = server.used_tokens + prompt[order[:kept]].sum()
    called &= tokens + np.cumsum(np.where(called, prompt[rest], 0.0)) <= PLENTY * server.kv_tokens
    called &= server.used_slots + kept + np.cumsum(called) <= PLENTY * server.slots
    called |= pressed[rest]
    final = [*order[:kept].tolist(), *rest[called].tolist(), *rest[~called].tolist()]
    count = kept + int(np.count_nonzero(called))
    if min_throughput > 0.0:
        count = max(count, _least_count(prompt[final], server, step_s, min_throughput))
    return AdmissionPlan(final, kept, count)


def _time_left(clock: Floats) -> NDArray[np.float64]:
    """What pressed ones are ordered by: whose time is up may be lost already, and goes behind."""
    left = _floats(clock)
    return np.where(left > 0.0, left, 1.0)


def _floats(values: Floats) -> NDArray[np.float64]:
    return np.asarray(values, float)


def _least_count(
    prompt: NDArray[np.float64], server: Occupancy, step_s: StepTime, min_throughput: float
) -> int:
    """How many must come in, in this order, for that share of the tokens/s with all that fit."""
    batch = server.used_slots + np.arange(prompt.size + 1)
    tokens = server.used_tokens + np.append(0.0, np.cumsum(prompt))
    fit = np.flatnonzero((batch <= server.slots) & (tokens <= server.kv_tokens))
    if fit.size == 0:
        return 0
    batch, tokens = np.maximum(batch[fit], 1), tokens[fit]
    rate = batch / step_s(batch, tokens)
    return int(np.argmax(rate >= min_throughput * rate[-1]))
