"""Which prefill and which decode server get a request: keep most promises, then be earliest.

Seconds everywhere; deadlines and `now_s` on one clock of the caller's choice.

Prefill server s does what it owes in `policy.backlog`'s order (a stock server: as it came). For a
request of n tokens, of which s has h cached, w = seconds of n - h tokens after h:
    ahead    = on-time work due before it + work nobody told us the deadline of
    blocking = min(one chunk, work due later)      a running chunk cannot be taken back; without
                                                   chunks: the longest prompt
    TTFT     = ahead - progress + blocking + w + hand-off + one decode step
The server as a whole then has w more to do: at most one request is pushed past its deadline by it
(Moore and Hodgson), maybe the new one. `gain` is the weight won by accepting minus what is lost.
Decode server, after the request has joined: step = a + b running + knees + c tokens (TPOT of
everybody there); `gain` is 1 if the request's target allows that step, less the residents whose
target does not any more. A server whose KV would overflow comes after all that have room.

Most gain wins, then the earliest end (prefill) or the shortest step (decode); the two choices do
not depend on each other. Ties fall to the lower index, or to `rng` when one is given. Above
LOOK_AT_ALL servers of a role a few are drawn and compared (Mitzenmacher 2001: two nearly suffice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from sglang_kairos.policy.backlog import EMPTY, Backlog
from sglang_kairos.predict.latency_model import GENERIC_PREFILL, DecodeLatency, PrefillLatency

# Predictions closer than this are one: they are not that good, and a tie can be spread.
TIE_S = 1e-4
# Of a decode server that has not told its law: steep enough for one request more to be no tie.
UNTOLD_DECODE = DecodeLatency(3.5e-3, 0.22e-3, 0.65e-6)
LOOK_AT_ALL = 32  # of one role; 64 servers in all
DRAWN = 8
# Of the tokens that a request may make, how many it is expected to.
OUTPUT_SHARE = 0.5


class PrefillState(NamedTuple):
    """A prefill server and what it owes: `deadlines_s` ascending, `works_s` beside it.

    `progress_s`: done already of that; `extra_s`: work besides, of unknown deadlines;
    `cached_tokens`: of the request's prompt, expected in its prefix cache. `backlog` spares
    building it from the two lists. `chunk_tokens` <= 0: prompts are not chunked.
    """

    law: PrefillLatency = GENERIC_PREFILL
    chunk_tokens: int = 8192
    deadlines_s: Sequence[float] = ()
    works_s: Sequence[float] = ()
    progress_s: float = 0.0
    by_deadline: bool = True
    """False: first come, first served (stock SGLang)."""
    extra_s: float = 0.0
    cached_tokens: float = 0.0
    backlog: Backlog | None = None


class DecodeState(NamedTuple):
    """A decode server: requests and KV tokens it holds or has been promised, and its KV size.

    `tpots_s`: TPOT targets of the requests known there, ascending.
    """

    law: DecodeLatency = UNTOLD_DECODE
    running: int = 0
    tokens: float = 0.0
    capacity_tokens: float = math.inf
    tpots_s: Sequence[float] = ()

    def step_s(self, more_requests: int, more_tokens: float) -> float:
        """Seconds of a step once that much more has joined."""
        return self.law.step_s(self.running + more_requests, self.tokens + more_tokens)


class PlacedRequest(NamedTuple):
    """`tokens` prompt tokens in all `prompts`; `output_tokens` it is expected to grow by.

    `now_s` goes with `deadline_s`; without it nothing counts as late. `margin_s` is gain free
    before the deadline, for what predictions miss.
    """

    tokens: float
    deadline_s: float
    output_tokens: float = 0.0
    prompts: int = 1
    handoff_s: float = 0.0
    skip_prefills: frozenset[int] = frozenset()
    skip_decodes: frozenset[int] = frozenset()
    now_s: float = -math.inf
    tpot_s: float = math.inf
    weight: float = 1.0
    margin_s: float = 0.0


class Pair(NamedTuple):
    """Indices of the chosen servers, and the seconds from now to the first token.

    `keeps_ttft`: the request is on time and pushes nobody else past a deadline. `keeps_tpot`: the
    same for TPOT, and there is room in the KV. `tpot_s`: the step it is predicted to see.
    """

    prefill: int
    decode: int
    ttft_s: float
    keeps_ttft: bool = True
    keeps_tpot: bool = True
    tpot_s: float = 0.0


class PrefillOutlook(NamedTuple):
    """`end_s`: seconds from now to the end of the request's prefill; see the module's text."""

    end_s: float
    gain: float
    harmless: bool


class DecodeOutlook(NamedTuple):
    """`step_s`: seconds of a step with the request in it; see the module's text."""

    overflow: bool
    gain: float
    step_s: float


