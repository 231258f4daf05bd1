"""The share of requests whose first token any scheduler could deliver in time: an upper bound.

Any scheduler: one that knows the trace beforehand, preempts at any instant and moves requests
between the prefill servers for free. What it may not do is compute for nothing:

1. **Work.** A step costs a + sum_i (b n_i + c n_i (P_i + n_i / 2) + d (P_i + n_i)^2) or more, over
   requests with n_i new tokens after P_i, and has at most `chunk_tokens` of them. So it lasts at
   least the sum of its requests' shares, b n + c n (P + n / 2) + d (P + n)^2 + a n / chunk_tokens.
   The prompt tokens that a request must pay for are those of blocks that no request before it
   (by arrival) has, and its tail. It may find even those in the cache; but then a request that
   came later has computed them, on the same server, between this one's arrival and this one's
   start. Nobody else is charged for that, so it counts as this one's own work, in its own window
   and never two of its pieces at once. b and c add up over pieces exactly; d is charged once.
2. **Window.** Work starts at arrival or later, and ends before the first token is due by at least
   the link's latency and the transfer of one token.
3. **Alone.** n tokens charged take ceil(n / chunk_tokens) steps or more, each with its a in full,
   one after the other on one server. A request whose window is shorter is never on time, nor is
   one that the cluster refuses for its size.
4. **Capacity.** The prefill servers together do at most their number of seconds of work a second,
   and one request at most one: it is on one server.

Whatever is left out (decode steps in progress, memory, eviction, steps that are not full or not
yet over, queues at the link and at the decode servers, late requests' work) only costs time, so
the largest number of requests that 1 to 4 allow bounds every policy. It bounds the attainment of
both targets (E2E) as well: that counts a subset.

With equal targets and one server that largest number is found exactly, by dynamic programming;
otherwise by a mixed integer program, whose dual bound holds whenever the solver is stopped (up to
its tolerances). Both: `solve`. Where step times are a table, a to d are those of a law
that lies under it: `work`.
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

    `method`: "in order" (dynamic programme), "mip" or "in order, pooled" (the prefill servers as
    one fast one). `exact`: no smaller number follows from the argument above, which is not to say
    that a scheduler reaches it; otherwise the argument's own optimum may be lower by up to `gap`.
    `seconds`: wall time spent.
    """

    ttft_attainment: float
    method: str
    exact: bool
    gap: float
    seconds: float


def ttft_bound(rows: Sequence[Request], setup: Setup, *, time_limit_s: float = 60.0) -> Bound:
    """An upper bound on the TTFT attainment of this trace in this cluster.

    `time_limit_s` ends the solver's search, not the bound's validity. No requests: attainment 0,
    as `loads.replay.measure` has it. Needs scipy (extra `sim`) for more than one prefill server,
    for tiers and for step times that are not a law; ImportError otherwise. ValueError for a time
    limit that is not positive, and what `make_requests` refuses.
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
    """How much of what is possible was attained (TTFT, or both targets), 0..1; 1 if nothing is.

    ValueError if it is more than possible: then they are not of the same trace and cluster.
    """
    if attainment > bound.ttft_attainment + 1e-9:
        raise ValueError(
            f"attainment {attainment:.4f} exceeds the bound {bound.ttft_attainment:.4f}: "
            "not the same requests, targets and servers"
        )
    return min(1.0, attainment / bound.ttft_attainment) if bound.ttft_attainment > 0 else 1.0
