"""Pausing on a fake scheduler: who gets the chunk slot, and that nobody is lost on the way."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import prefill, state
from sglang_kairos.predict.prefill_time import PrefillTimeModel


class Req:
    """As much of SGLang's request as the glue looks at. `done` tokens of `length` are computed."""

    def __init__(
        self, rid: str, length: int, ttft_ms: float, done: int = 0, age_ms: float = 0
    ) -> None:
        self.rid = rid
        self.origin_input_ids = [0] * length
        self.output_ids: list[int] = []
        self.extend_end = done or None
        self.prefix_len = done
        self.num_matched_prefix_tokens = 0
        self.pending_bootstrap = False
        wire = {"kairos": {"ttft_ms": ttft_ms, "tpot_ms": 50.0, "age_ms": age_ms}}
        self.sampling_params = SimpleNamespace(custom_params=wire)
        self.time_stats = SimpleNamespace(scheduler_recv_time=time.perf_counter())

    def __repr__(self) -> str:
        return self.rid


def make_scheduler(waiting: list[Req], chunked: Req | None) -> Any:
    return SimpleNamespace(
        waiting_queue=list(waiting),
        chunked_req=chunked,
        _pending_chunked_abort_req=None,
        chunked_prefill_size=512,
        max_prefill_tokens=16384,
        page_size=1,
        tp_size=1,
        device="cpu",
        tree_cache=SimpleNamespace(disable=True, evictable_size=lambda: 0),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 100_000),
        disaggregation_mode=SimpleNamespace(value="prefill"),
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=list),
    )


@pytest.fixture
def kairos(monkeypatch: pytest.MonkeyPatch) -> state.KairosState:
    """A prefill state whose predictor knows 100 us a token, as this process' current one."""
    made = state.KairosState(make_scheduler([], None), KairosConfig())
    made.prefill_time = PrefillTimeModel(1e-3, 1e-4, 0.0)
    monkeypatch.setattr(state, "CURRENT", made)
    return made


def built(extend: list[int], prefix: list[int]) -> Any:
    return SimpleNamespace(extend_lens=extend, prefix_lens=prefix, launch_ts=time.monotonic())


def build(result: Any = SimpleNamespace(extend_lens=None)) -> Any:  # noqa: B008
    """An upstream get_new_batch_prefill that notes what it was given."""

    def original(scheduler: Any, running_batch: Any) -> Any:
        prefill.calc_priority(lambda *a: None, None, scheduler.waiting_queue)
        original.calls.append((scheduler.chunked_req, list(scheduler.waiting_queue)))
        return SimpleNamespace(batch_to_run=result, running_batch=running_batch)

    original.calls = []
    return original


def test_a_long_chunk_is_paused_for_urgent_prompts_that_fill_the_budget(
    kairos: state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    urgent = [Req(f"u{i}", 256, ttft_ms=200) for i in range(2)]
    scheduler, upstream = make_scheduler(urgent, long), build()
    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert upstream.calls == [(None, urgent)]
    assert [entry.req for entry in kairos.paused] == [long]
    assert kairos.counters["pauses"] == 1


def test_the_paused_prefill_comes_back_when_nothing_is_more_urgent(
    kairos: state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    kairos.paused.append(state.Paused(long, kairos.now()))
    scheduler, upstream = make_scheduler([], None), build()
    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert upstream.calls == [(long, [])]
    assert kairos.paused == [] and scheduler.chunked_req is long


def test_a_small_urgent_prompt_shares_the_chunk_instead_of_pausing(
    kairos: state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    scheduler, limits = make_scheduler([Req("small", 100, ttft_ms=200)], long), []

    def upstream(scheduler: Any, running: Any) -> Any:
        limits.append(prefill.chunk_limit(lambda *a: 1, None, long, [], 512, 1))
        return SimpleNamespace(batch_to_run=None, running_batch=running)

    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert scheduler.chunked_req is long and kairos.paused == []
    assert limits == [412]


def test_without_a_plan_upstream_decides_the_chunk_share(kairos: state.KairosState) -> None:
    assert prefill.chunk_limit(lambda *a: 77, None, None, [], 512, 1) == 77


def test_a_blocked_batch_resumes_a_paused_prefill_rather_than_stall(
    kairos: state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(2)], long)
    seen: list[Any] = []

    def upstream(scheduler: Any, running: Any) -> Any:
        seen.append(scheduler.chunked_req)
        batch = None if scheduler.chunked_req is None else built([512], [512])
        return SimpleNamespace(batch_to_run=batch, running_batch=running)

    result = prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert seen == [None, long] and result.batch_to_run is not None
    assert kairos.counters["forced_resumes"] == 1


def test_requests_held_back_return_to_the_queue_even_when_upstream_fails(
    kairos: state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [Req("a", 10, 100), Req("b", 10, 100)]
    scheduler = make_scheduler(waiting, None)
    monkeypatch.setattr(prefill, "_decide", lambda *a: ([0], -1, None, [1]))

    def upstream(scheduler: Any, running: Any) -> Any:
        assert scheduler.waiting_queue == [waiting[0]]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert set(scheduler.waiting_queue) == set(waiting)
    assert kairos.plan is None


def test_an_optimistic_request_is_never_paused(kairos: state.KairosState) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    long.pending_bootstrap = True
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(2)], long)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is long


def test_pausing_can_be_switched_off(kairos: state.KairosState) -> None:
    kairos.config = dataclasses.replace(kairos.config, pause=False)
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(2)], long)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is long and not kairos.paused


