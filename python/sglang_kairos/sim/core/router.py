"""The router: pairs by `policy.placement`, or in turn as a router that knows nothing does.

Its books are the real router's (`router.fleet.reservation`), which hears of the servers what
``/server_info`` of real ones would say.
"""

from __future__ import annotations

from random import Random
from typing import Any

from sglang_kairos.policy.placement import OUTPUT_SHARE, PlacedRequest, choose_pair
from sglang_kairos.predict.prediction_error import LEARNT_STEPS
from sglang_kairos.router.fleet.prefix_index import Blocks, PrefixIndex
from sglang_kairos.router.fleet.reservation import Reservation
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.core.predictions import Predictor
from sglang_kairos.sim.core.request import SimRequest
from sglang_kairos.sim.hardware.times import System


class SimRouter:
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
        self._system, self._policy, self._block_tokens = system, policy, block_tokens
        self._prefills = [
            (PrefillServer(f"http://prefill-{i}", None), p) for i, p in enumerate(prefills)
        ]
        for server, _ in self._prefills:
            server.prefix = PrefixIndex(system.prefill_kv_tokens // block_tokens)
        self._decodes = [(DecodeServer(f"http://decode-{i}"), p) for i, p in enumerate(decodes)]
        self._told: dict[str, Any] = {}
        self._reserved: dict[SimRequest, Reservation] = {}
        self._now_s = 0.0
        self._rng = Random(f"{seed}/router")
        self._turn = 0

    def place(self, req: SimRequest, now_s: float) -> None:
        """Chooses the request's servers."""
        turn, width = self._turn, len(self._prefills)
        self._turn += 1
        req.prefill, req.decode = turn % width, turn // width % len(self._decodes)
        if not self._policy.route or width * len(self._decodes) == 1:
            return
        self._hear()
        blocks = Blocks(req.blocks, self._block_tokens)
        handoff_s = self._policy.config.handoff_ms / 1e3
        states = [server.state(now_s, handoff_s, blocks) for server, _ in self._prefills]
        request = PlacedRequest(
            tokens=req.prompt,
            deadline_s=req.due_s,
            output_tokens=OUTPUT_SHARE * req.output,
            handoff_s=handoff_s,
            now_s=now_s,
            tpot_s=req.tpot_s,
        )
        decode_states = [server.state(now_s) for server, _ in self._decodes]
        pair = choose_pair(states, decode_states, request, self._rng)
        if pair is not None:
            req.prefill, req.decode = pair.prefill, pair.decode
        prefill, decode = self._prefills[req.prefill][0], self._decodes[req.decode][0]
        cached = states[req.prefill].cached_tokens
        self._now_s = now_s
        reservation = Reservation(
            prefill,
            decode,
            request,
            lambda: self._now_s,
            cached,
            sent=lambda: prefill.prefix.add(blocks),
        )
        self._reserved[req] = reservation.take()

    def prefilled(self, req: SimRequest, now_s: float) -> None:
        """Notes that its prompt is done."""
        self._now_s = now_s
        if req in self._reserved:
            self._reserved[req].prefilled()

    def finished(self, req: SimRequest) -> None:
        """Notes that its last token is out."""
        if (reservation := self._reserved.pop(req, None)) is not None:
            reservation.release()

    def _hear(self) -> None:
        """What servers say of themselves, where that is news."""
        for server, predictor in self._prefills:
            if self._told.get(server.url) is not (law := predictor.prefill.law):
                self._told[server.url] = law
                chunk = {"chunked_prefill_size": self._system.chunk_tokens}
                server.learn(_info("prefill", law.to_json()) | chunk)
                server.kairos = self._policy.urgent
        for decode, predictor in self._decodes:
            if self._told.get(decode.url) is not (step := predictor.decode.law):
                self._told[decode.url] = step
                size = {"max_total_num_tokens": self._system.decode_kv_tokens}
                decode.learn(_info("decode", step.to_json()) | size)


def _info(role: str, law: dict[str, Any]) -> dict[str, Any]:
    """What ``/server_info`` says of a predictor."""
    report = {role: law, f"{role}_error": {"samples": LEARNT_STEPS}}
    return {"internal_states": [{"kairos": report}]}
