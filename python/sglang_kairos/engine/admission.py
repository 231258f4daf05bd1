"""Whose KV a decode server reserves, and when: `policy.admission` on SGLang's pre-allocation queue."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.engine import compat
from sglang_kairos.engine.running import EMITTED, FIRST_S, SERVED, TPOT_S, memory_of
from sglang_kairos.engine.state import KairosState
from sglang_kairos.policy.admission import PRESSED, Occupancy, Waiting, plan_admission
from sglang_kairos.policy.packing import horizon_of, pace_s, reserve_of
from sglang_kairos.predict.stay import BEST
from sglang_kairos.request_checks import RequestLimits

# Order, kept and count of the plan; the index of the starving one or -1; how many were pressed.
Agreed = tuple[list[int], int, int, int, int]


def reserve(
    state: KairosState,
    original: Callable[..., Any],
    queue: Any,
    trusted: Callable[[], bool],
    otherwise: Callable[[], Any],
) -> Any:
    """Runs upstream's pop_preallocated on as many of its queue, in order, as the policy lets in.

    `otherwise` runs it where step times are not to be `trusted`. Ranks measure differently, so rank
    0 decides that as well.
    """
    # Who is ready is asked first: a plan that counts on others would wait for them (`policy`).
    asked = not all(map(_ready, queue.queue))
    if asked:
        _hear(queue)

    def decide() -> Agreed | None:
        return _plan(state, queue) if trusted() else None

    plan: Agreed | None = state.agree(state.guarded("admission", decide, None))
    if plan is None:
        return otherwise()
    order, kept, count, starving, pressed = plan
    state.counters["pressed"] += pressed
    entries = [queue.queue[index] for index in order]
    first = set(map(id, entries[:kept]))
    urgent = queue.queue[starving].req if starving >= 0 else None
    queue.queue[:] = entries
    if count == len(entries):
        result = original(queue)
    else:
        # Those held back must see their handshakes and failures as if nothing were the matter.
        if not asked:
            _hear(queue)
        through = {entry.req.rid for entry in entries[:count]}
        through.update(e.req.rid for e in entries if e.req.finished_reason is not None)
        state.counters["held_back"] += sum(map(_ready, entries[count:]))
        result = original(queue, rids_to_check=through)
    now = state.now()
    for entry in result[0]:
        req, tokens = entry.req, len(entry.req.origin_input_ids)
        promise = state.promise(req)
        promise.kept, promise.reserved_s = id(entry) in first, now
        state.late_share.earn(tokens)
        if req is urgent:
            state.late_share.spend(tokens)
    return result


def note_starts(state: KairosState, ready: list[Any]) -> None:
    """The KV of these has arrived; their first tokens go out as soon as they get a slot."""
    stay, now = memory_of(state).stay, state.now()
    for req in ready:
        promise = state.promise(req)
        if promise.reserved_s is not None:
            stay.started(len(req.origin_input_ids), now - promise.reserved_s)
        promise.reserved_s = promise.ready_s = None


def end_what_never_fits(state: KairosState, queue: Any) -> None:
    """Whose prompt and reserve exceed all KV there is, upstream never reserves, and never ends either.

    Routers and the server's middleware refuse what they can count; a text is counted only here.
    Upstream's loop then answers it with the 400 and drops it.
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
    """Whether it has shaken hands; where prefill computes before that, its KV waits there."""
    return bool(getattr(entry, "waiting_for_input", True))


def _hear(queue: Any) -> None:
    queue._resolve_pending_reqs()
    queue._update_handshake_waiters()


