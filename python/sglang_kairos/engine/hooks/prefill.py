"""The prefill side: plans by urgency at every scheduling point, orders the queue, shares the chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_kairos.engine import compat
from sglang_kairos.engine.hooks.pausing import drop_released, give_slot
from sglang_kairos.engine.hooks.standstill import give_way
from sglang_kairos.engine.hooks.step_timing import learn_from_synchronous_step
from sglang_kairos.engine.state.decision_log import plain
from sglang_kairos.engine.state.request import tokens_left
from sglang_kairos.engine.state.scheduler_state import KairosState, current
from sglang_kairos.engine.state.waiting_table import Rows
from sglang_kairos.policy.prefill_planner import PrefillView
from sglang_kairos.policy.prefill_step import PrefillPlan
from sglang_kairos.policy.reserve import may_begin


def get_new_batch_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Seam of Scheduler.get_new_batch_prefill: decide what runs, then let SGLang build the batch."""
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
        # At most one request, and it is in the chunk slot. SGLang does the right thing.
        return original(scheduler, running_batch)
    state.held = _apply_plan(state, scheduler)
    try:
        result = original(scheduler, running_batch)
        # If nothing could be admitted (no memory, say), only prefills that have begun can go on.
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
        _order_unified(state, state.scheduler, waiting_queue)
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
    """Seam of PrefillAdder.add_chunked_req where SGLang has no `chunk_limit` (to v0.5.20).

    The chunk sees the plan's share of the budget. The rest is left for requests behind it.
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
    """Seam of PrefillAdder.add_one_req: protect the chunk slot and the KV of begun prefills.

    It never starts a second chunked prefill beside the one in the slot. And it admits nobody who
    takes the KV that begun prefills need for their rest. The plan keeps to this too, but on
    predicted cache hits; this looks at the real ones.
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
    """Returns whether begun prefills can still be taken to their end when `req` begins too."""
    begins = getattr(adder, "new_chunked_req", None)
    begun = list(state.paused)
    begun += [one for one in (state.scheduler.chunked_req, begins) if one is not None]
    if not begun:
        return True
    # A hit on the host is loaded into KV of this device, so it counts as if it were computed.
    tokens = len(req.full_untruncated_fill_ids) - compat.prefix_len(req)
    (may,) = may_begin(
        [tokens],
        [0],  # its cached prefix is locked while `free_tokens` is read
        [tokens_left(one) for one in begun],
        free_tokens=compat.room_beside(adder, req),
        page_size=adder.page_size,
    )
    return may


def _account(state: KairosState, batch: Any) -> None:
    """Tells the planner what was launched."""
    if batch is None or not batch.extend_lens:
        return
    rows = zip(batch.reqs, batch.extend_lens, strict=False)
    of_starving = sum(tokens for req, tokens in rows if req is state.starving)
    state.planner.ran(sum(batch.extend_lens), of_starving)


def _apply_plan(state: KairosState, scheduler: Any) -> list[Any]:
    """Plans the step and moves requests in and out of the chunk slot. Returns the requests held back."""
    waiting, slot_req = scheduler.waiting_queue, scheduler.chunked_req
    begun = [] if slot_req is None else [slot_req]
    begun += state.paused
    # The fallback is stock behaviour: the queue as it stands, behind the chunk in progress.
    first = len(waiting) if begun else -1
    as_it_stands = PrefillPlan(list(range(len(waiting))), first, None, 0, [])
    decide = functools.partial(_decide, state, scheduler, waiting, begun)
    plan = state.plan = state.agree(state.guarded("urgency", decide, as_it_stands))
    jobs = [*waiting, *begun]
    state.starving = None if plan.starving < 0 else jobs[plan.starving]
    give_slot(state, scheduler, None if plan.slot < 0 else jobs[plan.slot])
    scheduler.waiting_queue = [waiting[index] for index in plan.order]
    state.plan_order = scheduler.waiting_queue.copy()
    return [waiting[index] for index in plan.hold]


