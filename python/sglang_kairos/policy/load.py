"""What each running decode costs: the law of a step, made linear around the operating point.

    step(batch) = base + sum_i cost_i                seconds; cost_i of request i, base of nobody
    cost_i = each + token * context_i

The operating point is the batch that will run: the largest one, of requests of the mean context, whose
step is within the limit. There `each` is the slope over the upper half of the batch, `token` that over
the upper half of its KV tokens. Elsewhere the line is not worth much: in a mixture of experts the
first few requests of a batch cost far more than the next few (each wakes more experts), so that
averaged from 1 on the base comes out several times too small; and of a crowd far beyond the limit
the slope is flatter and the base larger than whatever can be kept on pace will see.

A request that needs a token every `tpot_i` needs the share  cost_i / tpot_i  of the time, and
somebody's `tpot` goes to the base: all can be kept on pace iff
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
    """`base` (seconds), `cost` (n,) of requests with these contexts, and (m,) of `more` to come.

    `step_s(batch, kv_tokens)`: predicted seconds, monotone, of scalars. `limit_s`: the step aimed
    at. The operating point has two requests at least: one alone does not tell what a second adds.
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
    """Whose TPOT target a step of its own would meet: mask (n,), n > 0; None for everybody's."""
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
    """The largest size with `seconds_of(size) <= limit_s`, and these; `seconds_of` is monotone.

    `fits`, `fails`: a size that fits (or is the answer for want of a smaller one) and one that does
    not, each with its seconds. Every question costs microseconds, so where the answer lies on the
    line between what is known is asked first, and what remains is halved every third time, lest a
    bent line makes it slow.
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
