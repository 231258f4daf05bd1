"""Which waiting requests a decode server reserves KV for, so that all it admits meet their TPOT.

Why choose it: waiting for KV costs nothing until the first token is due. Running behind the TPOT
target costs with every token. So a request that would make steps too long for those running waits.

Formula. All arrays have shape (n,), one entry per waiting request; times are in seconds.
    share_i = max(cost_i / (tpot_i - base), prompt_i / KV capacity, 1 / slots)
    work_i  = share_i * expected output tokens * tpot_i     time the server would be its alone
`cost` and `base` come from `policy.load`. The order is Moore-Hodgson's on (work, latest start): as
many requests in time as possible, late ones last, shortest first (`policy.urgency`). In that order
requests are *sustained*, which means admitted to run at their TPOT target, while
    base / min tpot + sum of cost / tpot over the running and the sustained <= TARGET

Exceptions to that gate:
- Last call. While less than PLENTY of the memory is in use, shutting others out saves nothing. A
  request that would else miss its first token is admitted and may be parked (`policy.packing`).
- Out of reach. A request whose TPOT target is shorter than a step of its own is admitted likewise,
  at once. When no target is within reach, there is no gate.
- Throughput. Enough requests are admitted for `min_throughput` times the tokens per second that
  admitting everybody who fits would make.

Two rules come first, because breaking them loses a request instead of making it late:
- Time-out. SGLang gives up a request that waits too long. A request that has used half of that time
  (*pressed*) goes first, least time left first, whatever the load. Where memory is short, nobody
  passes it, as in stock SGLang. A request whose time is up may be lost already and goes behind the
  other pressed ones.
- No circular wait between the KV of prefill and of decode. Only requests that are `ready`, which
  can be reserved at this moment, are planned. With ``prefill_complete`` prefill computes first and
  asks then: ready means that the computed KV waits there. A place held for a request that still
  needs KV on prefill would wait for those very requests. `policy.standstill` ends the other
  circular wait, of requests that prefill computed before decode had reserved for them.

Starvation: the host names one request that has waited too long (`starving`), and it goes first.
`LateShare` bounds how often. Trade-off: under lasting overload, requests with heavy contexts wait
longest, since the number in time is what is maximised.

Source: our own design. The constants were chosen in simulation; results are flat around them
(docs/decode.md).
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
    """The requests that wait for KV or for a slot: columns of shape (n,), in tokens and seconds.

    All times are of one clock of the caller's choice. `clock_s`: when SGLang's time-out of each
    began, `now_s` where it has not begun; None where there is none. `weight`: that of the SLO
    class, None when all are equal. `ready`: which requests can be reserved now, None for all.
    `growth_tokens`: tokens that must be free beside the prompt before an empty server takes it,
    None for none.
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
        """Seconds left until the first token is due, (n,)."""
        return self.arrival_s + self.ttft_s - self.now_s

    @property
    def places(self) -> NDArray[np.intp]:
        """Indices of the requests that are ready."""
        if self.ready is None:
            return np.arange(len(self.prompt_tokens))
        return np.flatnonzero(self.ready)

    def never_fits(self, kv_tokens: float) -> NDArray[np.bool_]:
        """Mask (n,) of the requests that a server with `kv_tokens` of KV can never take."""
        growth = 0.0 if self.growth_tokens is None else self.growth_tokens
        return self.prompt_tokens + growth > kv_tokens


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a decode server holds and how much it could hold.

    `context_tokens`, `tpot_s` (m,): of the sustained requests that run, are in transfer or are
    about to join. `kv_tokens`, `slots`: capacity. `used_tokens`, `used_slots`: in use by any
    request.
    """

    context_tokens: Array
    tpot_s: Array
    kv_tokens: float
    slots: int
    used_tokens: float
    used_slots: int


@dataclass(frozen=True, slots=True)
class AdmissionPlan:
    """The order in which to admit, and how many.

    `order`: all indices, first to admit first. The first `count` may be admitted now; the first
    `sustained` of these can be held to their TPOT target. `starving`: index of the request that
    goes first because it has waited too long, -1 for none.
    """

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
    """Returns the order of the queue and how many to admit; at least one if the server is empty.

    Requests that are not ready stand behind all others, as they came, and are not counted.
    `starving`: index of a request that is entitled to go first, -1 for none. `clock` (n,): the part
    of SGLang's time-out that is left, from 1 to 0; None where there is no time-out.
    `min_throughput`: a fraction from 0 to 1.
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
    """Returns all indices for when there is no gate: pressed by time left, the others by deadline.

    Requests that are late already go last, shortest prompt first. Ties fall to the lower index.
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
    """The sort key of pressed requests: one whose time is up may be lost already, and goes last."""
    return np.where(clock > 0.0, clock, 1.0)


def _least_count(prompt: Array, server: Occupancy, step_s: StepTime, min_throughput: float) -> int:
    """Returns how many to admit, in this order, to reach `min_throughput`."""
    batch = server.used_slots + np.arange(prompt.size + 1)
    tokens = server.used_tokens + np.append(0.0, np.cumsum(prompt))
    fit = np.flatnonzero((batch <= server.slots) & (tokens <= server.kv_tokens))
    if fit.size == 0:
        return 0
    batch, tokens = np.maximum(batch[fit], 1), tokens[fit]
    rate = batch / step_s(batch, tokens)
    return int(np.argmax(rate >= min_throughput * rate[-1]))
