"""The decode side: orders admission, and executes a subset of the running batch.

`Scheduler.running_batch` keeps every request at all times, so aborts, retraction, memory budgets
and idle checks work unmodified. When requests are parked, a view of the batch
(`engine.state.subset_view.SubsetView`) executes in its place. The lengths that it advanced are
written back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_kairos.engine import features
from sglang_kairos.engine.hooks import admission
from sglang_kairos.engine.hooks.attainment import count_ended
from sglang_kairos.engine.state.running_table import SERVED, memory_of, tell_breaker
from sglang_kairos.engine.state.scheduler_state import KairosState, current
from sglang_kairos.engine.state.subset_view import SubsetView
from sglang_kairos.policy.decode_planner import RunningView
from sglang_kairos.policy.decode_step import StepChoice, reserve_of


def pop_preallocated(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
    """Seam of DecodePreallocQueue.pop_preallocated: reserve KV for requests that can be kept on pace."""
    state = current()
    if state is None or not queue.queue:
        return original(queue, *args, **kwargs)
    state.guarded("never_fit", functools.partial(admission.end_what_never_fits, state, queue), None)
    if not state.config.order:
        return original(queue, *args, **kwargs)
    part = bool(args) or any(kwargs.values())
    if part or not state.config.park or features.why_not("reserve", state.scheduler):
        admission.sort(state, queue.queue, queue)
        return original(queue, *args, **kwargs)
    return admission.reserve(state, original, queue)


def get_new_prebuilt_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """Seam of get_new_prebuilt_batch: admit by TTFT slack when slots are short."""
    state = current()
    if state is not None:
        for req in scheduler.waiting_queue:
            state.promise(req)
        admission.note_starts(state, scheduler.waiting_queue)
        if state.config.order:
            admission.sort(state, scheduler.waiting_queue)
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
    """Seam of ScheduleBatch.retract_decode: retract the requests whose SLO suffers least.

    If even that does not make enough KV free, SGLang ends requests, and shows them nowhere else.
    They are counted.
    """
    result, state = _retract(original, batch, *args), current()
    ended = result[2] if len(result) > 2 else ()
    if state is not None and ended:
        told = functools.partial(count_ended, state, ended, {"status_code": 500})
        state.guarded("attainment", told, None)
    return result


def _retract(original: Callable[..., Any], batch: Any, *args: Any) -> Any:
    state = current()
    if state is None or not state.deciding or not batch.spec_algorithm.is_none():
        return original(batch, *args)
    if getattr(state.scheduler.server_args, "retraction_policy", "length") != "length":
        return original(batch, *args)  # the operator chose one; "length" is SGLang's default

    def decide() -> list[int]:
        memory = memory_of(state)
        memory.follow(batch.reqs)
        weight = np.array([state.promise(req).slo.weight for req in batch.reqs])
        view = dataclasses.replace(memory.view(batch, state.now()), weight=weight)
        return memory.planner.retract(view)

    order = state.agree(state.guarded("retraction", decide, None))
    if order is None:
        return original(batch, *args)
    # SGLang asks the batch for its order. An attribute on this batch answers in its place.
    batch._get_decode_retraction_order = lambda reqs, *args, **kwargs: list(order)
    state.counters["retractions"] += 1
    try:
        return original(batch, *args)
    finally:
        del batch._get_decode_retraction_order


def prepare_for_decode(original: Callable[..., Any], batch: Any) -> None:
    """Seam of ScheduleBatch.prepare_for_decode: prepare only the requests chosen to run."""
    state = current()
    if state is None or not state.deciding:
        original(batch)
        return
    memory = memory_of(state)
    keep = _choose(state, batch)
    if keep is None or len(keep) == len(batch.reqs):
        memory.table.ran(None)
        original(batch)
        return
    memory.table.ran(keep)
    if memory.subset is None or not memory.subset.fits(batch, keep):
        memory.subset = SubsetView(batch, keep)
        state.counters["subset_views"] += 1
    memory.subset.advance(original, batch)
    state.subset = memory.subset.batch
    state.counters["subset_steps"] += 1
    state.counters["parked"] += len(batch.reqs) - len(keep)


def _choose(state: KairosState, batch: Any) -> list[int] | None:
    """Returns the indices of the running requests that decode in this step, ascending; None: all."""
    memory, now = memory_of(state), state.now()
    memory.follow(batch.reqs)
    memory.table.now(now)
    if len(batch.reqs) < 2:
        return None
    blocker = features.why_not("park", state.scheduler, batch)
    if blocker:
        state.log_once(f"park:{blocker}", f"decode packing is off while {blocker}: full batch")
        state.counters["fallback_steps"] += 1
        return None

    def decide() -> list[int] | None:
        view = memory.view(batch, now)
        choice = memory.planner.choose(view, state.step_time)
        tell_breaker(state, memory.planner.breaker)
        if choice is None:
            return None
        memory.table.columns[SERVED] = choice.served
        if state.logging:
            _record(state, view, choice)
        return choice.run

    agreed: list[int] | None = state.agree(state.guarded("packing", decide, None))
    return agreed


def _record(state: KairosState, view: RunningView, choice: StepChoice) -> None:
    planner, config = memory_of(state).planner, state.config
    state.record(
        "decode",
        slack_s=view.slack_s.tolist(),
        tpot_s=view.tpot_s.tolist(),
        context_tokens=view.context_tokens.tolist(),
        silent_s=view.silent_s.tolist(),
        served=view.served.tolist(),
        error=dataclasses.asdict(state.step_time.error),
        expected_output=planner.statistics.output_tokens,
        reserve_tokens=reserve_of(state.step_time.error.mape),
        horizon_tokens=planner.horizon_tokens,
        model=state.step_time.snapshot(),
        min_throughput=config.min_throughput,
        max_itl_s=config.max_itl_ms / 1e3,
        run=choice.run,
        reason=choice.reason,
    )


def _remember_step(state: KairosState, batch: Any) -> None:
    """Teaches the step-time model from the cadence of consecutive decode decisions."""
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
