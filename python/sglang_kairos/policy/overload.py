"""What to do with a request whose SLO no pair of servers can keep.

    serve     place it anyway, where it costs the others least
    relegate  let it wait until it is in nobody's way; served late, but served
    shed      refuse it at once, and say when to come back

A pair that would keep this request's SLO by breaking an earlier promise does not count: what was
accepted stays on time. A first guess about a server's speed is no reason to turn anybody away: who
asks says that a promise is kept as long as nothing has been observed.

Retry-After is how long until the same request would have been on time, if nothing else came:
predicted TTFT - TTFT target, in whole seconds.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

LONGEST_RETRY_S = 60


class Overload(StrEnum):
    """The choices, by the names used in flags."""

    SERVE = "serve"
    RELEGATE = "relegate"
    SHED = "shed"


class OverloadOutcome(NamedTuple):
    """What was predicted for a request on the best pair. Seconds."""

    ttft_s: float
    keeps_ttft: bool
    keeps_tpot: bool


def verdict(policy: Overload, outcome: OverloadOutcome) -> Overload:
    """SERVE now, RELEGATE or SHED."""
    return Overload.SERVE if outcome.keeps_ttft and outcome.keeps_tpot else policy


def retry_after_s(ttft_s: float, target_s: float) -> int:
    """Whole seconds for Retry-After, 1 to LONGEST_RETRY_S."""
    wait = ttft_s - target_s
    if not math.isfinite(wait):
        return LONGEST_RETRY_S
    return max(1, min(LONGEST_RETRY_S, math.ceil(wait)))
