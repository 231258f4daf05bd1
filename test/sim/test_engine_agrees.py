"""The simulator decides as the engine does: the same queues, put to the engine's own glue."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.engine import prefill as engine_prefill
from sglang_kairos.engine.state import KairosState, Paused, Promise
from sglang_kairos.policy.urgency import PrefillPlan
from sglang_kairos.sim.cluster import Cluster, Setup
from sglang_kairos.sim.policies import POLICIES
from sglang_kairos.sim.prefill import PrefillServer
from sglang_kairos.sim.request import SimRequest
from sglang_kairos.sim.times import LawTimes, System
from sglang_kairos.slo import Slo
from sglang_kairos.tools.traces import long_tail

SYSTEM = System(
    LawTimes((5e-3, 1e-4, 1e-9, 0.0), (3.5e-3, 0.22e-3, 0.0, 0.0, 0.65e-6), None),
    chunk_tokens=512,
    prefill_kv_tokens=60_000,
    kv_bytes=4096,
)
SETUP = Setup(SYSTEM, ttft_ms=(500.0, 3000.0), tpot_ms=12.0)
ROWS = long_tail(80, 8.0, seed=11)


def engine_state(mode: str) -> KairosState:
    scheduler = SimpleNamespace(
        disaggregation_mode=SimpleNamespace(value=mode),
        device="cpu",
        tp_size=1,
        enable_overlap=False,
        result_queue=(),
        encoder_decoder=False,
        require_mlp_sync=False,
        req_to_token_pool=SimpleNamespace(),
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=list),
    )
    return KairosState(scheduler, POLICIES["kairos"].config)


class Fake(SimpleNamespace):
    """As much of SGLang's request as the glue looks at."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def promised(req: SimRequest, **more: Any) -> Any:
    slo = Slo(req.ttft_s * 1e3, req.tpot_s * 1e3)
    facts = {
        "index": req.index,
        "_kairos": Promise(slo, req.arrival_s),
        "origin_input_ids": range(req.prompt),
        "beam_group": None,
        "sampling_params": SimpleNamespace(max_new_tokens=req.output),
        "time_stats": SimpleNamespace(scheduler_recv_time=req.arrival_s),
    }
    return Fake(**{**facts, **more})


def test_every_prefill_plan_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    state = engine_state("prefill")
    compared = paused = 0

    def compare(server: PrefillServer, plan: PrefillPlan) -> None:
        nonlocal compared, paused
        now = server._clock.now_s
        monkeypatch.setattr(state, "now", lambda: now)
        state.prefill_time, state.late_share = server._predictor.prefill, server._late_share
        waiting = [promised(req, output_ids=[]) for req in server.waiting]
        slot = [] if server.slot is None else [server.slot]
        partials = [
            promised(req, output_ids=[], extend_end=req.done, pending_bootstrap=False)
            for req in (*slot, *server.paused)
        ]
        since = [req.paused_since_s for req in server.paused]
        state.paused = [
            Paused(req, at) for req, at in zip(partials[len(slot) :], since, strict=True)
        ]
        free = server.free_tokens
        scheduler = SimpleNamespace(
            chunked_prefill_size=SYSTEM.chunk_tokens,
            page_size=1,
            tree_cache=SimpleNamespace(disable=True, evictable_size=lambda: 0),
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free),
        )
        at = len(waiting) if slot else -1
        step = engine_prefill._decide(state, scheduler, waiting, partials, at)
        assert step == (plan.order, plan.slot, plan.chunk_limit, plan.hold)
        compared, paused = compared + 1, paused + len(server.paused)

    cluster = Cluster(SETUP, POLICIES["kairos"], ROWS)
    cluster.prefills[0].watch = compare
    cluster.run()
    assert compared > 50 and paused > 0


def test_steps_run_what_the_plan_puts_first() -> None:
    cluster = Cluster(SETUP, POLICIES["kairos"], ROWS)
    server = cluster.prefills[0]
    seen: list[tuple[list[int], int]] = []

    def note(server: PrefillServer, plan: PrefillPlan) -> None:
        waiting = [req.index for req in server.waiting]
        order = [waiting[i] for i in plan.order if i not in set(plan.hold)]
        jobs = [*server.waiting, *([server.slot] if server.slot else []), *server.paused]
        seen.append((order, -1 if plan.slot < 0 else jobs[plan.slot].index))

    planned = server._planned_batch

    def checked() -> list[tuple[SimRequest, int]]:
        batch = planned()
        order, slot = seen[-1]
        ran = [req.index for req, _ in batch]
        if slot >= 0:
            assert ran.pop(0) == slot
        assert ran == order[: len(ran)]
        return batch

    server.watch = note
    server._planned_batch = checked  # type: ignore[method-assign]
    cluster.run()
    assert max(len(order) for order, _ in seen) > 3
