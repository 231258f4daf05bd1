"""Teaches the predictor how long executed prefill steps took.

SGLang stamps a batch at its launch and adds up busy time, since v0.5.21 in spans that do not
overlap. v0.5.16 does neither, and v0.5.17 to v0.5.20 add up other spans. There two more seams take
the same two times: `run_batch` the launch, `process_batch_result` the end.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from sglang_kairos.engine.state.scheduler_state import KairosState, current


def record_step_counters(
    original: Callable[..., Any], scheduler: Any, batch: Any, result: Any
) -> None:
    """Seam of Scheduler._record_step_counters: feed executed prefill steps to the predictor.

    SGLang takes a step's end when its result is processed. With overlap on a CPU that is after the
    next forward, so there `learn_from_synchronous_step` measures instead.
    """
    before = scheduler.total_prefill_busy_us
    original(scheduler, batch, result)
    _learn_from_result(batch, (scheduler.total_prefill_busy_us - before) / 1e6)


def run_batch(
    original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """Seam of Scheduler.run_batch where its busy time is not a batch's own (to v0.5.20)."""
    if not batch.forward_mode.is_extend_without_speculative():
        return original(scheduler, batch, *args, **kwargs)
    batch.launch_ts = time.monotonic()
    result = original(scheduler, batch, *args, **kwargs)
    # SGLang processes a copy of the batch with its own fields only, but the same result object.
    result.launch_ts = batch.launch_ts
    return result


def process_batch_result(
    original: Callable[..., Any], scheduler: Any, batch: Any, result: Any
) -> Any:
    """Seam of Scheduler.process_batch_result where busy time is not a batch's own (to v0.5.20).

    A step lasts to the moment its result is there, as in later versions. It starts at its launch,
    or at the end of the one before where they overlap.
    """
    done = original(scheduler, batch, result)
    state, launched_s = current(), getattr(result, "launch_ts", None)
    if state is not None and launched_s is not None:
        end_s = time.monotonic()
        started_s = max(launched_s, state.prefill_end_s)
        state.prefill_end_s = end_s
        _learn_from_result(batch, end_s - started_s)
    return done


def learn_from_synchronous_step(state: KairosState) -> None:
    """On a CPU the forward has ended by the time the scheduler asks for the next batch."""
    batch, state.launched = state.launched, None
    launched_s = getattr(batch, "launch_ts", None)  # missing without the seam of run_batch
    if state.synchronous and launched_s is not None and batch.extend_lens:
        _learn(state, batch, time.monotonic() - launched_s)


def _learn_from_result(batch: Any, seconds: float) -> None:
    state = current()
    if state is None or state.synchronous or seconds <= 0 or not batch.extend_lens:
        return
    _learn(state, batch, seconds)


def _learn(state: KairosState, batch: Any, seconds: float) -> None:
    seconds = state.clock.measured(seconds)
    learn = functools.partial(
        state.prefill_time.observe, batch.extend_lens, batch.prefix_lens, seconds
    )
    state.guarded("prefill_time", learn, None)
    if len(batch.extend_lens) == 1:
        state.steps.add(batch.extend_lens[0], batch.prefix_lens[0], seconds)
    state.learnt()
    state.record(
        "prefill_step",
        new_tokens=list(batch.extend_lens),
        prefix_tokens=list(batch.prefix_lens),
        seconds=seconds,
    )
