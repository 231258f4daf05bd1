"""The router: pairs by `policy.placement`, or in turn as a router that knows nothing does.

It keeps the same books as `router/servers.py`: what each prefill server owes, by deadline, which
prompts it was sent, and what each decode server has been promised.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from random import Random

from sglang_kairos.policy.backlog import EMPTY, Backlog
from sglang_kairos.policy.placement import (
    OUTPUT_SHARE,
    DecodeState,
    PlacedRequest,
    PrefillState,
    choose_pair,
)
from sglang_kairos.router.prefix import Blocks, PrefixIndex
from sglang_kairos.sim.policies import Policy
from sglang_kairos.sim.predictions import Predictor
from sglang_kairos.sim.request import SimRequest
from sglang_kairos.sim.times import System


class _Owed:
    """Tickets of one prefill server: (deadline, request's index, work) ascending."""

    def __init__(self, most_blocks: int) -> None:
        self.tickets: list[tuple[float, int, float]] = []
        self.busy_since_s = 0.0
        self.prefix = PrefixIndex(most_blocks)


class Router:
    """Places requests on `prefills` x `decodes` servers, whose predictors it asks for their laws."""

    def __init__(
        self,
        system: System,
        policy: Policy,
        prefills: list[Predictor],
        decodes: list[Predictor],
        seed: int,
        block_tokens: int,
    ) -> None:
        self._system, self._policy = system, policy
        self._prefills, self._decodes = prefills, decodes
        self._block_tokens = block_tokens
        self._owed = [_Owed(system.prefill_kv_tokens // block_tokens) for _ in prefills]
        self._promised = [(0, 0.0) for _ in decodes]
        self._rng = Random(f"{seed}/router")
        self._turn = 0

    def place(self, req: SimRequest, now_s: float) -> None:
        """Sets the request's servers."""
        turn, width = self._turn, len(self._prefills)
        self._turn += 1
        req.prefill, req.decode = turn % width, turn // width % len(self._decodes)
        if not self._policy.route or width * len(self._decodes) == 1:
            return
        blocks = Blocks(req.blocks, self._block_tokens)
        states = [self._prefill_state(index, now_s, blocks) for index in range(width)]
        pair = choose_pair(
            states,
            [self._decode_state(index) for index in range(len(self._decodes))],
            PlacedRequest(
                tokens=req.prompt,
                deadline_s=req.due_s,
                output_tokens=OUTPUT_SHARE * req.output,
                handoff_s=self._policy.config.handoff_ms / 1e3,
                now_s=now_s,
                tpot_s=req.tpot_s,
            ),
            self._rng,
        )
        if pair is not None:
            req.prefill, req.decode = pair.prefill, pair.decode
        owed = self._owed[req.prefill]
        if not owed.tickets:
            owed.busy_since_s = now_s
        cached = min(states[req.prefill].cached_tokens, req.prompt - 1.0)
        owed.prefix.add(blocks)
        law = self._prefills[req.prefill].prefill.law
        work = law.work_s(req.prompt - cached, cached, self._system.chunk_tokens)
        insort(owed.tickets, (req.due_s, req.index, work))
        self._promise(req, 1)

    def prefilled(self, req: SimRequest, now_s: float) -> None:
        """Its prompt is done."""
        owed = self._owed[req.prefill]
        at = bisect_left(owed.tickets, (req.due_s, req.index, 0.0))
        if at < len(owed.tickets) and owed.tickets[at][1] == req.index:
            del owed.tickets[at]
            owed.busy_since_s = now_s

    def finished(self, req: SimRequest) -> None:
        """Its last token is out."""
        self._promise(req, -1)

    def _promise(self, req: SimRequest, sign: int) -> None:
        running, tokens = self._promised[req.decode]
        grown = req.prompt + OUTPUT_SHARE * req.output
        self._promised[req.decode] = running + sign, tokens + sign * grown

    def _prefill_state(self, index: int, now_s: float, blocks: Blocks) -> PrefillState:
        owed = self._owed[index]
        works = [work for *_, work in owed.tickets]
        progress = min(now_s - owed.busy_since_s, works[0]) if works else 0.0
        deadlines = [deadline for deadline, *_ in owed.tickets]
        began = now_s - progress + self._policy.config.handoff_ms / 1e3
        return PrefillState(
            self._prefills[index].prefill.law,
            self._system.chunk_tokens,
            deadlines,
            works,
            progress,
            self._policy.urgent,
            cached_tokens=owed.prefix.cached_tokens(blocks),
            backlog=Backlog.of(deadlines, works, began) if works else EMPTY,
        )

    def _decode_state(self, index: int) -> DecodeState:
        law = self._decodes[index].decode.law
        return DecodeState(law, *self._promised[index], self._system.decode_kv_tokens)
