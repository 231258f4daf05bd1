"""The decode side of the glue: order admission, execute a subset of the running batch.

`Scheduler.running_batch` keeps every request at all times, so aborts, retraction, memory budgets and
idle checks work unmodified. When requests are parked, a view of the batch (`subset.SubsetView`)
executes in its place and the lengths it advanced are written back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_kairos.engine import admission, features
from sglang_kairos.engine.running import (
    EMITTED,
    FIRST_S,
    LAST_S,
    SERVED,
    TPOT_S,
    RunningTable,
    memory_of,
)
from sglang_kairos.engine.state import KairosState, current
from sglang_kairos.engine.subset import SubsetView
from sglang_kairos.policy.admission import deadline_order
from sglang_kairos.policy.packing import (
    MOST_RESERVE,
    choose_step,
    horizon_of,
    reserve_of,
    room_s,
)
from sglang_kairos.policy.retraction import keep_order
from sglang_kairos.predict.error import LEARNT_STEPS


def pop_preallocated(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
    """Seam of DecodePreallocQueue.pop_preallocated: reserve KV for whom it can keep on pace."""
    state = current()
    if state is None or not queue.queue:
        return original(queue, *args, **kwargs)
    state.guarded("never_fit", functools.partial(admission.end_what_never_fits, state, queue), None)
    if not state.config.order:
        return original(queue, *args, **kwargs)

    def by_deadline() -> Any:
        if len(queue.queue) > 1:
            reqs = [entry.req for entry in queue.queue]
            left = functools.partial(admission.clock_left, state, queue)
            _sort_by_deadline(state, queue.queue, reqs, left)
        return original(queue, *args, **kwargs)

    whole = not args and not any(kwargs.values())
    limited = state.config.park and not features.why_not("reserve", state.scheduler)
    if whole and limited and state.chaos is None:
        trusted = functools.partial(_trusted, state)
        return admission.reserve(state, original, queue, trusted, by_deadline)
    return by_deadline()


def get_new_prebuilt_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Seam of get_new_prebuilt_batch: admit by TTFT slack when slots are short."""
    state = current()
    if state is not None:
        for req in scheduler.waiting_queue:
            state.promise(req)
        admission.note_starts(state, scheduler.waiting_queue)
    if state is not None and state.config.order and len(scheduler.waiting_queue) > 1:
        _sort_by_deadline(state, scheduler.waiting_queue, scheduler.waiting_queue)
    return original(scheduler, running_batch)


