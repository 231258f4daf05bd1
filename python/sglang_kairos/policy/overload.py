"""Decides what to do with a request whose SLO no pair of servers can meet.

    serve      place it anyway, where it costs the others least
    relegate   hold it until it is in nobody's way: it is served late, but served
    shed       refuse it at once with 429, and say when to come back

A pair meets an SLO only if it breaks no earlier promise: accepted requests stay on time.
    Retry-After = predicted TTFT - TTFT target        whole seconds, 1 to LONGEST_RETRY_S
This is how long until the same request would have been on time if nothing else came.

Trade-offs. `serve` loses the fewest requests and may let all of them be late. `shed` protects
accepted requests best. `relegate` sits between: it holds a request for at most ``--max-wait`` TTFT
targets. The caller counts a promise as met until it has observed the server: a first guess about
its speed must refuse nobody.
Source: our own design.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

LONGEST_RETRY_S = 60


class Overload(StrEnum):
    """The policies, by the names used in flags."""

    SERVE = "serve"
    RELEGATE = "relegate"
    SHED = "shed"


class OverloadOutcome(NamedTuple):
    """What is predicted for a request on the best pair: TTFT in seconds, and which targets are met."""

    ttft_s: float
    keeps_ttft: bool
    keeps_tpot: bool


def verdict(policy: Overload, outcome: OverloadOutcome) -> Overload:
    """Returns SERVE if both targets are met, and otherwise `policy`."""
    return Overload.SERVE if outcome.keeps_ttft and outcome.keeps_tpot else policy


def retry_after_s(ttft_s: float, target_s: float) -> int:
    """Returns the whole seconds for Retry-After, 1 to LONGEST_RETRY_S."""
    wait = ttft_s - target_s
    if not math.isfinite(wait):
        return LONGEST_RETRY_S
    return max(1, min(LONGEST_RETRY_S, math.ceil(wait)))
