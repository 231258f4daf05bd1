"""The prefill side of the glue: plan by urgency at every scheduling point, order, share the chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.engine import compat
from sglang_kairos.engine.pausing import drop_released, give_slot, overdue
from sglang_kairos.engine.roster import Rows
from sglang_kairos.engine.standstill import give_way
from sglang_kairos.engine.state import KairosState, current, tokens_left
from sglang_kairos.engine.steps import learn_from_synchronous_step
from sglang_kairos.policy.reserve import may_begin
from sglang_kairos.policy.urgency import PrefillPlan, PrefillQueue, plan_prefill, urgency_order

# Looking a prompt up in the radix cache walks it: not every request at every step.
LOOK_UP_EVERY_PLANS = 16
LOOK_UPS_PER_PLAN = 32

# A plan as ranks exchange it: order, slot, chunk limit, held back (see PrefillPlan).
Step = tuple[list[int], int, int | None, list[int]]


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Seam of Scheduler.get_new_batch_prefill: decide who runs, then let upstream build the batch."""
    state = current()
    if state is None or state.mode != "prefill":
        return original(scheduler, running_batch)
    if not state.config.order:
        result = original(scheduler, running_batch)
        _end_standstill(state, scheduler, result.batch_to_run)
        return result
    learn_from_synchronous_step(state)
    drop_released(state)
    result = _planned_batch(original, state, scheduler, running_batch)
    state.launched = result.batch_to_run
    _end_standstill(state, scheduler, result.batch_to_run)
    _account(state, result.batch_to_run)
    return result


def _end_standstill(state: KairosState, scheduler: Any, batch: Any) -> None:
    state.guarded("standstill", functools.partial(give_way, state, scheduler, batch), None)


def _planned_batch(
    original: Callable[..., Any], state: KairosState, scheduler: Any, running_batch: Any
) -> Any:
    if not scheduler.waiting_queue and not state.paused:
        # Alone in the chunk slot, or nothing at all: upstream does the right thing.
        return original(scheduler, running_batch)
    state.held = _apply_plan(state, scheduler)
    try:
        result = original(scheduler, running_batch)
        # Nothing could be admitted (no memory, say): prefills that have begun are the way forward.
        state.plan = None
        for req in sorted(state.paused, key=tokens_left):
            if result.batch_to_run is not None or _pinned(scheduler.chunked_req):
                break
            give_slot(state, scheduler, req)
            state.counters["forced_resumes"] += 1
            result = original(scheduler, running_batch)
    finally:
        scheduler.waiting_queue.extend(state.held)
        state.held, state.plan, state.plan_order = [], None, []
    return result