def prefill_outlook(server: PrefillState, request: PlacedRequest) -> PrefillOutlook:
    """What `server` would make of the request, and the request of what the server owes."""
    law, chunk = server.law, server.chunk_tokens
    _, work = law.prompt_s(request.tokens, server.cached_tokens, chunk)
    limit = request.deadline_s - request.now_s - request.handoff_s - request.margin_s
    backlog = server.backlog
    if backlog is None:
        backlog = Backlog.of(server.deadlines_s, server.works_s) if server.works_s else EMPTY
    if not server.by_deadline:
        end = max(0.0, backlog.total_s - server.progress_s) + server.extra_s + work
        return PrefillOutlook(end, request.weight if end <= limit else 0.0, end <= limit)
    place = backlog.place(request.deadline_s)
    ahead = backlog.before_s(place)
    behind = max(0.0, backlog.total_s - ahead)
    blocking = 0.0
    if behind:
        longest = law.work_s(chunk) if chunk > 0 else max(server.works_s, default=behind)
        blocking = min(longest, behind)
    done = server.progress_s - server.extra_s
    end = max(0.0, ahead - done) + blocking + work
    lag = -math.inf
    if backlog.began_s > -math.inf:
        lag = request.now_s + request.handoff_s - backlog.began_s - done
    if end <= limit and work <= backlog.headroom_s(place) - lag:
        return PrefillOutlook(end, request.weight, True)
    victim = backlog.victim(place, end <= limit, work, request.weight, lag)
    if victim is not None and work <= limit:
        earlier = end - victim.work_s if victim.place < place else end
        if earlier <= limit:
            return PrefillOutlook(max(work, earlier), request.weight - victim.weight, False)
    late = max(0.0, backlog.on_time_s - done) + backlog.late_before_s(work) + work
    return PrefillOutlook(late, 0.0, False)


def decode_outlook(server: DecodeState, request: PlacedRequest) -> DecodeOutlook:
    """What a step on `server` takes with the request in it, and whose TPOT target that breaks."""
    grown = request.tokens + request.output_tokens
    step = server.step_s(request.prompts, grown)
    gain = request.weight if step <= request.tpot_s else 0.0
    if server.tpots_s and server.tpots_s[0] < step:
        before = server.step_s(0, 0.0)
        gain -= sum(1.0 for tpot in server.tpots_s if before <= tpot < step)
    return DecodeOutlook(server.tokens + grown > server.capacity_tokens, gain, step)


def drawn(count: int, rng: Random | None) -> Sequence[int]:
    """Indices worth a look among `count` servers: all, or a few at random when there are many."""
    if count <= LOOK_AT_ALL:
        return range(count)
    return (rng or Random(0)).sample(range(count), DRAWN)


def choose_pair(
    prefills: Sequence[PrefillState],
    decodes: Sequence[DecodeState],
    request: PlacedRequest,
    rng: Random | None = None,
) -> Pair | None:
    """The pair that keeps most promises, or None when either side has no server left."""
    left = [i for i in range(len(prefills)) if i not in request.skip_prefills]
    right = [i for i in range(len(decodes)) if i not in request.skip_decodes]
    if not left or not right:
        return None
    ends = {left[i]: prefill_outlook(prefills[left[i]], request) for i in drawn(len(left), rng)}
    steps = {right[i]: decode_outlook(decodes[right[i]], request) for i in drawn(len(right), rng)}
    loss, soonest = min([(-gain, end_s) for end_s, gain, _ in ends.values()])
    tied = [i for i, (end_s, gain, _) in ends.items() if gain == -loss and end_s <= soonest + TIE_S]
    prefill = _pick(tied, rng)
    full, loss, shortest = min([(over, -gain, step_s) for over, gain, step_s in steps.values()])
    tied = [
        i
        for i, (over, gain, step_s) in steps.items()
        if over == full and gain == -loss and step_s <= shortest + TIE_S
    ]
    decode = _pick(tied, rng)
    first, second = ends[prefill], steps[decode]
    return Pair(
        prefill,
        decode,
        first.end_s + request.handoff_s + second.step_s,
        first.harmless,
        not second.overflow and second.gain >= request.weight,
        second.step_s,
    )


def _pick(tied: list[int], rng: Random | None) -> int:
    return tied[0] if rng is None or len(tied) == 1 else rng.choice(tied)
