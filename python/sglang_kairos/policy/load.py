"""What each running request adds to a decode step: the latency model, linear near the next batch.

    step(batch) = base + sum_i cost_i        seconds; `cost_i` of request i, `base` of no request
    cost_i = each + token * context_i        context in KV tokens

The operating point is the largest batch of mean-context requests whose step is within the limit.
There `each` is the slope over the upper half of the batch, and `token` the slope over the upper
half of its KV tokens. Elsewhere the line is worth little. In a mixture of experts the first few
requests of a batch cost far more than the next, since each wakes more experts. A line averaged from
one request on would have a base several times too small. For a crowd far beyond the limit the slope
is flatter and the base larger than any sustained request will see.

A request that needs a token every `tpot_i` seconds needs the share  cost_i / tpot_i  of the time.
All can be held to their targets exactly if
    base / min tpot + sum_i cost_i / tpot_i <= 1
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
    """Returns `base` (seconds), `cost` (n,) of these contexts, and `cost` (m,) of `more_tokens`.

    `step_s(batch, kv_tokens)`: predicted seconds, monotone, for scalars. `limit_s`: the longest
    step aimed at. The operating point has at least two requests: one does not tell what a second
    adds.
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
    """Returns the mask (n,) of requests that would meet their TPOT target alone; None if all would.

    Needs n > 0. `step_s(batch, kv_tokens)` takes scalars and arrays.
    """
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

    `seconds_of` must be monotone. `fits`: a size that fits, or the answer for want of a smaller
    one; `fails`: one that does not; each with its seconds. Each call costs microseconds. So the
    search tries a straight line between the known points first. Every third time it halves the
    range, lest a bent line makes it slow.
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