def calc_priority(
    original: Callable[..., Any],
    policy: Any,
    waiting_queue: list[Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Seam of SchedulePolicy.calc_priority: upstream's policy first, then the order of the plan."""
    original(policy, waiting_queue, *args, **kwargs)
    state = current()
    if state is None or not state.config.order or state.mode == "decode":
        return
    if state.mode == "null":
        _order_unified(state, waiting_queue)
    elif state.plan is not None:
        planned = state.plan_order
        if len(waiting_queue) > len(planned):  # upstream adds requests whose grammar is ready
            known = set(planned)
            planned = planned + [req for req in waiting_queue if req not in known]
        if waiting_queue != planned:
            waiting_queue[:] = planned


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


def add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """Seam of PrefillAdder.add_chunked_req where SGLang has no `chunk_limit` (v0.5.16).

    The chunk sees the plan's share of the budget; what it leaves is there for those behind it.
    """
    state = current()
    limit = None if state is None or state.plan is None else state.plan.chunk_limit
    budget = adder.rem_chunk_tokens
    if limit is None or budget is None or limit >= budget:
        return original(adder, req)
    adder.rem_chunk_tokens = limit
    try:
        return original(adder, req)
    finally:
        adder.rem_chunk_tokens += budget - limit


def add_one_req(
    original: Callable[..., Any],
    adder: Any,
    req: Any,
    has_chunked_req: bool,
    truncation_align_size: int | None,
) -> Any:
    """Seam of PrefillAdder.add_one_req: never a second chunked prefill beside the one in the slot,
    and nobody who takes the KV that begun prefills need for their rest.

    The plan keeps to this too, but on predicted cache hits; this looks at the real ones.
    """
    state = current()
    if has_chunked_req and adder.rem_chunk_tokens is not None and state is not None:
        known = compat.prefix_len(req) + req.host_hit_length
        tokens = len(req.full_untruncated_fill_ids) - known
        if adder.ceil_paged_tokens(tokens) > adder.rem_chunk_tokens:
            from sglang.srt.managers.schedule_policy import AddReqResult

            return AddReqResult.OTHER
    if state is not None and state.mode == "prefill" and not _leaves_enough(state, adder, req):
        from sglang.srt.managers.schedule_policy import AddReqResult

        state.counters["kept_for_begun"] += 1
        return AddReqResult.NO_TOKEN
    return original(adder, req, has_chunked_req, truncation_align_size)


def _leaves_enough(state: KairosState, adder: Any, req: Any) -> bool:
    """Whether the prefills that have begun can still be taken to their end when `req` begins too."""
    begins = getattr(adder, "new_chunked_req", None)
    begun = list(state.paused)
    begun += [one for one in (state.scheduler.chunked_req, begins) if one is not None]
    if not begun:
        return True
    # A hit on the host is loaded into KV of this device: it counts as if it were computed.
    tokens = len(req.full_untruncated_fill_ids) - compat.prefix_len(req)
    (may,) = may_begin(
        [tokens],
        [0],  # its cached prefix is locked while this is read
        [tokens_left(one) for one in begun],
        free_tokens=compat.room_beside(adder, req),
        page_size=adder.page_size,
    )
    return may


def _account(state: KairosState, batch: Any) -> None:
    """Keep the books of the starvation bound for a launched batch."""
    if batch is None or not batch.extend_lens:
        return
    state.late_share.earn(sum(batch.extend_lens))
    for req, tokens in zip(batch.reqs, batch.extend_lens, strict=False):
        if req is state.starving:
            state.late_share.spend(tokens)


def _apply_plan(state: KairosState, scheduler: Any) -> list[Any]:
    """Plan the step, move requests in and out of the chunk slot; returns the requests held back."""
    state.plans += 1
    waiting, slot_req = scheduler.waiting_queue, scheduler.chunked_req
    partials = [] if slot_req is None else [slot_req]
    partials += state.paused
    at = len(waiting) if slot_req is not None else -1
    # As stock would: the queue as it stands behind the chunk in progress.
    first = len(waiting) if partials else -1
    as_it_stands: Step = (list(range(len(waiting))), first, None, [])
    decide = functools.partial(_decide, state, scheduler, waiting, partials, at)
    order, slot, limit, hold = state.agree(state.guarded("urgency", decide, as_it_stands))
    state.plan = PrefillPlan(order, slot, limit, 0, hold)
    give_slot(state, scheduler, None if slot < 0 else partials[slot - len(waiting)])
    scheduler.waiting_queue = [waiting[index] for index in order]
    state.plan_order = scheduler.waiting_queue.copy()
    return [waiting[index] for index in hold]


def _decide(
    state: KairosState, scheduler: Any, waiting: list[Any], partials: list[Any], at: int
) -> Step:
    """The plan as plain data. `at` is the index of the chunk slot's request in waiting + partials."""
    config, count = state.config, len(waiting)
    chunk_tokens = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
    rows = state.roster.rows(waiting)
    if not getattr(scheduler.tree_cache, "disable", True):
        _look_up_prefixes(state, scheduler, waiting, rows)
    rows = np.concatenate([rows, state.roster.rows(partials)])
    total = state.roster.tokens[rows]
    tokens = np.maximum(1, total - state.roster.matched_tokens[rows])
    tokens[count:] = [tokens_left(req) for req in partials]
    evictable = int(scheduler.tree_cache.evictable_size())
    free = scheduler.token_to_kv_pool_allocator.available_size() + evictable
    pinned = at >= 0 and _pinned(partials[0])
    partial = np.zeros(len(rows), bool)
    partial[count:] = True
    if state.chaos is not None and not pinned:
        plan = state.chaos.prefill(
            tokens.tolist(),
            partial.tolist(),
            current=at,
            chunk_tokens=chunk_tokens,
            free_tokens=int(free),
            max_paused=state.max_paused,
        )
        return plan.order, plan.slot, plan.chunk_limit, plan.hold
    now = state.now()
    prefix = total - tokens
    model = state.prefill_time
    slack = state.roster.due_s[rows] - now - config.handoff_ms / 1e3
    work = model.remaining_s(tokens, prefix, chunk_tokens) * (1 + config.margin)
    late = overdue(state, now, partials[0] if at >= 0 else None)
    # What a crumb of a chunk costs depends on the prefix it rereads: that of the prefills begun.
    begun = prefix[count:].max() if partials else 0.0
    starving = _starving(state, waiting, partials, rows, now)
    forced = at if pinned else (late if late < 0 else count + late)
    plan = plan_prefill(
        PrefillQueue(
            work_s=work,
            deadline_s=slack,
            tokens=tokens,
            partial=partial,
            weight=_weights(state.roster.weight[rows]),
            starving=starving,
            fixed_s=model.step_s((), ()) * (1 + config.margin),
            cached=prefix,
        ),
        chunk_tokens=chunk_tokens,
        current=at,
        free_tokens=int(free),
        evictable_tokens=evictable,
        max_paused=state.max_paused,
        page_size=scheduler.page_size,
        forced=forced,
        least_tokens=model.worthwhile_tokens(float(begun), chunk_tokens),
    )
    _check_nobody_is_lost(plan, count)
    if state.logging:
        state.record(
            "prefill",
            work_s=work.tolist(),
            deadline_s=slack.tolist(),
            tokens=tokens.tolist(),
            prefix=prefix.tolist(),
            partial=partial.tolist(),
            starving=[False] * len(rows) if starving is None else starving.tolist(),
            law=list(model.coefficients.values()),
            margin=config.margin,
            current=at,
            chunk_tokens=chunk_tokens,
            free_tokens=int(free),
            evictable_tokens=evictable,
            max_paused=state.max_paused,
            forced=forced,
            order=plan.order,
            slot=plan.slot,
            chunk_limit=plan.chunk_limit,
            on_time=plan.on_time,
            hold=plan.hold,
        )
    return plan.order, plan.slot, plan.chunk_limit, plan.hold


def _pinned(slot_req: Any) -> bool:
    """An optimistic request in the slot may still be re-queued by upstream, which looks for it there."""
    return slot_req is not None and bool(slot_req.pending_bootstrap)


def _look_up_prefixes(state: KairosState, scheduler: Any, waiting: list[Any], rows: Rows) -> None:
    """Refresh the prefix-cache hits of some waiting requests: each look-up walks a prompt."""
    roster = state.roster
    every = 1 if len(waiting) <= LOOK_UPS_PER_PLAN else LOOK_UP_EVERY_PLANS
    for index in roster.to_match(rows, state.plans, every, LOOK_UPS_PER_PLAN):
        req = waiting[index]
        compat.match_prefix(req, scheduler.tree_cache)
        roster.matched_tokens[rows[index]] = req.num_matched_prefix_tokens
        roster.matched_at[rows[index]] = state.plans


def _check_nobody_is_lost(plan: PrefillPlan, waiting: int) -> None:
    """ValueError unless every waiting index is either ordered or held back, once."""
    named = np.array([*plan.order, *plan.hold], np.intp)
    if len(named) != waiting or (np.bincount(named, minlength=waiting) != 1).any():
        raise ValueError(f"a plan over {waiting} waiting requests names {len(named)}")


def _starving(
    state: KairosState, waiting: list[Any], partials: list[Any], rows: Rows, now: float
) -> Any:
    """Mask of who may go first: the oldest past the starvation bound, while the late share allows."""
    state.starving = None
    past = np.flatnonzero(state.roster.starves_s[rows] < now)
    if past.size == 0 or not state.late_share.may_spend():
        return None
    oldest = int(past[np.argmin(state.roster.arrival_s[rows[past]])])
    count = len(waiting)
    state.starving = waiting[oldest] if oldest < count else partials[oldest - count]
    mask = np.zeros(len(rows), bool)
    mask[oldest] = True
    return mask


def _weights(weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Class weights, or None when all are alike (the exact algorithm then applies)."""
    return weights if weights.size and weights.min() < weights.max() else None


def _order_unified(state: KairosState, waiting_queue: list[Any]) -> None:
    """Urgency order for unified serving: same predictor, no pausing."""
    rows = state.roster.rows(waiting_queue)  # also takes down what each was promised
    state.tell_metrics()
    if len(waiting_queue) < 2:
        return

    def decide() -> list[int]:
        # A retracted request has more to compute than when it came.
        total = np.array([len(req.origin_input_ids) + len(req.output_ids) for req in waiting_queue])
        matched = np.array([req.num_matched_prefix_tokens for req in waiting_queue])
        work = state.prefill_time.remaining_s(np.maximum(1, total - matched), matched, 8192)
        slack = state.roster.due_s[rows] - state.now()
        return urgency_order(work, slack, _weights(state.roster.weight[rows])).order

    as_it_stands = list(range(len(waiting_queue)))
    order = state.agree(state.guarded("urgency", decide, as_it_stands))
    waiting_queue[:] = [waiting_queue[index] for index in order]
