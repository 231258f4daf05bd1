"""Decides which waiting requests get KV on a decode server, and with it the right to prefill.

Why choose it: the first token of a waiting request has a deadline, but every token of a running one
has. So a request waits when the steps would become too long for those that run already. Stock
SGLang admits whatever fits into memory, and then everybody misses TPOT.

Formula. Arrays have shape (n,), one entry per waiting request. Times are in seconds.
    share_i = max(cost_i / (tpot_i - base), part of the KV cache, part of the slots)
    work_i  = share_i * expected output tokens * tpot_i     time for which it would fill the server
`base` and `cost_i` are the parts of a decode step (`load`). The order is Moore-Hodgson's on work
and latest start (`urgency`): as many in time as possible, late ones last, shortest first.
In that order requests are admitted *on pace*, to run at their TPOT, while
    base / min tpot + sum of cost / tpot over those on pace, running or admitted  <=  TARGET

Four kinds of request are admitted beyond that number. They run in the capacity that is left.
- One that would otherwise miss its first token, while KV and slots are used less than PLENTY. It
  may be parked later (`decode_step`).
- One whose TPOT target is shorter than a step of its own, under the same condition. Waiting cannot
  help it. If no target in the queue can be met, nobody is held back.
- As many as it takes to reach `min_throughput` times the tokens/s of a server that admits all.
- *Pressed* ones. SGLang aborts a request that waits too long for KV; one that has used up half of
  that time is pressed. The least time left goes first, whatever the load. Where memory is short
  nobody passes it, as in stock SGLang. One whose time is up may be lost already and goes behind.

No circular wait between prefill's and decode's memory: only `ready` requests are planned, those
that could be reserved now. With ``prefill_complete`` a request is ready when its KV waits on
prefill. KV set aside for one that still needs prefill's memory would wait for these very requests.
`policy.standstill` ends the other such wait, of requests prefilled before they had a reservation.

Trade-offs. Under overload, long requests wait longest. Three bounds keep them from starving: the
`starving` request goes first (``--kairos-max-wait``), pressed ones pass the gate, and an empty
server always admits one. A high `min_throughput` trades TPOT attainment for tokens/s.

Source: our own design. The constants were chosen in simulation, and results are flat around them
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
    """The requests that wait for KV or for a slot on a decode server.

    Columns have shape (n,). Times are seconds of any one clock, lengths are tokens.
    `clock_s`: when SGLang's time-out of each request began, `now_s` if it has not; None: no
    time-out. `weight`: weight of the SLO class; None: all are equal.
    `ready`: mask of the requests that could be reserved now; None: all.
    `growth_tokens`: KV that must be free beside the prompt before an empty server takes the
    request; None: none.
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
        """Returns the time left until each first token is due, in seconds, (n,); negative: late."""
        return self.arrival_s + self.ttft_s - self.now_s

    @property
    def places(self) -> NDArray[np.intp]:
        """Returns the indices of the requests that are ready."""
        if self.ready is None:
            return np.arange(len(self.prompt_tokens))
        return np.flatnonzero(self.ready)

    def never_fits(self, kv_tokens: float) -> NDArray[np.bool_]:
        """Returns the mask (n,) of the requests that a server with `kv_tokens` of KV can never take."""
        growth = 0.0 if self.growth_tokens is None else self.growth_tokens
        return self.prompt_tokens + growth > kv_tokens


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a decode server holds.

    `context_tokens`, `tpot_s` (m,): KV tokens and TPOT target of each request that is on pace:
    running, in transfer or about to join. `kv_tokens`, `slots`: capacity. `used_tokens`,
    `used_slots`: what is taken, by requests on pace and by all others.
    """

    context_tokens: Array
    tpot_s: Array
    kv_tokens: float
    slots: int
    used_tokens: float
    used_slots: int


@dataclass(frozen=True, slots=True)
class AdmissionPlan:
    """The order in which waiting requests get KV, and how many get it now.

    `order`: all indices, most urgent first. The first `count` may be admitted now. Of these the
    first `kept` can be kept on pace. `starving`: index that goes first because it waited too long;
    -1: none.
    """

    order: list[int]
    kept: int
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
    """Orders the queue and says how many requests may be admitted. At least one if nobody is on pace.

    Requests that are not ready come last, in the order of arrival, and are not counted.
    `step_s(batch, kv_tokens)`: predicted seconds of a decode step. `statistics`: of past
    requests. `starving`: index of the request that is entitled to go first; -1: none.
    `clock` (n,): share of SGLang's time-out that each request has left, 1 to 0; None: no time-outs.
    `min_throughput`: least tokens/s, as a fraction (0 to 1) of what admitting all would produce.
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
    may_be_kept = (reach | starves | pressed) & ~never
    group = np.where(never, 2, np.where(may_be_kept | (not gated), 0, 1))
    if pressed.any():
        turn = np.where(pressed, _time_left(left), 0.0)
        order = order[np.lexsort((turn[order], np.where(pressed, -1, group)[order]))]
    else:
        order = order[group[order].argsort(kind="stable")]
    others = [] if queue.ready is None else np.flatnonzero(~queue.ready).tolist()
    if not gated:
        return AdmissionPlan([*here[order].tolist(), *others], 0, order.size, starving)

    load = base / tightest + float((held_cost / held_tpot).sum())
    loads = np.where(may_be_kept, cost / tpot, np.inf)[order]
    kept = int(np.count_nonzero(load + loads.cumsum() <= TARGET))
    if held.size == 0:
        kept = max(1, kept)
    rest = order[kept:]
    start_by = due[rest] - statistics.startup_s(prompt[rest])
    called = (due[rest] > 0.0) & (start_by <= LAST_CALL * queue.ttft_s[here[rest]])
    called |= ~reach[rest] | pressed[rest]
    tokens = server.used_tokens + prompt[order[:kept]].sum()
    called &= tokens + (called * prompt[rest]).cumsum() <= PLENTY * server.kv_tokens
    called &= server.used_slots + kept + called.cumsum() <= PLENTY * server.slots
    called |= pressed[rest]
    final = np.concatenate((order[:kept], rest[called], rest[~called]))
    count = kept + int(np.count_nonzero(called))
    if min_throughput > 0.0:
        count = max(count, _least_count(prompt[final], server, step_s, min_throughput))
    return AdmissionPlan([*here[final].tolist(), *others], kept, count, starving)


def deadline_order(queue: QueueView, clock: Array | None = None) -> list[int]:
    """Orders all indices where nobody is held back: pressed ones, then by deadline, then late ones.

    Pressed ones go by time left on SGLang's time-out, late ones shortest prompt first. Ties fall to
    the lower index. `clock` is as in `plan_admission`.
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
    """Returns the sort key of pressed requests. Time up may mean lost already: such go behind."""
    return np.where(clock > 0.0, clock, 1.0)


def _least_count(prompt: Array, server: Occupancy, step_s: StepTime, min_throughput: float) -> int:
    """Returns how many to admit, in this order, for `min_throughput` of the full batch's rate."""
    batch = server.used_slots + np.arange(prompt.size + 1)
    tokens = server.used_tokens + np.append(0.0, np.cumsum(prompt))
    fit = np.flatnonzero((batch <= server.slots) & (tokens <= server.kv_tokens))
    if fit.size == 0:
        return 0
    batch, tokens = np.maximum(batch[fit], 1), tokens[fit]
    rate = batch / step_s(batch, tokens)
    return int(np.argmax(rate >= min_throughput * rate[-1]))
