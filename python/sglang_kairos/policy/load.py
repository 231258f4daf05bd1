"""Splits the time of a decode step over its requests: the latency model, linearised where it will run.

The formula is in seconds.
    step(batch) = base + sum_i cost_i          base: belongs to no request
    cost_i      = each + token * context_i     context_i: KV tokens of request i

A request that needs a token every tpot_i takes the share cost_i / tpot_i of the time, and the base
takes base / min tpot. So all requests can be kept on pace iff
    base / min tpot + sum_i cost_i / tpot_i <= 1

Where it is linearised: at the largest batch of requests of mean context whose step is within the
limit. There `each` is the slope over the upper half of the batch, `token` the slope over the upper
half of its KV tokens.

Why there: in a mixture of experts the first requests of a batch cost far more than the next ones,
because each wakes more experts. Averaged from one request on, the base comes out several times too
small. Far beyond the limit the slope is flatter and the base larger than any batch on pace will
see.

Trade-off: the line is only good near that batch. `decode_step` therefore checks the step it chose with
the latency model itself.
Source: our own design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Floats = Sequence[float] | Array
StepTime = Callable[[Any, Any], Any]


def step_costs(
    step_s: StepTime, context_tokens: Array, limit_s: float, more_tokens: Array | None = None
) -> tuple[float, Array, Array]:
    """Returns `base` (seconds), `cost` (n,) of the running requests, and (m,) of those in `more_tokens`.

    `step_s(batch, kv_tokens)`: predicted seconds of scalars, monotone in both. `context_tokens`
    (n,), `more_tokens` (m,): KV tokens per request. `limit_s`: the step time aimed at. The line is
    taken at two requests at least: one alone does not tell what a second adds.
    """
    known, in_all = context_tokens.size, float(context_tokens.sum())
    if more_tokens is not None:
        known, in_all = known + more_tokens.size, in_all + float(more_tokens.sum())
    mean = in_all / known

    def seconds_of(size: int) -> float:
        return float(step_s(size, size * mean))

    count = max(2, known)
    full = seconds_of(count)
    if full > limit_s:
        count, full = largest_fitting(seconds_of, limit_s, (1, seconds_of(1)), (count, full))
        if count < 2:
            count, full = 2, seconds_of(2)
    tokens = count * mean
    half = count // 2
    each = (full - float(step_s(half, tokens))) / (count - half)
    token = 2.0 * (full - float(step_s(count, 0.5 * tokens))) / tokens if tokens else 0.0
    cost = each + token * context_tokens
    extra = np.zeros(0) if more_tokens is None else each + token * more_tokens
    return max(0.0, full - count * each - token * tokens), cost, extra


def within_reach(
    step_s: StepTime, context_tokens: Array, tpot_s: Array
) -> NDArray[np.bool_] | None:
    """Returns the mask (n,) of TPOT targets that a step alone would meet; None: all. Needs n > 0."""
    if float(step_s(1, float(context_tokens.max()))) <= float(tpot_s.min()):
        return None
    alone: Array = step_s(np.ones(context_tokens.size, np.int64), context_tokens)
    return alone <= tpot_s


def largest_fitting(
    seconds_of: Callable[[int], float],
    limit_s: float,
    fits: tuple[int, float],
    fails: tuple[int, float],
) -> tuple[int, float]:
    """Returns the largest size with `seconds_of(size) <= limit_s`, and its seconds.

    `seconds_of` is monotone. `fits`: a size that fits, or the answer if no larger one does;
    `fails`: a size that does not fit. Both come with their seconds. Each call costs microseconds,
    so the search interpolates first; every third time it halves what is left, in case the curve is
    bent.
    """
    (low, low_s), (high, high_s) = fits, fails
    turn = 0
    while high - low > 1:
        turn += 1
        middle = (low + high) // 2
        if turn % 3 and high_s > low_s:
            on_line = low + int((limit_s - low_s) / (high_s - low_s) * (high - low))
            middle = min(max(on_line, low + 1), high - 1)
        seconds = seconds_of(middle)
        if seconds <= limit_s:
            low, low_s = middle, seconds
        else:
            high, high_s = middle, seconds
    return low, low_s
