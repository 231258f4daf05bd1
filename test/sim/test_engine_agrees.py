"""The simulator decides as the engine does: the same queues, put to the engine's own glue."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_kairos.engine import admission as engine_admission
from sglang_kairos.engine import decode as engine_decode
from sglang_kairos.engine import prefill as engine_prefill
from sglang_kairos.engine import running as engine_running
from sglang_kairos.engine.state import KairosState, Promise
from sglang_kairos.policy.urgency import PrefillPlan
from sglang_kairos.sim import decode as sim_decode
from sglang_kairos.sim.cluster import Cluster, Setup
from sglang_kairos.sim.decode import (
    CONTEXT,
    EMITTED,
    FIRST_S,
    LAST_S,
    SERVED,
    TPOT_S,
    DecodeServer,
)
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


def promised(req: SimRequest, kept: bool = True, **more: Any) -> Any:
    slo = Slo(req.ttft_s * 1e3, req.tpot_s * 1e3)
    facts = {
        "index": req.index,
        "_kairos": Promise(slo, req.arrival_s, kept=kept),
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
        state.paused = partials[len(slot) :]
        for req, at in zip(state.paused, since, strict=True):
            req._kairos.pause(at)
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


def test_every_decode_choice_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    state = engine_state("decode")
    # The server's circuit breaker judges a model by what it has seen; the simulator's is given.
    monkeypatch.setattr(engine_decode, "_trusted", lambda _: True)
    parked = 0
    fakes: dict[SimRequest, Any] = {}

    def joined(req: SimRequest, first_token_s: float, kept: bool) -> Any:
        stats = SimpleNamespace(last_decode_finish_time=first_token_s)
        fake = promised(req, output_ids=[0], time_stats=stats, kept=kept, finished=lambda: True)
        fake._kairos.first_token_s = first_token_s
        return fake

    def compare(server: DecodeServer, keep: list[int] | None) -> None:
        nonlocal parked
        now, table = server._clock.now_s, server._table
        monkeypatch.setattr(state, "now", lambda: now)
        state.step_time = server._predictor.decode
        reqs = []
        for column, req in enumerate(server.running):
            if req not in fakes:
                fakes[req] = joined(req, float(table[FIRST_S, column]), req not in server._unkept)
            reqs.append(fakes[req])
        context = table[CONTEXT, : len(reqs)].copy()
        batch = SimpleNamespace(
            reqs=reqs,
            seq_lens_cpu=SimpleNamespace(numpy=lambda: context),
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            sampling_info=SimpleNamespace(
                penalizer_orchestrator=SimpleNamespace(is_required=False)
            ),
            hisparse_coordinator=None,
            model_config=SimpleNamespace(is_encoder_decoder=False),
        )
        # The engine learns from requests' ends, which these copies do not have.
        stay = SimpleNamespace(output_tokens=server._stay.output_tokens, ended=lambda _: None)
        engine_running.memory_of(state).stay = stay
        everybody = list(range(len(reqs)))
        assert engine_decode._choose(state, batch) == (everybody if keep is None else keep)
        engine_running.memory_of(state).table.ran(keep)
        parked += 0 if keep is None else len(reqs) - len(keep)

    cluster = Cluster(SETUP, POLICIES["kairos-decode"], ROWS)
    cluster.decodes[0].watch = compare
    cluster.run()
    assert parked > 0


@pytest.mark.parametrize("give_up_s", [300.0, 0.5])
def test_every_reservation_is_the_engines(
    give_up_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim_decode, "GIVE_UP_S", give_up_s)
    state = engine_state("decode")
    engine_running.memory_of(state).clock_s = give_up_s
    system = replace(SYSTEM, max_running=24)
    cluster = Cluster(replace(SETUP, system=system), POLICIES["kairos"], ROWS)
    server = cluster.decodes[0]
    planned = server._plan
    held = pressed = 0

    def compared(used_slots: int) -> tuple[int, int]:
        nonlocal held, pressed
        now, queue, table = cluster.clock.now_s, list(server.asking), server._table
        kept, count = planned(used_slots)
        monkeypatch.setattr(state, "now", lambda: now)
        memory = engine_running.memory_of(state)
        memory.stay, state.step_time = server._stay, server._predictor.decode
        monkeypatch.setattr(state, "late_share", server._share)
        running = [promised(req, output_ids=[]) for req in server.running]
        columns = np.zeros((6, len(running)))
        rows = [FIRST_S, TPOT_S, EMITTED, LAST_S, SERVED]
        columns[:5] = table[rows, : len(running)]
        memory.table._reqs, memory.table.columns = running, columns
        joining = [
            promised(req, kept=req not in server._unkept)
            for req in (*server._coming, *server.ready)
        ]
        context, free = table[CONTEXT, : len(running)], system.decode_kv_tokens - server.kv_tokens
        state.scheduler = SimpleNamespace(
            running_batch=SimpleNamespace(
                reqs=running, seq_lens_cpu=SimpleNamespace(numpy=lambda: context)
            ),
            waiting_queue=joining[len(server._coming) :],
            max_total_num_tokens=system.decode_kv_tokens,
            max_running_requests=24,
            req_to_token_pool=SimpleNamespace(size=24),
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free),
        )
        fakes = SimpleNamespace(
            queue=[SimpleNamespace(req=promised(req)) for req in queue],
            transfer_queue=SimpleNamespace(
                queue=[SimpleNamespace(req=req) for req in joining[: len(server._coming)]]
            ),
        )
        order, *counts, _, pressing = engine_admission._plan(state, fakes)
        pressed += pressing
        assert ([queue[i] for i in order], counts) == (server.asking, [kept, count])
        held += len(queue) - count
        return kept, count

    server._plan = compared  # type: ignore[method-assign]
    cluster.run()
    assert held > 50 and (pressed > 0) == (give_up_s < 300.0)


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