def test_an_abort_reaches_a_paused_request_and_upstream_tears_it_down(
    kairos: state.KairosState,
) -> None:
    gone, stays = Req("gone", 900, 1000, done=512), Req("stays", 900, 1000, done=512)
    kairos.paused += [state.Paused(gone, 0.0), state.Paused(stays, 0.0)]
    slot = Req("slot", 900, 1000, done=512)
    scheduler = make_scheduler([], slot)
    request = SimpleNamespace(abort_all=False, rid="gone")
    prefill.abort_request(lambda *a: None, scheduler, request)
    torn: list[Any] = []

    def upstream(scheduler: Any) -> None:
        req = scheduler._pending_chunked_abort_req
        if req is not None:
            assert scheduler.chunked_req is req
            torn.append(req)
            scheduler.chunked_req = scheduler._pending_chunked_abort_req = None

    prefill.process_pending_chunked_abort(upstream, scheduler)
    assert torn == [gone]
    assert [entry.req for entry in kairos.paused] == [stays]
    assert scheduler.chunked_req is slot


def test_a_scheduler_with_paused_work_is_not_idle_and_reports_it(
    kairos: state.KairosState,
) -> None:
    assert prefill.is_fully_idle(lambda *a, **k: True, None) is True
    kairos.paused.append(state.Paused(Req("p", 1000, 1000, done=400), 0.0))
    assert prefill.is_fully_idle(lambda *a, **k: True, None, for_health_check=True) is False
    assert prefill.num_pending_tokens(lambda *a, **k: 50, None) == 650


def test_a_request_paused_too_long_runs_next(kairos: state.KairosState) -> None:
    old = Req("old", 8000, ttft_ms=60_000, done=512)
    kairos.paused.append(state.Paused(old, kairos.now() - 61.0))
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(4)], None)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is old


def test_the_age_at_the_router_counts_against_the_deadline(kairos: state.KairosState) -> None:
    young, old = Req("young", 10, 1000), Req("old", 10, 1000, age_ms=400)
    assert kairos.promise(old).ttft_due_s < kairos.promise(young).ttft_due_s - 0.3


def test_a_malformed_slo_that_slipped_through_falls_back_to_the_default(
    kairos: state.KairosState,
) -> None:
    req = Req("bad", 10, 1000)
    req.sampling_params.custom_params = {"kairos": {"ttft_ms": "soon"}}
    assert kairos.promise(req).slo == kairos.table.default


@pytest.mark.parametrize(
    ("has_chunk", "room", "want"),
    [(True, 99, "OTHER"), (True, 100, "upstream"), (False, 99, "upstream")],
)
def test_no_second_chunked_prefill_beside_the_slot(
    kairos: state.KairosState,
    monkeypatch: pytest.MonkeyPatch,
    has_chunk: bool,
    room: int,
    want: str,
) -> None:
    import sys

    policy = SimpleNamespace(AddReqResult=SimpleNamespace(OTHER="OTHER"))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_policy", policy)  # type: ignore[arg-type]
    adder = SimpleNamespace(rem_chunk_tokens=room, ceil_paged_tokens=lambda n: n)
    req = SimpleNamespace(full_untruncated_fill_ids=[0] * 120, prefix_len=20, host_hit_length=0)
    got = prefill.add_one_req(
        lambda *a: "upstream", adder, req, has_chunked_req=has_chunk, truncation_align_size=None
    )
    assert got == want


def test_a_failing_policy_leaves_stock_behaviour_and_a_counter(
    kairos: state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(prefill, "plan_prefill", broken)
    long, waiting = Req("long", 8000, 60_000, done=512), [Req("a", 9, 200), Req("b", 9, 100)]
    scheduler, upstream = make_scheduler(waiting, long), build()
    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert upstream.calls == [(long, waiting)]
    assert kairos.counters["urgency_errors"] == 1


def test_the_predictor_learns_a_cpu_step_when_the_next_one_is_planned(
    kairos: state.KairosState,
) -> None:
    batch = built([512], [0])
    prefill.get_new_batch_prefill(build(batch), make_scheduler([Req("a", 512, 100)], None), "r")
    assert kairos.prefill_time.error.samples == 0
    batch.launch_ts = time.monotonic() - 0.2
    prefill.get_new_batch_prefill(build(), make_scheduler([], None), "r")
    assert kairos.prefill_time.error.samples == 1
    prefill.get_new_batch_prefill(build(), make_scheduler([], None), "r")
    assert kairos.prefill_time.error.samples == 1
