"""Chooses the prefill and the decode server of a request: most promises met, then the earliest.

Why choose it: a queue's length says little about when a request will be done. This predicts, per
server, when it would be, and which earlier promise it would break.

Formula. Times are seconds; deadlines and `now_s` share one clock of the caller's choice.

Prefill. A server does its work in the order of `policy.backlog`; a stock server first come, first
served. Let a request have n tokens, of which the server has h cached.
    w        = seconds to prefill n - h tokens after h (latency model)
    ahead    = on-time work due before it + work with unknown deadlines
    blocking = min(one chunk, work due later); a running chunk is not taken back. Without chunks:
               the longest prompt
    TTFT     = ahead - progress + blocking + w + hand-off + one decode step
    gain     = its weight if it is on time - weight of the job that it pushes past a deadline

By Moore-Hodgson at most one job is pushed out, maybe the new one.
Decode. After the request has joined:
    step     = latency model at (running + 1 requests, tokens + its tokens)
    gain     = its weight if step <= its TPOT target - residents whose target breaks now
A server whose KV would overflow comes after all others.

The largest gain wins, then the earliest end (prefill) or the shortest step (decode). Both choices
are independent. Ties fall to the lower index, or to `rng` when one is given. Above LOOK_AT_ALL
servers of a role, DRAWN are drawn at random and compared.

Trade-offs. A late request goes where it harms least, which may be the slowest queue; its wait is
bounded on the server, not here. The prediction is as good as the latency model and the prefix
index. Source: our own design. Random choice among a few: Mitzenmacher 2001 (two nearly suffice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from sglang_kairos.policy.backlog import EMPTY, Backlog
from sglang_kairos.predict.latency_model import GENERIC_PREFILL, DecodeLatency, PrefillLatency

# Predictions closer than this count as equal: they are no better, and ties spread the load.
TIE_S = 1e-4
# For a decode server that has not reported its latency model. One more request must be no tie.
UNTOLD_DECODE = DecodeLatency(3.5e-3, 0.22e-3, 0.65e-6)
LOOK_AT_ALL = 32  # of one role; 64 servers in all
DRAWN = 8
# Expected output length, as a share of the most tokens that a request may make.
OUTPUT_SHARE = 0.5


class PrefillState(NamedTuple):
    """A prefill server and the work it owes, in seconds.

    `law`: its latency model. `chunk_tokens` <= 0: prompts are not chunked. `deadlines_s`, `works_s`
    (n,): its jobs by ascending deadline. `progress_s`: work of these that is done. `extra_s`: work
    with unknown deadlines. `cached_tokens`: of the request's prompt, expected in the prefix cache.
    `backlog`: built from the two lists already; None: build it.
    """

    law: PrefillLatency = GENERIC_PREFILL
    chunk_tokens: int = 8192
    deadlines_s: Sequence[float] = ()
    works_s: Sequence[float] = ()
    progress_s: float = 0.0
    by_deadline: bool = True
    """Whether jobs run by deadline. False: first come, first served, as in stock SGLang."""
    extra_s: float = 0.0
    cached_tokens: float = 0.0
    backlog: Backlog | None = None


class DecodeState(NamedTuple):
    """A decode server: its latency model, the requests and KV tokens it has or was promised, its KV size.

    `tpots_s`: TPOT targets, in seconds, of the requests known there, ascending.
    """

    law: DecodeLatency = UNTOLD_DECODE
    running: int = 0
    tokens: float = 0.0
    capacity_tokens: float = math.inf
    tpots_s: Sequence[float] = ()

    def step_s(self, more_requests: int, more_tokens: float) -> float:
        """Returns the seconds of a step once that much more has joined."""
        return self.law.step_s(self.running + more_requests, self.tokens + more_tokens)


class PlacedRequest(NamedTuple):
    """The request to place. `tokens`: prompt tokens over all `prompts`; times in seconds.

    `output_tokens`: by how much it is expected to grow. `now_s` is on the clock of `deadline_s`;
    without it nothing counts as late. `margin_s` stays free before the deadline, for errors of
    prediction. `skip_prefills`, `skip_decodes`: indices of servers not to choose.
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
    """Indices of the chosen servers, and what is predicted for the request there.

    `ttft_s`: seconds from now to the first token. `keeps_ttft`: the request is on time and pushes
    nobody past a deadline. `keeps_tpot`: the same for TPOT, and its KV fits. `tpot_s`: seconds of
    its step.
    """

    prefill: int
    decode: int
    ttft_s: float
    keeps_ttft: bool = True
    keeps_tpot: bool = True
    tpot_s: float = 0.0


class PrefillOutlook(NamedTuple):
    """`end_s`: seconds until its prefill ends; `gain`: see the module; `harmless`: nobody is late."""

    end_s: float
    gain: float
    harmless: bool


class DecodeOutlook(NamedTuple):
    """`overflow`: its KV does not fit; `gain`: see the module; `step_s`: seconds of a step with it."""

    overflow: bool
    gain: float
    step_s: float


def prefill_outlook(server: PrefillState, request: PlacedRequest) -> PrefillOutlook:
    """Predicts when `server` would finish the request, and what that does to the work it owes."""
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
    """Predicts a step of `server` with the request in it, and whose TPOT target that breaks."""
    grown = request.tokens + request.output_tokens
    step = server.step_s(request.prompts, grown)
    gain = request.weight if step <= request.tpot_s else 0.0
    if server.tpots_s and server.tpots_s[0] < step:
        before = server.step_s(0, 0.0)
        gain -= sum(1.0 for tpot in server.tpots_s if before <= tpot < step)
    return DecodeOutlook(server.tokens + grown > server.capacity_tokens, gain, step)


def drawn(count: int, rng: Random | None) -> Sequence[int]:
    """Returns the indices of the servers to compare: all, or DRAWN at random when there are many."""
    if count <= LOOK_AT_ALL:
        return range(count)
    return (rng or Random(0)).sample(range(count), DRAWN)


def choose_pair(
    prefills: Sequence[PrefillState],
    decodes: Sequence[DecodeState],
    request: PlacedRequest,
    rng: Random | None = None,
) -> Pair | None:
    """Returns the pair with the largest gain; None when either side has no server left."""
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
