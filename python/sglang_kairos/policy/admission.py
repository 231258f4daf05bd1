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
Our own design. Constants: chosen in simulation, flat around these values (docs/decode.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.load import Floats, StepTime, step_costs, within_reach
from sglang_kairos.policy.urgency import Mask, urgency_order

TARGET = 0.99
PLENTY = 0.8
LAST_CALL = 0.3


@dataclass(frozen=True, slots=True)
class Waiting:
    """The queue. `due_s`: time left until the first token is due; `ttft_s`: what it was at arrival;
    `lead_s`: time from the reservation of KV to the first token, `least_lead_s` when all goes well:
    only whom that leaves no time is late. `starving`: entitled to go first.
    """

    prompt_tokens: Floats
    due_s: Floats
    lead_s: Floats
    least_lead_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    weight: Floats | None = None
    starving: Mask | None = None


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
    `kept` of these can be kept on pace."""

    order: list[int]
    kept: int
    count: int


def plan_admission(
    waiting: Waiting,
    server: Occupancy,
    step_s: StepTime,
    *,
    expected_output: float,
    min_throughput: float = 0.0,
) -> AdmissionPlan:
    """Order of the queue and how many of it may come in; somebody if the server keeps nobody.

    `expected_output`: tokens, the mean of recent requests (lengths are not known before the end).
    `min_throughput`: 0 to 1.
    """
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
    aimed_at = np.append(held_tpot, tpot[reach] if gated else tpot)
    tightest = float(aimed_at.min())
    base, held_cost, cost = step_costs(step_s, held, tightest, prompt)
    free = np.maximum(tpot - base, 0.05 * tpot)
    memory = np.maximum(prompt / server.kv_tokens, 1.0 / server.slots)
    share = np.where(reach, np.maximum(cost / free, memory), memory)
    work = share * expected_output * tpot
    hopeful = due - np.asarray(waiting.least_lead_s, float)
    latest_end = np.where(hopeful > 0.0, hopeful + work, -1.0)
    urgency = urgency_order(work, latest_end, waiting.weight, waiting.starving)
    order = np.asarray(urgency.order, np.intp)
    if not gated:
        return AdmissionPlan(order.tolist(), 0, order.size)
    may_be_kept = reach
    if waiting.starving is not None:
        may_be_kept = reach | np.asarray(waiting.starving, bool)
    order = order[np.argsort(~may_be_kept[order], kind="stable")]

    load = base / tightest + float((held_cost / held_tpot).sum())
    loads = np.where(may_be_kept, cost / tpot, np.inf)[order]
    kept = int(np.count_nonzero(load + np.cumsum(loads) <= TARGET))
    if held.size == 0:
        kept = max(1, kept)
    rest = order[kept:]
    called = (due[rest] > 0.0) & (
        start_by[rest] <= LAST_CALL * np.asarray(waiting.ttft_s, float)[rest]
    )
    called |= ~reach[rest]
    tokens = server.used_tokens + prompt[order[:kept]].sum()
    called &= tokens + np.cumsum(np.where(called, prompt[rest], 0.0)) <= PLENTY * server.kv_tokens
    called &= server.used_slots + kept + np.cumsum(called) <= PLENTY * server.slots
    final = [*order[:kept].tolist(), *rest[called].tolist(), *rest[~called].tolist()]
    count = kept + int(np.count_nonzero(called))
    if min_throughput > 0.0:
        count = max(count, _least_count(prompt[final], server, step_s, min_throughput))
    return AdmissionPlan(final, kept, count)


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