def _plan(state: KairosState, queue: Any) -> Agreed:
    scheduler, memory, now = state.scheduler, memory_of(state), state.now()
    memory.table.follow(scheduler.running_batch.reqs)
    reqs = [entry.req for entry in queue.queue]
    promises = [state.promise(req) for req in reqs]
    prompt = np.array([len(req.origin_input_ids) for req in reqs], float)
    ttft = np.array([promise.slo.ttft_ms for promise in promises]) / 1e3
    tpot = np.array([promise.slo.tpot_ms for promise in promises]) / 1e3
    weight = np.array([promise.slo.weight for promise in promises])
    due = np.array([promise.ttft_due_s for promise in promises]) - now
    ready = np.array([_ready(entry) for entry in queue.queue], bool)
    most = float(scheduler.max_total_num_tokens)
    least_kv = prompt + np.array([compat.least_growth(queue, req) for req in reqs], float)
    since = due - ttft
    eligible = np.where(ready & (least_kv <= most), since, np.inf)
    oldest = int(np.argmin(eligible))
    starved = -eligible[oldest] > state.config.max_wait * ttft[oldest]
    starving = oldest if starved and state.late_share.may_spend() else -1
    left = clock_left(state, queue, now)
    plan = plan_admission(
        Waiting(
            prompt,
            due,
            memory.stay.lead_s(prompt),
            memory.stay.lead_s(prompt, BEST),
            ttft,
            tpot,
            None if (weight == weight[0]).all() else weight,
            np.arange(len(reqs)) == starving,
            left if (pressed := int(np.count_nonzero(left[ready] <= PRESSED))) else None,
            ready,
            least_kv if least_kv.max() > most else None,
        ),
        _occupancy(state, queue, now),
        state.step_time.step_s,
        expected_output=memory.stay.output_tokens,
        min_throughput=state.config.min_throughput,
    )
    return plan.order, plan.kept, plan.count, starving, pressed


def clock_left(state: KairosState, queue: Any, now: float) -> NDArray[np.float64]:
    """The part of SGLang's time-out that each entry has left, 1 to 0.

    Prefill's clock starts when the request reaches prefill, which is when it reaches decode, and
    stops when decode's reservation reaches prefill. Where decode reserves only after the prefill,
    both sides' clocks start anew at its end. A retracted request that will be prefilled again has
    no clock before its reservation.
    """
    deferred = compat.reserves_after_prefill(queue)
    limit_s = memory_of(state).clock_s
    since = np.full(len(queue.queue), now)
    for place, entry in enumerate(queue.queue):
        if getattr(entry, "is_rebootstrap", False):
            continue
        if not deferred:
            since[place] = entry.req.time_stats.scheduler_recv_time or now
        elif _ready(entry):
            promise = state.promise(entry.req)
            since[place] = promise.ready_s = now if promise.ready_s is None else promise.ready_s
    return np.clip(1.0 - (now - since) / limit_s, 0.0, 1.0)


def _occupancy(state: KairosState, queue: Any, now: float) -> Occupancy:
    scheduler, columns = state.scheduler, memory_of(state).table.columns
    coming = [entry.req for entry in queue.transfer_queue.queue]
    joining = [*coming, *scheduler.waiting_queue]
    kept = [req for req in joining if state.promise(req).kept]
    batch = scheduler.running_batch
    context = batch.seq_lens_cpu.numpy() if batch.reqs else np.zeros(0)
    served = columns[SERVED] > 0.0
    first, tpot, emitted = columns[FIRST_S], columns[TPOT_S], columns[EMITTED]
    lead = first + (emitted - 1.0) * tpot - now
    reserve = reserve_of(state.step_time.error.mape)
    horizon = horizon_of(memory_of(state).stay.output_tokens)
    pace = np.minimum(pace_s(lead, tpot, reserve, horizon), tpot)
    size = float(scheduler.max_total_num_tokens)
    return Occupancy(
        np.append(context[served], [len(req.origin_input_ids) for req in kept]),
        np.append(pace[served], [state.promise(req).slo.tpot_ms / 1e3 for req in kept]),
        size,
        min(scheduler.req_to_token_pool.size, scheduler.max_running_requests),
        size - scheduler.token_to_kv_pool_allocator.available_size(),
        len(batch.reqs) + len(joining),
    )
