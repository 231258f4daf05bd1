"""Reserves KV on a decode server: applies the planner's answer to SGLang's queues."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.engine import compat
from sglang_kairos.engine.state.decision_log import plain
from sglang_kairos.engine.state.running_table import memory_of, tell_breaker
from sglang_kairos.engine.state.scheduler_state import KairosState
from sglang_kairos.policy.admission import AdmissionPlan, Occupancy, QueueView
from sglang_kairos.slo.limits import RequestLimits


def reserve(state: KairosState, original: Callable[..., Any], queue: Any) -> Any:
    """Runs SGLang's pop_preallocated on the first of its queue, as many as the planner admits."""
    # Ask first which requests are ready: a plan that counts on others would wait for them.
    asked = not all(map(_ready, queue.queue))
    if asked:
        _hear(queue)
    decide = functools.partial(_plan, state, queue)
    plan: AdmissionPlan | None = state.agree(state.guarded("admission", decide, None))
    if plan is None:
        return original(queue)
    entries = [queue.queue[index] for index in plan.order]
    first = set(map(id, entries[: plan.kept]))
    starving = queue.queue[plan.starving] if plan.starving >= 0 else None
    queue.queue[:] = entries
    if plan.count == len(entries):
        result = original(queue)
    else:
        # Requests that are held back must still see their hand-shakes and failures.
        if not asked:
            _hear(queue)
        through = {entry.req.rid for entry in entries[: plan.count]}
        through.update(e.req.rid for e in entries if e.req.finished_reason is not None)
        state.counters["held_back"] += sum(map(_ready, entries[plan.count :]))
        result = original(queue, rids_to_check=through)
    now, planner = state.now(), memory_of(state).planner
    for entry in result[0]:
        promise = state.promise(entry.req)
        promise.kept, promise.reserved_s = id(entry) in first, now
        planner.let_in(len(entry.req.origin_input_ids), entry is starving)
    return result


def sort(state: KairosState, entries: list[Any], preallocation: Any = None) -> None:
    """Sorts by deadline: SGLang's waiting queue, or the entries of the pre-allocation queue given."""
    if len(entries) < 2:
        return

    def decide() -> list[int]:
        if preallocation is None:
            view = _queue_view(state, entries, state.now())
        else:
            view = _asking(state, preallocation, state.now())
        return memory_of(state).planner.order(view)

    order = state.agree(state.guarded("order", decide, None))
    if order is not None:
        entries[:] = [entries[index] for index in order]


def note_starts(state: KairosState, ready: list[Any]) -> None:
    """The KV of these has arrived; their first tokens go out as soon as they get a slot."""
    statistics, now = memory_of(state).planner.statistics, state.now()
    for req in ready:
        promise = state.promise(req)
        if promise.reserved_s is not None:
            statistics.started(len(req.origin_input_ids), now - promise.reserved_s)
        promise.reserved_s = promise.ready_s = None


def end_what_never_fits(state: KairosState, queue: Any) -> None:
    """Refuses requests whose prompt and reserve exceed all KV there is, with a 400.

    SGLang never reserves KV for such a request, and never ends it. Routers and the server's
    middleware refuse what they can count, but a text is counted in tokens only here. SGLang's loop
    then answers and drops it.
    """
    if getattr(state.scheduler, "enable_hisparse", False):
        return  # its KV may lie on the host
    longest = None
    for entry in queue.queue:
        req = entry.req
        if req.finished_reason is not None or state.promise(req).fits:
            continue
        if longest is None:
            longest = RequestLimits(
                kv_tokens=int(state.scheduler.max_total_num_tokens),
                reserved_tokens=getattr(queue, "num_reserved_decode_tokens", 0),
                page_tokens=getattr(state.scheduler, "page_size", 1) or 1,
            ).longest_prompt
        tokens = len(req.origin_input_ids)
        fits = state.promise(req).fits = longest is None or tokens <= longest
        if not fits:
            _refuse(
                req, f"the prompt has {tokens} tokens, this decode server holds at most {longest}"
            )
            state.counters["never_fit"] += 1


