"""Chooses which running requests take part in the next decode step, so that most meet their TPOT.

Why choose it: when the step of all is longer than the tightest TPOT target, everybody misses it.
Parking some (their KV stays) lets the others meet theirs. With enough slack this is stock SGLang.

Formula. Arrays have shape (n,), one entry per running request. Times are seconds, context KV
tokens.
    lead_i = slack_i - tpot_i        how early the last token came. TPOT is met iff the lead is >= 0
                                     when the last token comes.
    pace_i = tpot_i + (lead_i - reserve * tpot_i) / horizon     bounded to FLOOR..CEILING of tpot_i
                                     the longest mean step with which the lead comes down to
                                     `reserve` tokens within `horizon` tokens
    load_i = cost_i / pace_i         share of the time it takes; cost_i and base are from `load`

1. If the step of all fits every pace, all run.
2. Otherwise find the largest set that can stay *on pace* (`served`). For each of LIMITS values L:
   take the requests with pace >= L, lightest load first, while  base / L + sum load <= 1.
   The L with the most members wins, so a request that has fallen behind slows down nobody else.
   For a count, lightest first is optimal, as in the unit-value knapsack. Members of the last set
   count with INCUMBENT of their load, so that the set does not flap.
3. Fill the step up to the least pace in the set, lightest first within each group:
       - requests that would be silent for `max_itl_s`
       - members that miss their pace within URGENT steps
       - other members
       - requests that can still recover
       - those given up
   The rest is parked.
4. If that makes fewer than `min_throughput` times the tokens/s of a step of all, fill on.

A request LOST or more tokens behind is *given up*, and so is one whose TPOT target is shorter than
a step of its own. It takes what the others leave. If all are given up, all run.

Silent requests are fetched one per step, the most silent first, early enough that they do not come
due together. SPARE steps are left before the limit: a step may take longer than predicted, and
tokens take time to reach the client.

A step has no safety margin. Where 17 of 25 ms are fixed, a step 1 % shorter holds 3 % fewer
requests. The lead shows who falls behind instead. Where predictions scatter, a lead of nothing ends
late half of the time, so the worse the predictions, the larger the `reserve`. It must be there when
a request ends: `horizon` is half of the usual output length, HORIZON at most.

Trade-offs and starvation. Under overload requests that are given up wait for capacity, at most
`max_itl_s` between two tokens. Parked requests keep their KV, so where memory is the bottleneck
parking cannot help (`admission` does). Tokens/s may fall to `min_throughput` of stock's.

Source: our own design; no claim that a paper's formula looks like it. The constants were tuned in
simulation, and results are flat around them (docs/decode.md).
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
    """Which requests run in the next step.

    `run`: indices that take part, ascending. `predicted_s`: seconds of their step. `served`: mask
    (n,) of the requests on pace, for the next choice. `reason`: "all" run; "packed": all can be
    kept on pace, some sit out; "overload": not all can be kept on pace.
    """

    run: list[int]
    predicted_s: float
    reason: str
    served: NDArray[np.bool_]


def choose_step(
    slack_s: Floats,
    tpot_s: Floats,
    context_tokens: Floats,
    silent_s: Floats,
    step_s: StepTime,
    *,
    max_itl_s: float,
    served: NDArray[np.bool_] | None = None,
    reserve_tokens: float = 0.0,
    horizon_tokens: float = HORIZON,
    min_throughput: float = 0.0,
) -> StepChoice:
    """Returns the requests to run now; never none for n > 0.

    `slack_s`: seconds until the next token is due, (first token + emitted * tpot) - now.
    `silent_s`: seconds since the last token. `max_itl_s`: longest silence allowed.
    `step_s(batch, kv_tokens)`: predicted seconds, monotone in both, for scalars and arrays.
    `served`: mask of the last choice, False for requests that joined since; None: no last choice.
    `reserve_tokens`: the lead to end with, from `reserve_of`. `horizon_tokens`: from `horizon_of`.
    `min_throughput`: least tokens/s, as a fraction (0 to 1) of what a step of all would produce.
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
    wanted = _bare_pace_s(lead, tpot, reserve_tokens, horizon_tokens)
    tightest = wanted if living == n else np.where(alive, wanted, tpot)
    if full <= float(tightest.min()):
        return StepChoice(list(range(n)), full, "all", np.ones(n, bool))
    reach = within_reach(step_s, context, tpot)
    if reach is not None:
        alive &= reach
        living = np.count_nonzero(alive)
    if not living:
        return StepChoice(list(range(n)), full, "overload", np.zeros(n, bool))

    pace = _within_bounds(wanted, tpot)
    base, cost, _ = step_costs(step_s, context, float(tpot.sum()) / n)
    load = cost / pace
    keeps = _served(load, pace, base, None if living == n else alive, served)
    limit = float(pace[keeps].min())
    due = _due(silent, cost, keeps, limit, max_itl_s)
    tier = 4 - alive.astype(np.int8) - keeps - (keeps & (slack < URGENT * limit))
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
    packed = predicted <= limit and np.count_nonzero(keeps) == n
    run = np.sort(order[:count]).tolist()
    return StepChoice(run, predicted, "packed" if packed else "overload", keeps)


