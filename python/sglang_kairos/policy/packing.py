"""Which running decodes take part in the next step: as many requests on their TPOT as possible.

All arrays have shape (n,), one entry per running request; times in seconds, context in KV tokens.
    lead_i  = slack_i - tpot_i       how early the last token came; the final TPOT is met iff it
                                     is >= 0 when the last token comes
    pace_i  = tpot_i + (lead_i - BUFFER tpot_i) / HORIZON, within FLOOR..CEILING of tpot_i
                                     longest mean step that brings the lead to BUFFER tokens within
                                     HORIZON tokens: shorter for who is behind, longer for who is
                                     ahead
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
FLOOR = 0.7
CEILING = 1.3
LOST = 10.0
URGENT = 3.0


@dataclass(frozen=True, slots=True)
class StepChoice:
    """`run`: indices that take part, ascending; `predicted_s`: their step.

    `reason`: "all" run, "packed" (everybody can be kept on pace) or "overload" (somebody not)."""

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
    lead = slack - tpot
    pace = tpot + (lead - BUFFER * tpot) / HORIZON
    pace = np.minimum(np.maximum(pace, FLOOR * tpot), CEILING * tpot)
    alive = lead > -LOST * tpot
    if full <= float(np.where(alive, pace, tpot).min()):
        return StepChoice(list(range(n)), full, "all")

    empty = float(step(1, 0.0))
    each = (float(step(n, 0.0)) - empty) / max(1, n - 1)
    cost = each + full - np.asarray(step(n, total - context), float)
    lightest = np.argsort(cost / pace, kind="stable")
    lightest = lightest[alive[lightest]]
    paces = pace[lightest]
    load = np.cumsum(cost[lightest] / paces)
    load += max(0.0, empty - each) / np.minimum.accumulate(paces)
    kept = int(load.searchsorted(1.0, side="right"))
    limit = float(paces[: max(1, kept)].min()) if paces.size else float(tpot.min())
    served = np.zeros(n, bool)
    served[lightest[: max(1, kept)]] = True

    due = _due(silent, cost, served, limit, max_itl_s)
    urgent = slack < URGENT * limit
    tier = 4 - alive.astype(np.int8) - served - (served & urgent)
    tier[due] = 0
    order = np.lexsort((cost, tier))
    steps = np.asarray(step(np.arange(1, n + 1), np.cumsum(context[order])), float)
    count = max(1, int(np.count_nonzero(due)), int(steps.searchsorted(limit, side="right")))
    reason = "packed" if kept == n else "overload"
    return StepChoice(np.sort(order[:count]).tolist(), float(steps[count - 1]), reason)


def _due(
    silent: NDArray[np.float64],
    cost: NDArray[np.float64],
    served: NDArray[np.bool_],
    limit: float,
    max_itl_s: float,
) -> NDArray[np.bool_]:
    """Who must run now lest somebody is silent for longer than `max_itl_s`: mask (n,)."""
    if float(silent.max() + cost.sum()) + limit * (silent.size + 2) < max_itl_s:
        return np.zeros(silent.size, bool)
    wait = silent + cost + 2.0 * limit
    due = wait >= max_itl_s
    while due.any():  # fetching them makes this very step longer
        later = wait + float(cost[due].sum()) >= max_itl_s
        if np.array_equal(later, due):
            return due
        due = later
    queue = np.flatnonzero(~served)
    queue = queue[np.argsort(-silent[queue], kind="stable")]
    turn = np.cumsum(limit + cost[queue]) + limit
    if np.any(silent[queue] + turn > max_itl_s):
        due[queue[0]] = True
    return due


def _padded(step_s: StepTime, captured_sizes: Sequence[int]) -> StepTime:
    sizes = np.asarray(captured_sizes)

    def step(batch: Any, kv_tokens: Any) -> Any:
        at = np.searchsorted(sizes, batch)
        padded = np.where(at < sizes.size, sizes[np.minimum(at, sizes.size - 1)], batch)
        return step_s(padded, kv_tokens)

    return step
