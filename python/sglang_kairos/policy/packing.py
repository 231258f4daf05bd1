"""Which running decodes take part in the next step: as many requests on their TPOT as possible.

All arrays have shape (n,), one entry per running request; times in seconds, context in KV tokens.
    lead_i  = slack_i - tpot_i       > 0: the last token came early; the final TPOT is met iff the
                                     lead is >= 0 when the last token comes
    pace_i  = tpot_i + min(0, lead_i - BUFFER tpot_i) / HORIZON       >= FLOOR tpot_i
                                     longest mean step that restores a small lead in HORIZON tokens
    cost_i  = what i adds to the full step;   load_i = cost_i / pace_i
A request LOST tokens or more behind its pace is given up: it takes what others leave.

1. If the step of everybody fits everybody's pace, everybody runs: stock behaviour.
2. Otherwise the *served* set is the largest that can be kept on pace for good: lightest load first
   while  base / min pace + sum load <= 1  (fewest seconds per token first is optimal for a count,
   as in the unit-value knapsack). Its smallest pace is the limit of this step. A request that falls
   behind thereby shrinks the served set, at its expensive end, before the others fall behind too.
3. The step is filled up to that limit: who would otherwise be silent for `max_itl_s`, then the
   served who miss their pace within URGENT steps, then the other served, the recoverable, the given
   up; lightest first within each. The rest is parked. Silent ones are fetched one a step, the most
   silent first, early enough that they never come due in a crowd.

Our own design; no claim that any paper's formula looks like it. Constants: tuned in simulation
(test_packing.py) and flat around these values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = Sequence[float] | NDArray[np.float64]
StepTime = Callable[[Any, Any], Any]

BUFFER = 1.0
HORIZON = 20.0
FLOOR = 0.8
LOST = 3.0
URGENT = 3.0


@dataclass(frozen=True, slots=True)
class StepChoice:
    """`run`: indices that take part, ascending; `predicted_s`: their step.

    `reason`: "all" run, "packed" (every recoverable request is kept on pace) or "overload" (some
    recoverable request is not)."""

    run: list[int]
    predicted_s: float
    reason: str


def choose_step(
    slack_s: Floats,
    tpot_s: Floats,
    context_tokens: Floats,
    silent_s: Floats,
    step_s: StepTime,
    *,
    max_itl_s: float,
    captured_sizes: Sequence[int] | None = None,
) -> StepChoice:
    """The requests to run now; never empty for n > 0.

    `slack_s`: time until the next token is due, (first token + emitted * tpot) - now. `silent_s`:
    time since the last token. `step_s(batch, kv_tokens)`: predicted seconds, monotone, for scalars
    and arrays. `captured_sizes`: ascending batch sizes that a step is padded up to, unless `step_s`
    already does so.
    """
    slack, tpot = np.asarray(slack_s, float), np.asarray(tpot_s, float)
    context, silent = np.asarray(context_tokens, float), np.asarray(silent_s, float)
    n = slack.size
    if n == 0:
        return StepChoice([], 0.0, "all")
    step = step_s if captured_sizes is None else _padded(step_s, captured_sizes)
    total = float(context.sum())
    full = float(step(n, total))
    pace = tpot + np.minimum(0.0, slack - (1.0 + BUFFER) * tpot) / HORIZON
    alive = slack > (1.0 - LOST) * tpot
    np.maximum(pace, FLOOR * tpot, out=pace)
    if full <= float(np.where(alive, pace, tpot).min()):
        return StepChoice(list(range(n)), full, "all")

    empty = float(step(1, 0.0))
    each = (float(step(n, 0.0)) - empty) / max(1, n - 1)
    cost = each + full - np.asarray(step(np.full(n, n), total - context), float)
    lightest = np.argsort(cost / pace, kind="stable")
    lightest = lightest[alive[lightest]]
    load = np.cumsum(cost[lightest] / pace[lightest])
    load += max(0.0, empty - each) / np.minimum.accumulate(pace[lightest])
    kept = lightest[: max(1, int(np.searchsorted(load, 1.0, side="right")))]
    limit = float(pace[kept].min()) if kept.size else float(tpot.min())
    served = np.zeros(n, bool)
    served[kept] = True

    due = silent + 2.0 * limit >= max_itl_s
    others = np.flatnonzero(~served)
    if others.size:
        queue = others[np.argsort(-silent[others], kind="stable")]
        if np.any(silent[queue] + limit * (np.arange(queue.size) + 2.0) > max_itl_s):
            due[queue[0]] = True
    urgent = slack < URGENT * limit
    tier = np.select([due, served & urgent, served, alive], [0, 1, 2, 3], 4)
    order = np.lexsort((cost, tier))
    steps = np.asarray(step(np.arange(1, n + 1), np.cumsum(context[order])), float)
    count = max(1, int(np.count_nonzero(due)), int(np.searchsorted(steps, limit, side="right")))
    reason = "packed" if kept.size == lightest.size else "overload"
    return StepChoice(np.sort(order[:count]).tolist(), float(steps[count - 1]), reason)


def _padded(step_s: StepTime, captured_sizes: Sequence[int]) -> StepTime:
    sizes = np.asarray(captured_sizes)

    def step(batch: Any, kv_tokens: Any) -> Any:
        at = np.searchsorted(sizes, batch)
        padded = np.where(at < sizes.size, sizes[np.minimum(at, sizes.size - 1)], batch)
        return step_s(padded, kv_tokens)

    return step