def _refuse(req: Any, text: str) -> None:
    from sglang.srt.disaggregation.utils import prepare_abort

    prepare_abort(req, text, status_code=HTTPStatus.BAD_REQUEST)


def _ready(entry: Any) -> bool:
    """Returns whether it has shaken hands; where prefill computes before that, its KV waits there."""
    return bool(getattr(entry, "waiting_for_input", True))


def _hear(queue: Any) -> None:
    queue._resolve_pending_reqs()
    queue._update_handshake_waiters()


def _plan(state: KairosState, queue: Any) -> AdmissionPlan:
    memory, now, batch = memory_of(state), state.now(), state.scheduler.running_batch
    memory.follow(batch.reqs)
    asking, running = _asking(state, queue, now), memory.view(batch, now)
    server = _occupancy(state, queue)
    plan = memory.planner.admit(asking, running, server, state.step_time)
    tell_breaker(state, memory.planner.breaker)
    if state.logging:
        views = {"queue": asking, "running": running, "server": server}
        state.record("admit", **{name: plain(view) for name, view in views.items()}, **asdict(plan))
    return plan


def _queue_view(state: KairosState, reqs: list[Any], now: float, **more: Any) -> QueueView:
    promises = [state.promise(req) for req in reqs]
    return QueueView(
        now,
        np.array([promise.arrival_s for promise in promises]),
        np.array([promise.slo.ttft_ms for promise in promises]) / 1e3,
        np.array([promise.slo.tpot_ms for promise in promises]) / 1e3,
        np.array([len(req.origin_input_ids) for req in reqs], float),
        weight=np.array([promise.slo.weight for promise in promises]),
        **more,
    )


def _asking(state: KairosState, queue: Any, now: float) -> QueueView:
    """Returns the view of the pre-allocation queue."""
    entries = queue.queue
    reqs = [entry.req for entry in entries]
    return _queue_view(
        state,
        reqs,
        now,
        clock_s=clock_s(state, queue, now),
        ready=np.array([_ready(entry) for entry in entries], bool),
        growth_tokens=np.array([compat.least_growth(queue, req) for req in reqs], float),
    )


def clock_s(state: KairosState, queue: Any, now: float) -> NDArray[np.float64]:
    """Returns when SGLang's time-out of each entry began, in seconds, (n,); `now`: it has none yet.

    Prefill's time-out starts when the request reaches prefill, which is when it reaches decode. It
    stops when decode's reservation reaches prefill. Where decode reserves only after the prefill,
    both sides' time-outs start anew at its end. A retracted request that will be prefilled again
    has none before its reservation.
    """
    deferred = compat.reserves_after_prefill(queue)

    def began_s(entry: Any) -> float:
        if getattr(entry, "is_rebootstrap", False):
            return now
        if not deferred:
            return entry.req.time_stats.scheduler_recv_time or now
        if not _ready(entry):
            return now
        promise = state.promise(entry.req)
        if promise.ready_s is None:
            promise.ready_s = now
        return promise.ready_s

    return np.array([began_s(entry) for entry in queue.queue])


def _occupancy(state: KairosState, queue: Any) -> Occupancy:
    scheduler = state.scheduler
    joining = [entry.req for entry in queue.transfer_queue.queue] + list(scheduler.waiting_queue)
    kept = [req for req in joining if state.promise(req).kept]
    size = float(scheduler.max_total_num_tokens)
    return Occupancy(
        # A request that comes back from retraction brings its output.
        np.array([len(req.origin_input_ids) + max(0, len(req.output_ids) - 1) for req in kept]),
        np.array([state.promise(req).slo.tpot_ms / 1e3 for req in kept]),
        size,
        min(scheduler.req_to_token_pool.size, scheduler.max_running_requests),
        size - scheduler.token_to_kv_pool_allocator.available_size(),
        len(scheduler.running_batch.reqs) + len(joining),
    )