def reserve_of(mean_error: float) -> float:
    """Returns the lead to aim at, in tokens, for this mean relative error of step predictions."""
    return min(MOST_RESERVE, RESERVE_PER_ERROR * mean_error)


def horizon_of(expected_output: float) -> float:
    """Returns in how many tokens a lead is made up or used, given the mean output length in tokens."""
    return min(HORIZON, max(SHORTEST_HORIZON, 0.5 * expected_output))


def longest_full_step_s(
    tightest_tpot_s: float, reserve_tokens: float, horizon_tokens: float = HORIZON
) -> float:
    """Returns the seconds up to which a step of all needs no choice, whatever the leads."""
    return tightest_tpot_s * (1.0 - reserve_tokens / horizon_tokens)


def pace_s(
    lead_s: NDArray[np.float64],
    tpot_s: NDArray[np.float64],
    reserve_tokens: float,
    horizon_tokens: float = HORIZON,
) -> NDArray[np.float64]:
    """Returns the longest mean step that each request may see, in seconds, (n,)."""
    return _within_bounds(_bare_pace_s(lead_s, tpot_s, reserve_tokens, horizon_tokens), tpot_s)


def _within_bounds(pace_s: NDArray[np.float64], tpot_s: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.minimum(np.maximum(pace_s, FLOOR * tpot_s), CEILING * tpot_s)


def _bare_pace_s(
    lead_s: NDArray[np.float64],
    tpot_s: NDArray[np.float64],
    reserve_tokens: float,
    horizon_tokens: float,
) -> NDArray[np.float64]:
    return tpot_s + (lead_s - reserve_tokens * tpot_s) / horizon_tokens


def _served(
    load: NDArray[np.float64],
    pace: NDArray[np.float64],
    base: float,
    alive: NDArray[np.bool_] | None,
    before: NDArray[np.bool_] | None,
) -> NDArray[np.bool_]:
    """Returns the mask (n,) of the largest set that can be kept on pace; never empty.

    `alive`: who may be in it, None: all. `before`: the last choice's set.
    """
    key = load if before is None else np.where(before, INCUMBENT * load, load)
    lightest = key.argsort(kind="stable")
    if alive is not None:
        lightest = lightest[alive[lightest]]
    paces, loads = pace[lightest], load[lightest]
    slowest = np.sort(paces)
    last = paces.size - 1
    limits = {float(slowest[at * last // (LIMITS - 1)]) for at in range(LIMITS)}
    lowest, *higher = sorted(limits)
    count = int(loads.cumsum().searchsorted(1.0 - base / lowest, "right"))
    chosen = lightest[:count]
    for limit in higher:
        members = (paces >= limit).nonzero()[0]
        if members.size < count:
            break  # nor has any higher limit enough of them
        fitting = int(loads[members].cumsum().searchsorted(1.0 - base / limit, "right"))
        if fitting >= count:
            count, chosen = fitting, lightest[members[:fitting]]
    keeps = np.zeros(load.size, bool)
    keeps[chosen if count else lightest[:1]] = True
    return keeps


def _due(
    silent: NDArray[np.float64],
    cost: NDArray[np.float64],
    served: NDArray[np.bool_],
    limit: float,
    max_itl_s: float,
) -> NDArray[np.bool_] | None:
    """Returns the mask (n,) of requests that must run now to stay within `max_itl_s`; None: nobody."""
    latest_s = max_itl_s - (SPARE - 1.0) * limit
    longest_s, longest_turn_s = float(silent.max()), limit + float(cost.max())
    queue = np.flatnonzero(~served)
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