def _decide(
    state: KairosState, scheduler: Any, waiting: list[Any], begun: list[Any]
) -> PrefillPlan:
    rows = state.roster.rows(waiting)
    _look_up_prefixes(state, scheduler, waiting, rows)
    view = _view(state, scheduler, rows, begun)
    plan = state.planner.plan(view, state.prefill_time)
    if state.logging:
        law = state.prefill_time.law.to_json()
        settings = state.planner.settings()
        state.record("prefill", view=plain(view), settings=settings, law=law, **plain(plan))
    return plan


def _chunk_tokens(scheduler: Any) -> int:
    return int(scheduler.chunked_prefill_size or scheduler.max_prefill_tokens)


def _view(state: KairosState, scheduler: Any, waiting: Rows, begun: list[Any]) -> PrefillView:
    """Returns the planner's view. `waiting`: rows of the table; `begun`: the slot's request first."""
    roster, now = state.roster, state.now()
    rows = np.concatenate([waiting, roster.rows(begun)]) if begun else waiting
    total = roster.tokens[rows]
    tokens = np.maximum(1, total - roster.matched_tokens[rows])
    tokens[len(waiting) :] = [tokens_left(req) for req in begun]
    evictable = int(scheduler.tree_cache.evictable_size())
    free = int(scheduler.token_to_kv_pool_allocator.available_size())
    in_slot = scheduler.chunked_req is not None
    return PrefillView(
        now_s=now,
        arrival_s=roster.arrival_s[rows],
        ttft_s=roster.ttft_s[rows],
        weight=roster.weight[rows],
        tokens=tokens,
        prefix=total - tokens,
        paused_s=[state.promise(req).sat_out_s(now) for req in begun],
        in_slot=in_slot,
        pinned=in_slot and _pinned(scheduler.chunked_req),
        chunk_tokens=_chunk_tokens(scheduler),
        free_tokens=free + evictable,
        evictable_tokens=evictable,
        max_paused=state.max_paused,
        page_size=scheduler.page_size,
    )


def _pinned(slot_req: Any) -> bool:
    """Returns whether SGLang may still re-queue the slot's optimistic request."""
    return slot_req is not None and bool(slot_req.pending_bootstrap)


def _look_up_prefixes(state: KairosState, scheduler: Any, waiting: list[Any], rows: Rows) -> None:
    """Refreshes the prefix-cache hits of some waiting requests; each look-up walks a prompt."""
    if getattr(scheduler.tree_cache, "disable", True):
        return
    roster = state.roster
    for index in state.planner.to_look_up(roster.matched_at[rows]):
        req = waiting[index]
        compat.match_prefix(req, scheduler.tree_cache)
        roster.matched_tokens[rows[index]] = req.num_matched_prefix_tokens
        roster.matched_at[rows[index]] = state.planner.plans


def _order_unified(state: KairosState, scheduler: Any, waiting_queue: list[Any]) -> None:
    """Orders by urgency for unified serving: the same planner, without pausing."""
    rows = state.roster.rows(waiting_queue)  # also notes the SLO of each
    state.tell_metrics()
    if len(waiting_queue) < 2:
        return

    def decide() -> list[int]:
        # Upstream has looked every prompt up, and a retracted request has more to compute now.
        total = np.array([len(req.origin_input_ids) + len(req.output_ids) for req in waiting_queue])
        known = np.array([req.num_matched_prefix_tokens for req in waiting_queue])
        roster = state.roster
        view = PrefillView(
            now_s=state.now(),
            arrival_s=roster.arrival_s[rows],
            ttft_s=roster.ttft_s[rows],
            weight=roster.weight[rows],
            tokens=np.maximum(1, total - known),
            prefix=known,
            chunk_tokens=_chunk_tokens(scheduler),
        )
        return state.planner.order(view, state.prefill_time)

    as_it_stands = list(range(len(waiting_queue)))
    order = state.agree(state.guarded("urgency", decide, as_it_stands))
    waiting_queue[:] = [waiting_queue[index] for index in order]