def get_next_decode_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Seam of get_next_disagg_decode_batch_to_run: run the subset instead of the full batch."""
    state = current()
    if state is None or not state.config.park:
        return original(scheduler, running_batch)
    state.subset, state.deciding = None, True
    try:
        plan = original(scheduler, running_batch)
    finally:
        state.deciding = False
    if state.subset is not None and plan.batch_to_run is not None:
        plan.batch_to_run = state.subset
    _remember_step(state, plan.batch_to_run)
    return plan


def retract_decode(original: Callable[..., Any], batch: Any, *args: Any) -> Any:
    """Seam of ScheduleBatch.retract_decode: those go who lose least of their SLO."""
    state = current()
    if state is None or not state.deciding or not batch.spec_algorithm.is_none():
        return original(batch, *args)
    if getattr(state.scheduler.server_args, "retraction_policy", "length") != "length":
        return original(batch, *args)  # the operator chose one; "length" is SGLang's default

    def decide() -> list[int] | None:
        return _keep_order(state, batch) if state.chaos is None else None

    order = state.agree(state.guarded("retraction", decide, None))
    if order is None:
        return original(batch, *args)
    # Upstream asks the batch for its order; an attribute of its own answers instead.
    batch._get_decode_retraction_order = lambda reqs, *args, **kwargs: list(order)
    state.counters["retractions"] += 1
    try:
        return original(batch, *args)
    finally:
        del batch._get_decode_retraction_order


def prepare_for_decode(original: Callable[..., Any], batch: Any) -> None:
    """Seam of ScheduleBatch.prepare_for_decode: prepare only those chosen to run."""
    state = current()
    if state is None or not state.deciding:
        original(batch)
        return
    memory = memory_of(state)
    keep = _choose(state, batch)
    if len(keep) == len(batch.reqs):
        memory.table.ran(None)
        original(batch)
        return
    memory.table.ran(keep)
    if memory.view is None or not memory.view.fits(batch, keep):
        memory.view = SubsetView(batch, keep)
        state.counters["subset_views"] += 1
    memory.view.advance(original, batch)
    state.subset = memory.view.batch
    state.counters["subset_steps"] += 1
    state.counters["parked"] += len(batch.reqs) - len(keep)


def _sort_by_deadline(
    state: KairosState,
    entries: list[Any],
    reqs: list[Any],
    clock_left: Callable[[float], Any] | None = None,
) -> None:
    """`deadline_order` of the requests `reqs` of these entries."""
    if state.chaos is not None:
        return
    now = state.now()
    due = [state.promise(req).ttft_due_s - now for req in reqs]
    prompt = [float(len(req.origin_input_ids)) for req in reqs]
    order = deadline_order(due, prompt, clock_left(now) if clock_left else None)
    entries[:] = [entries[index] for index in state.agree(order)]


def _choose(state: KairosState, batch: Any) -> list[int]:
    """Indices of the running requests that decode in this step, ascending."""
    count = len(batch.reqs)
    everyone = list(range(count))
    table = _follow(state, batch)
    now = state.now()
    table.now(now)
    if count < 2:
        return everyone
    blocker = features.why_not("park", state.scheduler, batch)
    if blocker:
        state.log_once(f"park:{blocker}", f"decode packing is off while {blocker}: full batch")
        state.counters["fallback_steps"] += 1
        return everyone
    if state.chaos is not None:
        return list(state.agree(state.chaos.decode(count)))
    context = batch.seq_lens_cpu.numpy()

    def decide() -> list[int] | None:
        full = float(state.step_time.step_s(count, float(context.sum())))
        horizon = horizon_of(memory_of(state).stay.output_tokens)
        if full <= room_s(table.tightest_s, MOST_RESERVE, horizon):  # spares looking up the error
            return None
        reserve = reserve_of(state.step_time.error.mape)
        if full <= room_s(table.tightest_s, reserve, horizon) or not _trusted(state):
            return None
        return _pack(state, table, context, now, reserve, horizon)

    agreed = state.agree(state.guarded("packing", decide, None))
    return everyone if agreed is None else list(agreed)


def _follow(state: KairosState, batch: Any) -> RunningTable:
    """The table of the requests in `batch`; who has finished since tells how long requests stay."""
    memory = memory_of(state)
    for gone in memory.table.follow(batch.reqs):
        if gone.finished():
            memory.stay.ended(len(gone.output_ids))
    return memory.table


def _keep_order(state: KairosState, batch: Any) -> list[int]:
    columns = _follow(state, batch).columns
    lead = columns[FIRST_S] + (columns[EMITTED] - 1.0) * columns[TPOT_S] - state.now()
    weight = np.array([state.promise(req).slo.weight for req in batch.reqs])
    return keep_order(lead, columns[TPOT_S], batch.seq_lens_cpu.numpy(), weight)


def _trusted(state: KairosState) -> bool:
    """The circuit breaker: parking helps nobody where step times do not follow the predictions."""
    error = state.step_time.error
    if error.trusted(state.config.max_step_error):
        return True
    state.counters["breaker_steps"] += 1
    if error.samples >= LEARNT_STEPS:
        state.log_once(
            "breaker",
            f"decode packing pauses while steps are predicted {100 * error.mape:.0f} % wrong "
            f"(--kairos-max-step-error {state.config.max_step_error:g}) and do not follow the "
            f"predictions (response {error.response:.2f})",
        )
    return False


def _pack(
    state: KairosState,
    table: RunningTable,
    context: Any,
    now: float,
    reserve_tokens: float,
    horizon_tokens: float,
) -> list[int]:
    columns = table.columns
    slack = columns[FIRST_S] + columns[EMITTED] * columns[TPOT_S] - now
    silent = now - columns[LAST_S]
    served = columns[SERVED] > 0.0
    max_itl_s = state.config.max_itl_ms / 1e3
    choice = choose_step(
        slack,
        columns[TPOT_S],
        context,
        silent,
        state.step_time.step_s,
        served=served,
        reserve_tokens=reserve_tokens,
        horizon_tokens=horizon_tokens,
        min_throughput=state.config.min_throughput,
        max_itl_s=max_itl_s,
    )
    columns[SERVED] = choice.served
    state.counters[f"steps_{choice.reason}"] += 1
    if state.logging:
        state.record(
            "decode",
            slack_s=slack.tolist(),
            tpot_s=columns[TPOT_S].tolist(),
            context_tokens=context.tolist(),
            silent_s=silent.tolist(),
            served=served.tolist(),
            reserve_tokens=reserve_tokens,
            horizon_tokens=horizon_tokens,
            model=state.step_time.snapshot(),
            min_throughput=state.config.min_throughput,
            max_itl_s=max_itl_s,
            run=choice.run,
            reason=choice.reason,
        )
    return choice.run


def _remember_step(state: KairosState, batch: Any) -> None:
    """Teach the step-time model from the cadence of consecutive decode decisions."""
    now = state.now()
    previous = state.last_step
    # Some attention backends keep the lengths on the device only.
    if batch is None or not batch.reqs or batch.seq_lens_cpu is None:
        state.last_step = None
        return
    state.last_step = (now, len(batch.reqs), float(batch.seq_lens_cpu.sum()))
    state.counters["steps"] += 1
    if previous is not None:
        started, size, tokens = previous
        learn = functools.partial(state.step_time.observe, size, tokens, now - started)
        state.guarded("step_time", learn, None)
        state.steps.add(size, tokens, now - started)
        state.learnt()
