"""Runs a trace on N prefill servers, M decode servers and a router, and returns the outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from sglang_kairos.loads.replay import OK, Result
from sglang_kairos.loads.traces import MOONCAKE_BLOCK_TOKENS, Request
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.core.clock import EventClock
from sglang_kairos.sim.core.decode import SimDecodeServer
from sglang_kairos.sim.core.predictions import PredictionError, Predictor
from sglang_kairos.sim.core.prefill import SimPrefillServer
from sglang_kairos.sim.core.request import SimRequest
from sglang_kairos.sim.core.router import SimRouter
from sglang_kairos.sim.hardware.times import System

HONEST = PredictionError()


@dataclass(frozen=True)
class Setup:
    """The simulated cluster. `ttft_ms`: one target, or tiers that requests draw from evenly."""

    system: System
    ttft_ms: tuple[float, ...] = (2000.0,)
    tpot_ms: float = 100.0
    prefills: int = 1
    decodes: int = 1
    seed: int = 0
    error: PredictionError = HONEST


class SimCluster:
    """One run of one policy over one trace; `run` may be called once."""

    prefill_kind: type[SimPrefillServer] = SimPrefillServer
    decode_kind: type[SimDecodeServer] = SimDecodeServer

    def __init__(self, setup: Setup, policy: Policy, rows: Sequence[Request]) -> None:
        self.setup, self.policy = setup, policy
        self.clock = EventClock()
        self.requests = make_requests(rows, setup)
        system, clock = setup.system, self.clock
        prefill_minds = [self.predictor(f"p{i}") for i in range(setup.prefills)]
        decode_minds = [self.predictor(f"d{i}") for i in range(setup.decodes)]
        block_tokens = cache_block_tokens(rows)
        self.router = SimRouter(
            system, policy, prefill_minds, decode_minds, setup.seed, block_tokens
        )
        self.prefills = [
            self.prefill_kind(
                clock, system, policy, mind, block_tokens, self._prefilled, self._arrived
            )
            for mind in prefill_minds
        ]
        self.decodes = [
            self.decode_kind(clock, system, policy, mind, self._reserved, self.router.finished)
            for mind in decode_minds
        ]

    def predictor(self, server: str) -> Predictor:
        """Returns the predictor of the server with that name."""
        setup = self.setup
        return Predictor(setup.system.times, setup.error, f"{setup.seed}/{server}")

    def run(self) -> Result:
        """Serves every request to its end. Returns the outcomes."""
        for req in self.requests:
            self.clock.at(req.arrival_s, partial(self._arrive, req))
        self.clock.run()
        duration = max((req.ended_s for req in self.requests), default=0.0)
        return Result([req.outcome() for req in self.requests], duration)

    def facts(self) -> dict[str, Any]:
        """Returns what happened inside, for the report: shares of time and tokens, and counts."""
        counters: Counter[str] = Counter()
        for one in [s.counters for s in self.prefills] + [s.counters for s in self.decodes]:
            counters.update(one)
        span = max((req.ended_s for req in self.requests), default=0.0) or 1.0
        prompt = sum(req.done for req in self.requests) or 1
        return {
            "prefill_busy": sum(s.busy_s for s in self.prefills) / span / len(self.prefills),
            "decode_busy": sum(s.busy_s for s in self.decodes) / span / len(self.decodes),
            "cache_hit": sum(req.hit for req in self.requests) / prompt,
            "arrival_tokens_per_s": self._tokens_while_arriving_per_s(),
            "counters": dict(sorted(counters.items())),
        }

    def _tokens_while_arriving_per_s(self) -> float | None:
        """Returns the output tokens per second until the last arrival; None if all arrive at once.

        The drain after it is left out: one late long request decides its length. A request's tokens
        count as evenly spread.
        """
        until = self.requests[-1].arrival_s if self.requests else 0.0
        if until <= 0.0:
            return None
        tokens = 0.0
        for req in self.requests:
            if req.status != OK or req.first_token_s >= until:
                continue
            lasted = req.last_token_s - req.first_token_s
            share = 1.0 if req.last_token_s <= until else (until - req.first_token_s) / lasted
            tokens += share * req.emitted
        return tokens / until

    def _arrive(self, req: SimRequest) -> None:
        why = too_large(req, self.setup.system)
        if why:
            req.refuse(self.clock.now_s, why)
            return
        self.router.place(req, self.clock.now_s)
        self.decodes[req.decode].ask(req)

    def _reserved(self, req: SimRequest) -> None:
        self.prefills[req.prefill].add(req)

    def _prefilled(self, req: SimRequest) -> None:
        self.router.prefilled(req, self.clock.now_s)

    def _arrived(self, req: SimRequest) -> None:
        self.decodes[req.decode].receive(req)


def make_requests(rows: Sequence[Request], setup: Setup) -> list[SimRequest]:
    """Returns the trace's rows with their targets. What is drawn depends on the seed alone."""
    tiers, noise = Random(f"{setup.seed}/tiers"), Random(f"{setup.seed}/work")
    sizes = {row.block_tokens for row in rows if row.hash_ids}
    if len(sizes) > 1:
        raise ValueError(f"block_tokens: must be one size for all rows, got {sorted(sizes)}")
    requests = []
    for index, row in enumerate(rows):
        ttft_ms = tiers.choice(setup.ttft_ms)
        blocks = (row.hash_ids or ())[: row.input_tokens // row.block_tokens]
        requests.append(
            SimRequest(
                index=index,
                row=row,
                ttft_s=ttft_ms / 1e3,
                tpot_s=setup.tpot_ms / 1e3,
                blocks=blocks,
                work_error=setup.error.draw(noise),
                priority=ttft_ms,
            )
        )
    return requests


def cache_block_tokens(rows: Sequence[Request]) -> int:
    """Returns the size of the trace's cache blocks; any will do if it names none."""
    return next((row.block_tokens for row in rows if row.hash_ids), MOONCAKE_BLOCK_TOKENS)


def too_large(req: SimRequest, system: System) -> str:
    """Returns why an empty cluster could not serve the request; empty if it could."""
    if req.prompt > system.prefill_kv_tokens:
        return f"prompt of {req.prompt} tokens exceeds the prefill server's KV memory"
    grown = req.prompt + max(system.reserved_tokens, req.output)
    if grown > system.decode_kv_tokens:
        return f"{grown} tokens exceed the decode server's KV memory"
    return ""
