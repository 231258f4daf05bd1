"""Which prefill and which decode server get a request: the pair with the earliest first token.

Seconds everywhere; deadlines and `now_s` on one clock of the caller's choice.

Prefill server s with speed (a, b, c) and chunk k, request of n uncached tokens and deadline d:
    work(n)  = a ceil(n / k) + b n + c n^2 / 2
    ahead    = sum of work_j over what s still owes with deadline_j <= d  (all of it if s is FCFS)
    blocking = min(work(k), owed - ahead)      the chunk that is running cannot be taken back
    TTFT     = ahead + blocking + work(n) + hand-off
`progress_s` is what s has already done of what it owes; it shortens `ahead` first.
Decode server, after the request has joined: step = a + b running + c tokens. A server whose KV
would overflow queues the request for memory and comes after every one that has room.
Least TTFT wins and, apart from it, least (overflow, step): the two choices do not depend on each
other. Ties fall to the lower index, or to `rng` when one is given.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

# Predictions closer than this are one: they are not that good, and a tie can be spread.
TIE_S = 1e-4


@dataclass(frozen=True, slots=True)
class PrefillSpeed:
    """Seconds = a_s per chunk + b_s per token + c_s per token and token of context before it."""

    a_s: float = 10e-3
    b_s: float = 50e-6
    c_s: float = 1e-9
    chunk_tokens: int = 8192

    def work_s(self, tokens: float) -> float:
        """Seconds of prefilling `tokens` from nothing, alone on the server."""
        if tokens <= 0.0:
            return 0.0
        chunks = math.ceil(tokens / self.chunk_tokens)
        return self.a_s * chunks + self.b_s * tokens + self.c_s * tokens * tokens / 2


@dataclass(frozen=True, slots=True)
class PrefillState:
    """A prefill server and what it owes: `deadlines_s` ascending, `works_s` beside it."""

    speed: PrefillSpeed = PrefillSpeed()
    deadlines_s: Sequence[float] = ()
    works_s: Sequence[float] = ()
    progress_s: float = 0.0
    by_deadline: bool = True
    """False: first come, first served (stock SGLang)."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a decode step = a_s + b_s per running request + c_s per KV token."""

    a_s: float = 3.5e-3
    b_s: float = 0.22e-3
    c_s: float = 0.65e-6


@dataclass(frozen=True, slots=True)
class DecodeState:
    """A decode server: requests and KV tokens it holds or has been promised, and its KV size."""

    cost: StepCost = StepCost()
    running: int = 0
    tokens: float = 0.0
    capacity_tokens: float = math.inf

    def step_s(self, more_requests: int, more_tokens: float) -> float:
        """Seconds of a step once that much more has joined."""
        requests, tokens = self.running + more_requests, self.tokens + more_tokens
        return self.cost.a_s + self.cost.b_s * requests + self.cost.c_s * tokens


@dataclass(frozen=True, slots=True)
class PlacedRequest:
    """`tokens` prompt tokens in all `prompts`; `output_tokens` it is expected to grow by."""

    tokens: float
    deadline_s: float
    output_tokens: float = 0.0
    prompts: int = 1
    handoff_s: float = 0.0
    skip_prefills: frozenset[int] = field(default_factory=frozenset)
    skip_decodes: frozenset[int] = field(default_factory=frozenset)


class Pair(NamedTuple):
    """Indices of the chosen servers, and the seconds from now to the first token."""

    prefill: int
    decode: int
    ttft_s: float


def prefill_end_s(server: PrefillState, tokens: float, deadline_s: float) -> float:
    """Seconds from now until `server` has prefilled `tokens` more for a request due then."""
    owed = sum(server.works_s)
    if server.by_deadline:
        ahead = sum(server.works_s[: bisect_right(server.deadlines_s, deadline_s)])
        blocking = min(server.speed.work_s(server.speed.chunk_tokens), max(0.0, owed - ahead))
    else:
        ahead, blocking = owed, 0.0
    return max(0.0, ahead - server.progress_s) + blocking + server.speed.work_s(tokens)


def choose_pair(
    prefills: Sequence[PrefillState],
    decodes: Sequence[DecodeState],
    request: PlacedRequest,
    rng: Random | None = None,
) -> Pair | None:
    """The pair that serves `request` first, or None when either side has no server left."""
    ends = {
        index: prefill_end_s(server, request.tokens, request.deadline_s)
        for index, server in enumerate(prefills)
        if index not in request.skip_prefills
    }
    grown = request.tokens + request.output_tokens
    loads = {
        index: (
            server.tokens + grown > server.capacity_tokens,
            server.step_s(request.prompts, grown),
        )
        for index, server in enumerate(decodes)
        if index not in request.skip_decodes
    }
    if not ends or not loads:
        return None
    soonest = min(ends.values())
    prefill = _pick([i for i, end in ends.items() if end <= soonest + TIE_S], rng)
    full, lightest = min(loads.values())
    decode = _pick(
        [i for i, load in loads.items() if load[0] == full and load[1] <= lightest + TIE_S], rng
    )
    return Pair(prefill, decode, ends[prefill] + request.handoff_s + loads[decode][1])


def _pick(tied: list[int], rng: Random | None) -> int:
    return tied[0] if rng is None or len(tied) == 1 else rng.choice(tied)
