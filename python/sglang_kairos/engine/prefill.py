"""The prefill side of the glue: plan by urgency, order, pause and resume chunked prefills.

A pause is only ever made around `Scheduler.get_new_batch_prefill`: there the finished chunk's KV is
already in the cache with its node locked, its send boundary is set, and `Scheduler.chunked_req` can
be swapped without anyone noticing. Everything that looks for `chunked_req` elsewhere (aborts, idle
checks, load reports) has a seam below.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_kairos.engine.state import KairosState, Paused, Promise, current
from sglang_kairos.policy.urgency import PrefillPlan, PrefillQueue, plan_prefill, urgency_order

# Matching a prompt against the radix cache walks the prompt: not every request at every step.
REMATCH_EVERY_PLANS = 16
REMATCH_ALL_BELOW = 32

# A plan as ranks exchange it: order, slot, chunk limit, held back (see PrefillPlan).
Step = tuple[list[int], int, int | None, list[int]]


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Seam of Scheduler.get_new_batch_prefill: decide who runs, then let upstream build the batch."""
    state = current()
    if state is None or state.mode != "prefill" or not state.config.order:
        return original(scheduler, running_batch)
    _learn_from_synchronous_step(state)
    for req in scheduler.waiting_queue:
        state.promise(req)
    result = _planned_batch(original, state, scheduler, running_batch)
    state.launched = result.batch_to_run
    return result


def _planned_batch(
    original: Callable[..., Any], state: KairosState, scheduler: Any, running_batch: Any
) -> Any:
    if not scheduler.waiting_queue and not state.paused:
        # Alone in the chunk slot, or nothing at all: upstream does the right thing.
        state.plan = None
        return original(scheduler, running_batch)
    held = _apply_plan(state, scheduler)
    try:
        result = original(scheduler, running_batch)
        if result.batch_to_run is None and scheduler.chunked_req is None and state.paused:
            # Nothing could be admitted (no memory, say): a paused request is the only way forward.
            _resume(state, scheduler, state.paused[0])
            state.plan = None
            state.counters["forced_resumes"] += 1
            result = original(scheduler, running_batch)
    finally:
        scheduler.waiting_queue.extend(held)
        state.plan = None
    return result


def calc_priority(
    original: Callable[..., Any],
    policy: Any,
    waiting_queue: list[Any],
    running_batch: Any = None,
    processed_tokens: int = 0,
) -> None:
    """Seam of SchedulePolicy.calc_priority: upstream's policy first, then the order of the plan."""
    original(policy, waiting_queue, running_batch, processed_tokens)
    state = current()
    if state is None or not state.config.order or state.mode == "decode":
        return
    if state.mode == "null":
        _order_unified(state, waiting_queue)
    elif state.plan is not None:
        rank = state.plan_rank
        waiting_queue.sort(key=lambda req: rank.get(req, len(rank)))


def chunk_limit(
    original: Callable[..., Any],
    policy: Any,
    chunked_req: Any,
    waiting_queue: list[Any],
    budget: int,
    page_size: int,
) -> int | None:
    """Seam of SchedulePolicy.shortest_prefill_chunk_limit: the plan's share for the chunk slot."""
    state = current()
    if state is None or state.plan is None:
        limit: int | None = original(policy, chunked_req, waiting_queue, budget, page_size)
        return limit
    return state.plan.chunk_limit


