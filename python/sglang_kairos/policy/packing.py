"""Which running decodes take part in the next step: as many requests on their TPOT as possible.

All arrays have shape (n,), one entry per running request; times in seconds, context in KV tokens.
    lead_i  = slack_i - tpot_i       how early the last token came; the final TPOT is met iff it
                                     is >= 0 when the last token comes
    pace_i  = tpot_i + (lead_i - reserve tpot_i) / horizon, within FLOOR..CEILING of tpot_i
                                     longest mean step with which the lead comes down to `reserve`
                                     tokens in `horizon` ones: shorter for who is behind, longer for
                                     who is ahead
    cost_i  = what i adds to the step (`load`);   load_i = cost_i / pace_i
A request LOST tokens or more behind its pace is given up, and so is one whose TPOT target even a step
of its own would miss: it takes what others leave. Where all are given up nobody gains from a short
step, and everybody runs.

1. If the step of everybody fits everybody's allowed, everybody runs: stock behaviour.
2. Otherwise the *sustained* set is the largest that can be kept on pace for good: for each of some
   limits L, those with pace >= L, lightest load first while  base / L + sum load <= 1  (fewest
   seconds per token first is optimal for a count, as in the unit-value knapsack); the L that serves
   the most wins. So nobody who has fallen behind drags all others to his pace. Who was sustained
   before counts as INCUMBENT of its load: the set does not flap.
3. The step is filled up to that limit: who would otherwise be silent for `max_itl_s`, then the
   sustained who miss their pace within URGENT steps, then the other sustained, the recoverable, the given
   up; lightest first within each. The rest is parked. Silent ones are fetched one a step, the most
   silent first, early enough that they never come due in a crowd, and with SPARE steps to go: a step
   may take longer than predicted, and its tokens take their time to the client.

4. Where that would make fewer than `min_throughput` times the tokens per second that the step of
   everybody makes, the step is filled further, in the same order, until it does not.

Where the fixed part of a step is large, a step a little shorter means far fewer requests (25 ms of
which 17 are fixed: 1 % is 3 % of the batch). So there is no margin on a step: whoever falls behind is
noticed by its lead. But where steps scatter around their predictions, who aims at a lead of nothing
ends late every other time: the worse the predictions, the larger the `reserve_tokens` aimed at.
It must be there when a request ends, so the `horizon_tokens` are half of what requests usually
have, HORIZON at most.

Our own design; no claim that any paper's formula looks like it. Constants: tuned in simulation and
flat around these values (docs/decode.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.load import Floats, StepTime, largest_fitting, step_costs, within_reach

HORIZON, SHORTEST_HORIZON = 60.0, 12.0
RESERVE_PER_ERROR = 30.0
MOST_RESERVE = 8.0
FLOOR = 0.7
CEILING = 1.3
LOST = 10.0
URGENT = 3.0
SPARE = 3.0
LIMITS = 8
INCUMBENT = 0.5


@dataclass(frozen=True, slots=True)
class StepChoice:
    """`run`: indices that take part, ascending; `predicted_s`: their step. `sustained`: mask (n,) of
    who is to be kept on allowed, for the next choice.

    `reason`: "all" run, "packed" (everybody can be kept on allowed) or "overload" (somebody not)."""

    run: list[int]
    predicted_s: float
    reason: str
    sustained: NDArray[np.bool_]


def choose_step(
    slack_s: Floats,
    tpot_s: Floats,
    context_tokens: Floats,
    silent_s: Floats,
    step_s: StepTime,
    *,
    max_itl_s: float,
    sustained: NDArray[np.bool_] | None = None,
    reserve_tokens: float = 0.0,
    horizon_tokens: float = HORIZON,
    min_throughput: float = 0.0,
) -> StepChoice:
    """The requests to run now; never empty for n > 0.

    `slack_s`: time until the next token is due, (first token + emitted * tpot) - now. `silent_s`:
    time since the last token. `step_s(batch, kv_tokens)`: predicted seconds, monotone, for scalars
    and arrays. `sustained`: the last choice's, False for who has joined since (None: nobody was).
    `reserve_tokens`: the lead to end with, of `reserve_of`; `horizon_tokens`: of `horizon_of`.
    `min_throughput`: 0 to 1.
    """
    slack, tpot = np.asarray(slack_s, float), np.asarray(tpot_s, float)
    context, silent = np.asarray(context_tokens, float), np.asarray(silent_s, float)
    n = slack.size
    if n == 0:
        return StepChoice([], 0.0, "all", np.zeros(0, bool))
    full = float(step_s(n, float(context.sum())))
    lead = slack - tpot
    alive = lead > -LOST * tpot
    living = np.count_nonzero(alive)
    wanted = _unbounded_step_s(lead, tpot, reserve_tokens, horizon_tokens)
    tightest = wanted if living == n else np.where(alive, wanted, tpot)
    if full <= float(tightest.min()):
        return StepChoice(list(range(n)), full, "all", np.ones(n, bool))
    reach = within_reach(step_s, context, tpot)
    if reach is not None:
        alive &= reach
        living = np.count_nonzero(alive)
    if not living:
        return StepChoice(list(range(n)), full, "overload", np.zeros(n, bool))

    allowed = _within_bounds(wanted, tpot)
    base, cost, _ = step_costs(step_s, context, float(tpot.sum()) / n)
    load = cost / allowed
    sustained = _sustained(load, allowed, base, None if living == n else alive, sustained)
    limit = float(allowed[sustained].min())
    due = _due(silent, cost, sustained, limit, max_itl_s)
    tier = 4 - alive.astype(np.int8) - sustained - (sustained & (slack < URGENT * limit))
    if due is not None:
        tier[due] = 0
    order = np.lexsort((cost, tier))
    tokens = context[order].cumsum()
    count, predicted = n, full
    if full > limit:
        count, predicted = largest_fitting(
            lambda size: float(step_s(size, tokens.item(size - 1))), limit, (0, base), (n, full)
        )
    fitting, count = count, max(1, count, 0 if due is None else int(np.count_nonzero(due)))
    if min_throughput > 0.0:
        sizes = np.arange(count, n + 1)
        enough = sizes / step_s(sizes, tokens[count - 1 :]) >= min_throughput * n / full
        count += int(np.argmax(enough))
    if count > fitting:
        predicted = float(step_s(count, tokens.item(count - 1)))
    packed = predicted <= limit and np.count_nonzero(sustained) == n
    run = np.sort(order[:count]).tolist()
    return StepChoice(run, predicted, "packed" if packed else "overload", sustained)


def reserve_of(mean_error: float) -> float:
    """The lead to aim at, in tokens, where steps are predicted with this mean relative error."""
    return min(MOST_RESERVE, RESERVE_PER_ERROR * mean_error)


def horizon_of(expected_output: float) -> float:
    """Tokens in which a lead is to be made up or used, where requests have so many on average."""
    return min(HORIZON, max(SHORTEST_HORIZON, 0.5 * expected_output))


def safe_step_s(
    tightest_tpot_s: float, reserve_tokens: float, horizon_tokens: float = HORIZON
) -> float:
    """A step of everybody that is no longer than this needs no choice, whatever the leads."""
    return tightest_tpot_s * (1.0 - reserve_tokens / horizon_tokens)


def allowed_step_s(
    lead_s: NDArray[np.float64],
    tpot_s: NDArray[np.float64],
    reserve_tokens: float,
    horizon_tokens: float = HORIZON,
) -> NDArray[np.float64]:
    """The longest mean step each may see, (n,)."""
    return _within_bounds(_unbounded_step_s(lead_s, tpot_s, reserve_tokens, horizon_tokens), tpot_s)


def _within_bounds(
    allowed_step_s: NDArray[np.float64], tpot_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    return np.minimum(np.maximum(allowed_step_s, FLOOR * tpot_s), CEILING * tpot_s)


def _unbounded_step_s(
    lead_s: NDArray[np.float64],
    tpot_s: NDArray[np.float64],
    reserve_tokens: float,
    horizon_tokens: float,
) -> NDArray[np.float64]:
    return tpot_s + (lead_s - reserve_tokens * tpot_s) / horizon_tokens


def _sustained(
    load: NDArray[np.float64],
    allowed: NDArray[np.float64],
    base: float,
    alive: NDArray[np.bool_] | None,
    before: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """The largest set that can be kept on pace: mask (n,); somebody, as somebody is alive.

    `alive`: who may be in it, None for all.
    """
    key = load if before is None else np.where(before, INCUMBENT * load, load)
    lightest = key.argsort(kind="stable")
    if alive is not None:
        lightest = lightest[alive[lightest]]
    allowed_steps, loads = allowed[lightest], load[lightest]
    slowest = np.sort(allowed_steps)
    last = allowed_steps.size - 1
    limits = {float(slowest[at * last // (LIMITS - 1)]) for at in range(LIMITS)}
    lowest, *higher = sorted(limits)
    count = int(loads.cumsum().searchsorted(1.0 - base / lowest, "right"))
    chosen = lightest[:count]
    for limit in higher:
        members = (allowed_steps >= limit).nonzero()[0]
        if members.size < count:
            break  # nor has any higher limit enough of them
        fitting = int(loads[members].cumsum().searchsorted(1.0 - base / limit, "right"))
        if fitting >= count:
            count, chosen = fitting, lightest[members[:fitting]]
    sustained = np.zeros(load.size, bool)
    sustained[chosen if count else lightest[:1]] = True
    return sustained


def _due(
    silent: NDArray[np.float64],
    cost: NDArray[np.float64],
    sustained: NDArray[np.bool_],
    limit: float,
    max_itl_s: float,
) -> NDArray[np.bool_] | None:
    """Who must run now lest somebody is silent for longer than `max_itl_s`: mask (n,); None: nobody."""
    latest_s = max_itl_s - (SPARE - 1.0) * limit
    longest_s, longest_turn_s = float(silent.max()), limit + float(cost.max())
    queue = np.flatnonzero(~sustained)
    if longest_s + max(1, queue.size) * longest_turn_s < latest_s:
        return None
    turn = limit + cost
    if longest_s + max(longest_turn_s, float(turn[queue].sum())) < latest_s:
        return None
    wait = silent + turn
    due = wait >= latest_s
    while due.any():  # fetching them makes this very step longer
        later = wait + float(cost[due].sum()) >= latest_s
        if np.array_equal(later, due):
            return due
        due = later
    queue = queue[np.argsort(-silent[queue], kind="stable")]
    if np.any(silent[queue] + np.cumsum(turn[queue]) > latest_s):
        due[queue[0]] = True
    return due
