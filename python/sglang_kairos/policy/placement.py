"""Chooses the prefill and the decode server of a request: keep most promises, then be earliest.

Why choose it: the shortest queue is not the earliest first token. Prompts differ in length, in what
a server has cached, and in their deadlines. All times are seconds; deadlines and `now_s` are on one
clock of the caller's choice.

Prefill. A server does what it owes in the order of `policy.backlog`; a stock server as it came. For
a request of n tokens, h of them cached, `w` is the predicted time for n - h tokens after h.
    ahead    = on-time work due before it + work of unknown deadlines
    blocking = min(one chunk, work due later)      a running chunk cannot be taken back; without
                                                   chunks: the longest prompt
    TTFT     = ahead - progress + blocking + w + hand-off + one decode step
The server as a whole then has w more to do. That pushes at most one request past its deadline
(Moore and Hodgson, 1968), maybe the new one. `gain` is the weight won by accepting it, less the
weight lost.

Decode. Once the request has joined:
    step = a + b running + knees + c tokens        seconds; it is the TPOT of everybody there
`gain` is the request's weight if its target allows that step. Each resident whose target no longer
does takes 1 off. A server whose KV would overflow comes after all that have space.

The largest gain wins, then the earliest end (prefill) or the shortest step (decode). The two
choices do not depend on each other. Ties fall to the lower index, or to `rng` when it is given.
Above LOOK_AT_ALL servers of a role, a few are drawn and compared. Mitzenmacher (2001) shows that
two choices nearly suffice.

Starvation cannot happen here: every request is placed at once. Trade-off: predictions must be
right; where a server has reported no latency model, GENERIC_PREFILL and UNTOLD_DECODE stand in.
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
# For a decode server that reported no latency model: steep enough that one request more is no tie.
UNTOLD_DECODE = DecodeLatency(3.5e-3, 0.22e-3, 0.65e-6)
LOOK_AT_ALL = 32  # of one role; 64 servers in all
DRAWN = 8
# The part of its `max_tokens` that a request is expected to make.
OUTPUT_SHARE = 0.5


class PrefillState(NamedTuple):
    """A prefill server and what it owes: `deadlines_s` ascending, `works_s` beside it, in seconds.

    `progress_s`: seconds of that work already done. `extra_s`: further work, of unknown deadlines.
    `cached_tokens`: of the request's prompt, expected in the server's prefix cache. `backlog`:
    spares building one from the two lists. `chunk_tokens` <= 0: prompts are not chunked.
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
    """A decode server: requests and KV tokens that it holds or was promised, and its KV capacity.

    `tpots_s`: TPOT targets of the requests known there, in seconds, ascending.
    """

    law: DecodeLatency = UNTOLD_DECODE
    running: int = 0
    tokens: float = 0.0
    capacity_tokens: float = math.inf
    tpots_s: Sequence[float] = ()

    def step_s(self, more_requests: int, more_tokens: float) -> float:
        """Returns the seconds of a step once that many requests and tokens have joined."""
        return self.law.step_s(self.running + more_requests, self.tokens + more_tokens)


class PlacedRequest(NamedTuple):
    """A request to place: `prompts` of `tokens` tokens in all, expected to grow by `output_tokens`.

    `now_s` belongs to `deadline_s`; without it nothing counts as late. `margin_s`: seconds kept
    free before the deadline, for what predictions miss.
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
    """The chosen servers, by index, and the predicted seconds from now to the first token.

    `keeps_ttft`: the request is on time and pushes no other past its deadline. `keeps_tpot`: the
    same for TPOT, and its KV fits. `tpot_s`: the decode step that it is predicted to see.
    """

    prefill: int
    decode: int
    ttft_s: float
    keeps_ttft: bool = True
    keeps_tpot: bool = True
    tpot_s: float = 0.0


class PrefillOutlook(NamedTuple):
    """A prefill server with the request: seconds from now to the end of its prefill, and the gain.

    `gain`: see the module's docstring. `harmless`: the request is on time and delays no other too
    far.
    """

    end_s: float
    gain: float
    harmless: bool


class DecodeOutlook(NamedTuple):
    """A decode server with the request in it: whether KV overflows, gain, seconds of a step."""

    overflow: bool
    gain: float
    step_s: float


def prefill_outlook(server: PrefillState, request: PlacedRequest) -> PrefillOutlook:
    """Returns when `server` would finish this request, and what that does to the others it owes."""
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
    """Returns the step of `server` with the request in it, and whether that breaks TPOT targets."""
    grown = request.tokens + request.output_tokens
    step = server.step_s(request.prompts, grown)
    gain = request.weight if step <= request.tpot_s else 0.0
    if server.tpots_s and server.tpots_s[0] < step:
        before = server.step_s(0, 0.0)
        gain -= sum(1.0 for tpot in server.tpots_s if before <= tpot < step)
    return DecodeOutlook(server.tokens + grown > server.capacity_tokens, gain, step)


def drawn(count: int, rng: Random | None) -> Sequence[int]:
    """Returns the indices to look at among `count` servers: all, or a few at random of many."""
    if count <= LOOK_AT_ALL:
        return range(count)
    return (rng or Random(0)).sample(range(count), DRAWN)


def choose_pair(
    prefills: Sequence[PrefillState],
    decodes: Sequence[DecodeState],
    request: PlacedRequest,
    rng: Random | None = None,
) -> Pair | None:
    """Returns the pair that keeps most promises, or None when either role has no server left."""
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
