"""What to do with a request whose SLO no pair of servers can meet.

    serve     place it anyway, where it costs the others least
    relegate  let it wait until it is in nobody's way; it is served late, but served
    shed      refuse it at once with 429, and say when to come back

A pair that would meet this SLO by breaking an earlier promise does not count: what was accepted
stays on time. A first guess about a server's speed is no reason to refuse a request. So the caller
reports a target as met as long as nothing has been observed of the server.

Retry-After is how long until the same request would have been on time if nothing else came:
predicted TTFT - TTFT target, in whole seconds.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

LONGEST_RETRY_S = 60


class Overload(StrEnum):
    """The three choices, by the names that flags use."""

    SERVE = "serve"
    RELEGATE = "relegate"
    SHED = "shed"


class OverloadOutcome(NamedTuple):
    """The prediction for a request on the best pair; seconds."""

    ttft_s: float
    keeps_ttft: bool
    keeps_tpot: bool


def verdict(policy: Overload, outcome: OverloadOutcome) -> Overload:
    """Returns SERVE if both targets are met, else what `policy` says."""
    return Overload.SERVE if outcome.keeps_ttft and outcome.keeps_tpot else policy


def retry_after_s(ttft_s: float, target_s: float) -> int:
    """Returns the whole seconds for Retry-After, from 1 to LONGEST_RETRY_S."""
    wait = ttft_s - target_s
    if not math.isfinite(wait):
        return LONGEST_RETRY_S
    return max(1, min(LONGEST_RETRY_S, math.ceil(wait)))
