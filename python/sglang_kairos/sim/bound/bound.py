"""Bounds from above the share of requests whose first token any scheduler could deliver in time.

*Any scheduler* includes one that knows the trace beforehand, preempts at any instant, and moves
requests between the prefill servers for free. What it cannot do is compute for nothing:

1. **Work.** Let a step have requests with n_i new tokens after P_i, at most `chunk_tokens` in all.
   It costs a + sum_i (b n_i + c n_i (P_i + n_i / 2) + d (P_i + n_i)^2) or more. So it lasts at
   least the sum of its requests' shares, b n + c n (P + n / 2) + d (P + n)^2 + a n / chunk_tokens.
   A request pays for its tail and for those blocks of its prompt that no request before it (by
   arrival) has. It may find even those in the cache. But then a later request has computed them, on
   the same server, between this one's arrival and its start. Nobody else is charged for that. So it
   counts as this one's own work, in its own window, and never two of its pieces at once.
   b and c add up over pieces exactly; d is charged once.
2. **Window.** Work starts at arrival or later. It ends before the first token is due by at least
   the link's latency and the transfer of one token.
3. **Alone.** n tokens charged take ceil(n / chunk_tokens) steps or more, each with its a in full,
   one after the other on one server. A request whose window is shorter is never on time. Nor is one
   that the cluster refuses for its size.
4. **Capacity.** The prefill servers together do at most their number of seconds of work per second.
   One request gets at most one: it is on one server.

All that is left out only costs time. That is decode steps in progress, memory, eviction, and steps
that are not full or not yet over. It is also queues at the link and at the decode servers, and work
for late requests. So the
largest number of requests that 1 to 4 allow bounds every policy. It also bounds the attainment of
both targets (E2E), which counts a subset.

`solve` finds that number. With equal targets and one server it is exact, by dynamic programming.
Otherwise it is a mixed integer program, whose dual bound holds (up to its tolerances) whenever the
solver is stopped. Where step times are a table, a to d are those of a latency model that lies under
it (`work`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_kairos.loads.traces import Request
from sglang_kairos.sim.bound.solve import most_on_time
from sglang_kairos.sim.bound.work import charge
from sglang_kairos.sim.core.cluster import Setup


@dataclass(frozen=True)
class Bound:
    """What no scheduler exceeds. `ttft_attainment` and `gap` are fractions of the requests sent.

    `method`: "in order" (dynamic program), "mip", or "in order, pooled" (the prefill servers as one
    fast one). `exact`: no smaller number follows from the argument above, though a scheduler may
    not reach it. Otherwise the argument's own optimum may be lower by up to `gap`. `seconds`: wall
    time spent.
    """

    ttft_attainment: float
    method: str
    exact: bool
    gap: float
    seconds: float


def ttft_bound(rows: Sequence[Request], setup: Setup, *, time_limit_s: float = 60.0) -> Bound:
    """Returns an upper bound on the TTFT attainment of this trace in this cluster.

    `time_limit_s` ends the solver's search, not the bound's validity. Without requests the
    attainment is 0, as in `loads.replay.measure`. For more than one prefill server, for tiers, and
    for step times from a table it needs scipy (extra `sim`). Raises ImportError without scipy.
    Raises ValueError for a time limit that is not positive, and for what `make_requests` refuses.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s must be positive, got {time_limit_s}")
    started = time.perf_counter()
    jobs = charge(rows, setup)
    count, found, method = most_on_time(jobs, setup.prefills, time_limit_s)
    sent = max(1, len(rows))
    return Bound(
        ttft_attainment=count / sent,
        method=method,
        exact=count == found,
        gap=(count - found) / sent,
        seconds=time.perf_counter() - started,
    )


def share_of_bound(attainment: float, bound: Bound) -> float:
    """Returns the attained share of what is possible (TTFT, or both targets), 0 to 1; 1 if nothing is.

    Raises ValueError if it is more than possible: then the two are not of the same trace and
    cluster.
    """
    if attainment > bound.ttft_attainment + 1e-9:
        raise ValueError(
            f"attainment {attainment:.4f} exceeds the bound {bound.ttft_attainment:.4f}: "
            "not the same requests, targets and servers"
        )
    return min(1.0, attainment / bound.ttft_attainment) if bound.ttft_attainment > 0 else 1.0
