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

from bisect import bisect_right
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
    more = np.zeros(0) if more_tokens is None else more_tokens
    known = context_tokens.size + more.size
    mean = (float(context_tokens.sum()) + float(more.sum())) / known
    count = max(2, known)
    if float(step_s(count, count * mean)) > limit_s:
        fits = bisect_right(range(1, count), limit_s, key=lambda size: step_s(size, size * mean))
        count = max(2, fits)
    tokens = count * mean
    full = float(step_s(count, tokens))
    half = count // 2
    each = (full - float(step_s(half, tokens))) / (count - half)
    token = 2.0 * (full - float(step_s(count, 0.5 * tokens))) / tokens if tokens else 0.0
    cost = each + token * context_tokens
    return max(0.0, full - count * each - token * tokens), cost, each + token * more
