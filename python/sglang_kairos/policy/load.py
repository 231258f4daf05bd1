"""What each running decode costs: the law of a step, made linear around the operating point.

    step(everybody) = base + sum_i cost_i            seconds; cost_i of request i, base of nobody
    cost_i = each + token * context_i

`each` is the slope over the upper half of the batch, from n/2 to n requests, `token` that over the
upper half of the KV tokens. The first few requests
of a batch can cost far more than the next few (a mixture of experts wakes more experts, small
batches leave a GPU idle): averaged from 1 on, the base comes out several times too small.

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
    step_s: StepTime, context_tokens: Array, more_tokens: Array | None = None
) -> tuple[float, Array, Array]:
    """`base` (seconds), `cost` (n,) of requests with these contexts, and (m,) of `more` to come.

    `step_s(batch, kv_tokens)`: predicted seconds, monotone, of scalars. The operating point is that
    of the n requests, of two where there are fewer: one alone does not tell what a second adds.
    """
    more = np.zeros(0) if more_tokens is None else more_tokens
    count = max(2, context_tokens.size)
    tokens = float(context_tokens.sum()) if context_tokens.size else float(more.mean())
    full = float(step_s(count, tokens))
    half = count // 2
    each = (full - float(step_s(half, tokens))) / (count - half)
    token = 2.0 * (full - float(step_s(count, 0.5 * tokens))) / tokens if tokens else 0.0
    cost = each + token * context_tokens
    return max(0.0, full - count * each - token * tokens), cost, each + token * more
