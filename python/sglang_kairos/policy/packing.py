"""Chooses which running requests take part in a decode step, so that most meet their TPOT target.

Why choose it: a step is as slow as its batch is heavy, and everybody in it waits for everybody
else. When a step of all is too long for some targets, parking a few saves the others. A parked
request keeps its KV and sits the step out.

Formula. All arrays have shape (n,), one entry per running request; times are in seconds, context in
KV tokens.
    lead_i    = slack_i - tpot_i
                how early the last token came; the TPOT target is met in the end if it is >= 0
                when the last token comes
    allowed_i = tpot_i + (lead_i - reserve tpot_i) / horizon, within FLOOR..CEILING of tpot_i
                the longest mean step that brings the lead to `reserve` tokens within `horizon`
                tokens: shorter for a request that is behind, longer for one that is ahead
    load_i    = cost_i / allowed_i        `cost_i` is what i adds to the step (`policy.load`)

Rules: 1. If a step of everybody is within everybody's allowed step, everybody runs. That is stock
SGLang. 2. Otherwise the *sustained* set is the largest that can be held to its targets for good.
For each
   of some limits L, requests with allowed >= L are taken lightest load first, while
   base / L + sum load <= 1. Lightest first is optimal for a count (unit-value knapsack). The L
   that sustains the most wins, so no request that has fallen behind slows all others down. A
   request sustained before counts with INCUMBENT of its load, so that the set does not flap.
3. The step is filled up to that limit; the rest is parked. First come requests that would else be
   silent for longer than `max_itl_s`. Then come the sustained that miss their target within
   URGENT steps, the other sustained, the recoverable and the given up; lightest first within each.
4. If that makes less than `min_throughput` of the tokens per second of everybody's step, the step
   is filled further, in the same order.

A request is *given up* when it is LOST tokens or more behind, or when even a step of its own would
miss its target. It takes what others leave. Where all are given up, nobody gains from a short step,
and everybody runs.

Starvation: `max_itl_s` bounds the silence of a parked request. Silent requests are fetched one a
step, the most silent first, and early, so that they never fall due in a crowd. SPARE steps are kept
in hand: a step may take longer than predicted, and its tokens travel to the client.

Trade-offs. There is no margin on the step itself. Where its fixed part is large, a slightly shorter
step means far fewer requests. Of 25 ms with 17 ms fixed, 1 % less is 3 % of the batch. A request
that falls behind shows in its lead instead. Where steps scatter around their predictions, aiming at
a lead of zero ends late every other time. So the reserve grows with the error (`reserve_of`). It
must be there when a request ends, so the horizon is half of the usual output.

Source: our own design; no claim that any paper's formula looks like it. The constants were tuned in
simulation; results are flat around them (docs/decode.md).
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
    """Who runs in the next step.

    `run`: indices that take part, ascending; the step is predicted to take `predicted_s` seconds.
    `reason`: "all" run, "packed" (all can be held to their targets) or "overload" (some cannot).
    `sustained`: mask (n,) of the requests to be held to their targets; pass it to the next choice.
    """

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
    """Returns the requests to run now, at least one for n > 0.

    `slack_s`: seconds until the next token is due, (first token + emitted * tpot) - now.
    `silent_s`: seconds since the last token. `step_s(batch, kv_tokens)`: predicted seconds,
    monotone, for scalars and arrays. `sustained`: that of the last choice, False for requests that
    joined since; None if there was none. `reserve_tokens`: the lead to end with (`reserve_of`).
    `horizon_tokens`: see `horizon_of`. `min_throughput`: a fraction from 0 to 1.
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
    """Returns the lead to aim at, in tokens, for this mean relative error of step predictions."""
    return min(MOST_RESERVE, RESERVE_PER_ERROR * mean_error)


def horizon_of(expected_output: float) -> float:
    """Returns within how many tokens to make up or use a lead, for this mean output length."""
    return min(HORIZON, max(SHORTEST_HORIZON, 0.5 * expected_output))


def safe_step_s(
    tightest_tpot_s: float, reserve_tokens: float, horizon_tokens: float = HORIZON
) -> float:
    """Returns the step, in seconds, up to which everybody may run, whatever the leads."""
    return tightest_tpot_s * (1.0 - reserve_tokens / horizon_tokens)


def allowed_step_s(
    lead_s: NDArray[np.float64],
    tpot_s: NDArray[np.float64],
    reserve_tokens: float,
    horizon_tokens: float = HORIZON,
) -> NDArray[np.float64]:
    """Returns the longest mean step that each request may see, in seconds, (n,)."""
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
    """Returns the mask (n,) of the largest set that can be held to its targets; never empty.

    `alive`: who may be in it, None for all. `before`: the set of the last choice.
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
            break  # no higher limit has enough members either
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
    """Returns the mask (n,) of who must run now to keep every silence short; None for nobody."""
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