def add_one_req(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    """Seam of PrefillAdder.add_one_req: never a second chunked prefill beside the one in the slot.

    The plan keeps to this too, but on predicted cache hits; this looks at the real ones.
    """
    if has_chunked_req and adder.rem_chunk_tokens is not None and current() is not None:
        tokens = len(req.full_untruncated_fill_ids) - req.prefix_len - req.host_hit_length
        if adder.ceil_paged_tokens(tokens) > adder.rem_chunk_tokens:
            from sglang.srt.managers.schedule_policy import AddReqResult

            return AddReqResult.OTHER
    return original(adder, req, has_chunked_req, truncation_align_size)


def process_pending_chunked_abort(original: Callable[..., Any], scheduler: Any) -> None:
    """Seam of Scheduler.process_pending_chunked_abort: tear aborted paused requests down too."""
    original(scheduler)
    state = current()
    if state is None:
        return
    for entry in [entry for entry in state.paused if entry.aborted]:
        state.paused.remove(entry)
        slot, pending = scheduler.chunked_req, scheduler._pending_chunked_abort_req
        scheduler.chunked_req = scheduler._pending_chunked_abort_req = entry.req
        try:
            original(scheduler)
        finally:
            scheduler.chunked_req, scheduler._pending_chunked_abort_req = slot, pending
        state.counters["paused_aborts"] += 1


def abort_request(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """Seam of Scheduler.abort_request: an abort reaches paused requests as well.

    Parked ones need no help (they are in the running batch); they are only counted.
    """
    state = current()
    if state is not None:

        def meant(req: Any) -> bool:
            return bool(recv_req.abort_all or req.rid.startswith(recv_req.rid))

        for entry in state.paused:
            entry.aborted = entry.aborted or meant(entry.req)
        if state.subset is not None:
            parked = set(scheduler.running_batch.reqs).difference(state.subset.reqs)
            state.counters["parked_aborts"] += sum(map(meant, parked))
    return original(scheduler, recv_req)


def is_fully_idle(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """Seam of Scheduler.is_fully_idle: a paused prefill owns KV, so the scheduler is not idle."""
    state = current()
    return bool(original(scheduler, *args, **kwargs)) and not (state is not None and state.paused)


def num_pending_tokens(
    original: Callable[..., Any], inquirer: Any, *args: Any, **kwargs: Any
) -> int:
    """Seam of SchedulerLoadInquirer._get_num_pending_tokens: count what is left of paused requests."""
    state = current()
    paused = 0 if state is None else sum(_left(entry.req) for entry in state.paused)
    return int(original(inquirer, *args, **kwargs)) + paused


def record_step_counters(
    original: Callable[..., Any], scheduler: Any, batch: Any, result: Any
) -> None:
    """Seam of Scheduler._record_step_counters: feed executed prefill steps to the predictor.

    Upstream takes a step's end when its result is processed. With overlap on a CPU that is after
    the next forward, so there `_learn_from_synchronous_step` measures instead.
    """
    before = scheduler.total_prefill_busy_us
    original(scheduler, batch, result)
    state = current()
    busy_us = scheduler.total_prefill_busy_us - before
    if state is None or busy_us <= 0 or not batch.extend_lens:
        return
    if not state.synchronous:
        _learn(state, batch, busy_us / 1e6)
    state.late_share.earn(sum(batch.extend_lens))
    for req, tokens in zip(batch.reqs, batch.extend_lens, strict=False):
        if state.promise(req).starving:
            state.late_share.spend(tokens)


def _learn_from_synchronous_step(state: KairosState) -> None:
    """On a CPU the forward has ended by the time the scheduler asks for the next batch."""
    batch, state.launched = state.launched, None
    if state.synchronous and batch is not None and batch.extend_lens:
        _learn(state, batch, time.monotonic() - batch.launch_ts)


def _learn(state: KairosState, batch: Any, seconds: float) -> None:
    learn = functools.partial(
        state.prefill_time.observe, batch.extend_lens, batch.prefix_lens, seconds
    )
    state.guarded("prefill_time", learn, None)
    state.record(
        "prefill_step",
        new_tokens=list(batch.extend_lens),
        prefix_tokens=list(batch.prefix_lens),
        seconds=seconds,
    )


def _left(req: Any) -> int:
    """Prompt tokens of a started chunked prefill that no launched chunk covers yet."""
    done = req.extend_end if req.extend_end is not None else req.prefix_len
    return max(1, len(req.origin_input_ids) - done)


def _uncached(state: KairosState, scheduler: Any, req: Any, match_all: bool) -> int:
    """Tokens a waiting request must compute, after its prefix-cache hit (looked up now and then)."""
    promise = state.promise(req)
    if match_all or state.plans - promise.matched_at_plan >= REMATCH_EVERY_PLANS:
        from sglang.srt.mem_cache.common import match_kv_cache

        match_kv_cache(req, scheduler.tree_cache)
        promise.matched_at_plan = state.plans
    total = len(req.origin_input_ids) + len(req.output_ids)
    return int(max(1, total - req.num_matched_prefix_tokens))


def _apply_plan(state: KairosState, scheduler: Any) -> list[Any]:
    """Plan the step, move requests in and out of the chunk slot; returns the requests held back."""
    state.plans += 1
    waiting, slot_req = list(scheduler.waiting_queue), scheduler.chunked_req
    partials = [] if slot_req is None else [slot_req]
    partials += [entry.req for entry in state.paused]
    jobs = waiting + partials
    at = len(waiting) if slot_req is not None else -1
    # As stock would: the queue as it stands behind the chunk in progress.
    first = len(waiting) if partials else -1
    as_it_stands: Step = (list(range(len(waiting))), first, None, [])
    decide = functools.partial(_decide, state, scheduler, waiting, partials, at)
    order, slot, limit, hold = state.agree(state.guarded("urgency", decide, as_it_stands))
    state.plan = PrefillPlan(order, slot, limit, 0, hold)
    state.plan_rank = {jobs[index]: rank for rank, index in enumerate(order)}
    chosen = None if slot < 0 else jobs[slot]
    if chosen is not slot_req:
        if slot_req is not None:
            state.paused.append(Paused(slot_req, state.now()))
            state.counters["pauses"] += 1
        scheduler.chunked_req = None
        for entry in state.paused:
            if entry.req is chosen:
                _resume(state, scheduler, entry)
                break
        state.counters["max_paused"] = max(state.counters["max_paused"], len(state.paused))
    held_set = set(hold)
    held = [jobs[index] for index in hold]
    scheduler.waiting_queue = [waiting[i] for i in range(len(waiting)) if i not in held_set]
    return held


def _resume(state: KairosState, scheduler: Any, entry: Paused) -> None:
    state.paused.remove(entry)
    scheduler.chunked_req = entry.req
    state.counters["resumes"] += 1


def _decide(
    state: KairosState, scheduler: Any, waiting: list[Any], partials: list[Any], at: int
) -> Step:
    """The plan as plain data. `at` is the index of the chunk slot's request in waiting + partials."""
    config, count = state.config, len(waiting) + len(partials)
    chunk_tokens = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
    cached = not getattr(scheduler.tree_cache, "disable", True)
    match_all = len(waiting) <= REMATCH_ALL_BELOW
    tokens = np.empty(count, np.int64)
    prefix = np.empty(count, np.int64)
    for index, req in enumerate(waiting):
        total = len(req.origin_input_ids) + len(req.output_ids)
        tokens[index] = _uncached(state, scheduler, req, match_all) if cached else total
        prefix[index] = total - tokens[index]
    for index, req in enumerate(partials, start=len(waiting)):
        tokens[index] = _left(req)
        prefix[index] = len(req.origin_input_ids) - tokens[index]
    free = (
        scheduler.token_to_kv_pool_allocator.available_size()
        + scheduler.tree_cache.evictable_size()
    )
    # An optimistic request in the slot may still be re-queued by upstream, which looks for it there.
    pinned = at >= 0 and bool(partials[0].pending_bootstrap)
    max_paused = config.max_paused if config.pause else 0
    is_partial = [index >= len(waiting) for index in range(count)]
    if state.chaos is not None and not pinned:
        plan = state.chaos.prefill(
            tokens.tolist(),
            is_partial,
            current=at,
            chunk_tokens=chunk_tokens,
            free_tokens=int(free),
            max_paused=max_paused,
        )
        return plan.order, plan.slot, plan.chunk_limit, plan.hold
    now = state.now()
    promises = [state.promise(req) for req in (*waiting, *partials)]
    slack = np.array([promise.ttft_due_s - now for promise in promises]) - config.handoff_ms / 1e3
    work = state.prefill_time.remaining_s(tokens, prefix, chunk_tokens) * (1 + config.margin)
    _mark_starving(state, promises, now)
    plan = plan_prefill(
        PrefillQueue(
            work_s=work,
            deadline_s=slack,
            tokens=tokens,
            partial=is_partial,
            weight=_weights(promises),
            starving=[promise.starving for promise in promises],
        ),
        chunk_tokens=chunk_tokens,
        current=at,
        free_tokens=int(free),
        max_paused=max_paused,
        page_size=scheduler.page_size,
        forced=at if pinned else _overdue(state, now, at, len(waiting)),
        least_tokens=state.prefill_time.worthwhile_tokens(float(prefix.max()), chunk_tokens),
    )
    state.record(
        "prefill",
        work_s=work.tolist(),
        deadline_s=slack.tolist(),
        tokens=tokens.tolist(),
        partial=is_partial,
        current=at,
        chunk_tokens=chunk_tokens,
        free_tokens=int(free),
        order=plan.order,
        slot=plan.slot,
    )
    return plan.order, plan.slot, plan.chunk_limit, plan.hold


def _mark_starving(state: KairosState, promises: list[Promise], now: float) -> None:
    """Let the oldest request past the starvation bound go first, while the late share allows it."""
    starving: Promise | None = None
    for promise in promises:
        promise.starving = False
        bound_s = state.config.max_wait * promise.slo.ttft_ms / 1e3
        if now - promise.arrival_s > bound_s:
            if starving is None or promise.arrival_s < starving.arrival_s:
                starving = promise
    if starving is not None and state.late_share.may_spend():
        starving.starving = True


def _weights(promises: list[Promise]) -> list[float] | None:
    """Class weights, or None when all are alike (the exact algorithm then applies)."""
    weights = [promise.slo.weight for promise in promises]
    return None if len(set(weights)) <= 1 else weights


def _overdue(state: KairosState, now: float, at: int, waiting: int) -> int:
    """Index of a request paused for too long, -1 when there is none."""
    first = waiting + (1 if at >= 0 else 0)
    for offset, entry in enumerate(state.paused):
        if now - entry.since_s > state.config.max_pause_ms / 1e3:
            return first + offset
    return -1


def _order_unified(state: KairosState, waiting_queue: list[Any]) -> None:
    """Urgency order for unified serving: same predictor, no pausing."""
    if len(waiting_queue) < 2:
        return
    now = state.now()
    promises = [state.promise(req) for req in waiting_queue]
    total = np.array([len(req.origin_input_ids) + len(req.output_ids) for req in waiting_queue])
    matched = np.array([req.num_matched_prefix_tokens for req in waiting_queue])
    work = state.prefill_time.remaining_s(np.maximum(1, total - matched), matched, 8192)
    slack = np.array([promise.ttft_due_s - now for promise in promises])
    order = state.agree(urgency_order(work, slack, _weights(promises)).order)
    waiting_queue[:] = [waiting_queue[index] for index in order]
