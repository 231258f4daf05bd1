"""Whoever looks for requests finds the paused ones: aborts, timeouts, failed peers, reports."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import Req, build, make_scheduler, make_state, pause
from helpers.trees import TESTED_VERSIONS
from helpers.upstream import upstream_function
from sglang_kairos.engine.hooks import pausing, prefill
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.policy.prefill_step import PrefillPlan


@pytest.fixture
def kairos(monkeypatch: pytest.MonkeyPatch) -> scheduler_state.KairosState:
    """A prefill state as this process' current one."""
    made = make_state()
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    return made


def test_an_abort_reaches_a_paused_request_and_upstream_tears_it_down(
    kairos: scheduler_state.KairosState,
) -> None:
    gone, stays = Req("gone", 900, 1000, done=512), Req("stays", 900, 1000, done=512)
    pause(kairos, gone, stays)
    slot = Req("slot", 900, 1000, done=512)
    scheduler = make_scheduler([], slot)
    request = SimpleNamespace(abort_all=False, rid="gone")
    pausing.abort_request(lambda *a: None, scheduler, request)
    torn: list[Any] = []

    def upstream(scheduler: Any) -> None:
        req = scheduler._pending_chunked_abort_req
        if req is not None:
            assert scheduler.chunked_req is req
            torn.append(req)
            scheduler.chunked_req = scheduler._pending_chunked_abort_req = None

    pausing.process_pending_chunked_abort(upstream, scheduler)
    assert torn == [gone]
    assert kairos.paused == [stays]
    assert scheduler.chunked_req is slot


def teardown(version: str, torn: list[Any]) -> Any:
    """SGLang's own process_pending_chunked_abort; like upstream's, its release happens once."""

    def release(req: Any, *args: Any, **kwargs: Any) -> None:
        assert req.kv.req_pool_idx is not None, "released a second time"
        req.kv.req_pool_idx = None
        torn.append(req)

    def finish(req: Any, *args: Any) -> None:
        req.finished_reason = "aborted"

    names = {
        "release_kv_cache": release,
        "prepare_abort": finish,
        "FINISH_ABORT": lambda message: SimpleNamespace(message=message, status_code=None),
        "DisaggregationMode": SimpleNamespace(PREFILL="prefill"),
        "maybe_release_metadata_buffer": lambda *args: None,
        "AbortReq": SimpleNamespace,
        "_make_abort_req": lambda req, **more: req,
        "logger": SimpleNamespace(debug=lambda text: None),
    }
    name = "Scheduler.process_pending_chunked_abort"
    return upstream_function(version, "managers/scheduler.py", name, names)


def scheduler_that_aborts(waiting: list[Req], slot: Req | None) -> Any:
    scheduler = make_scheduler(waiting, slot)
    nothing = lambda *args, **kwargs: None  # noqa: E731
    scheduler.disaggregation_mode = "prefill"
    scheduler.enable_hicache_storage = False
    scheduler.req_to_metadata_buffer_idx_allocator = None
    scheduler.clear_pending_chunk_send = scheduler._release_aborted_request = nothing
    scheduler.send_abort_output = nothing
    scheduler.ipc_channels = SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=nothing))
    return scheduler


def retire(req: Req) -> None:
    """As upstream does when the result of an aborted request comes in."""
    req.finished_reason, req.kv.req_pool_idx = "aborted", None


def put_back(req: Req) -> None:
    """As upstream does with an optimistic request: its KV is gone, it begins anew."""
    req.extend_end, req.prefix_len, req.kv.req_pool_idx = None, 0, None


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_a_paused_request_that_has_finished_is_not_torn_down_a_second_time(
    kairos: scheduler_state.KairosState, version: str
) -> None:
    first, second = (Req(name, 900, 1000, done=512) for name in ("first", "second"))
    for req in (first, second):
        req.discard_output_reason = None
        req.disagg_kv_sender = SimpleNamespace(abort=lambda: None)
        req.time_stats.trace_ctx = SimpleNamespace(abort=lambda **info: None)
    pause(kairos, first, second)
    scheduler, torn = scheduler_that_aborts([], None), []
    everybody = SimpleNamespace(abort_all=True, rid="")
    pausing.abort_request(lambda *a: None, scheduler, everybody)
    retire(first)  # its last result came before the scheduling step
    pausing.process_pending_chunked_abort(teardown(version, torn), scheduler)
    assert torn == [second] and not kairos.paused
    assert (kairos.counters["paused_released"], kairos.counters["paused_aborts"]) == (1, 1)


def see_inflight(scheduler: Any, seen: list[Any]) -> None:
    batches = pausing.collect_inflight_batches(lambda s: [], scheduler)
    seen += [req for batch in batches for req in batch.reqs]


def see_the_slot(scheduler: Any, seen: list[Any]) -> None:
    seen += filter(None, [scheduler.chunked_req])


def see_the_queue(scheduler: Any, seen: list[Any]) -> None:
    seen += scheduler.waiting_queue


# Each shows upstream the paused in its own way; `seen` takes down who was shown.
WALKS = {
    "tear-down": lambda scheduler, seen: pausing.process_pending_chunked_abort(
        lambda s: see_the_slot(s, seen), scheduler
    ),
    "abort": lambda scheduler, seen: pausing.abort_request(
        lambda s, r: None, scheduler, SimpleNamespace(abort_all=True, rid="")
    ),
    "inflight": see_inflight,
    "peers": lambda scheduler, seen: pausing.resolve_waiting_queue_bootstrap(
        lambda s: see_the_queue(s, seen), scheduler
    ),
    "report": lambda scheduler, seen: pausing.report_with_paused(
        lambda r: see_the_queue(r.scheduler, seen), SimpleNamespace(scheduler=scheduler)
    ),
    "load": lambda scheduler, seen: seen.extend(
        range(pausing.num_pending_tokens(lambda i: 0, None))
    ),
    "idle": lambda scheduler, seen: seen.extend(
        [] if pausing.is_fully_idle(lambda s: True, None) else ["not idle"]
    ),
    "step": lambda scheduler, seen: prefill.get_new_batch_prefill(build(), scheduler, "r"),
}


@pytest.mark.parametrize("gone", [retire, put_back])
@pytest.mark.parametrize("walk", WALKS)
def test_whoever_upstream_has_ended_or_put_back_is_paused_no_more(
    kairos: scheduler_state.KairosState, gone: Any, walk: str
) -> None:
    req, seen = Req("gone", 900, 1000, done=512), []
    pause(kairos, req)
    kairos.promise(kairos.paused[0]).aborted = walk == "tear-down"
    gone(req)
    scheduler = make_scheduler([], None)
    WALKS[walk](scheduler, seen)
    see_the_slot(scheduler, seen)
    assert not kairos.paused and not seen
    assert kairos.counters["resumes"] == 0


def test_an_optimistic_request_in_the_slot_is_not_swapped_for_a_paused_one(
    kairos: scheduler_state.KairosState,
) -> None:
    optimistic, paused = Req("o", 900, 1000, done=512), Req("p", 900, 1000, done=512)
    optimistic.pending_bootstrap = True
    pause(kairos, paused, since_s=kairos.now())
    scheduler, upstream = make_scheduler([], optimistic), build(None)
    prefill.get_new_batch_prefill(upstream, scheduler, "r")
    assert scheduler.chunked_req is optimistic
    assert kairos.paused == [paused]


def test_timeouts_and_weight_updates_find_paused_requests_among_the_started(
    kairos: scheduler_state.KairosState,
) -> None:
    running = SimpleNamespace(reqs=[Req("r", 9, 9)])
    assert pausing.collect_inflight_batches(lambda s: [running, None], None) == [running, None]
    paused = Req("p", 900, 1000, done=512)
    pause(kairos, paused)
    *rest, ours = pausing.collect_inflight_batches(lambda s: [running, None], None)
    assert rest == [running, None] and ours.reqs == [paused]


def test_where_the_started_are_a_set_the_paused_are_in_it(
    kairos: scheduler_state.KairosState,
) -> None:
    running, paused = Req("r", 9, 9), Req("p", 900, 1000, done=512)
    found = {running}
    assert pausing.collect_inflight_reqs(lambda s: found, None) == {running}
    pause(kairos, paused)
    assert pausing.collect_inflight_reqs(lambda s: found, None) == {running, paused}
    assert found == {running}, "upstream's own set is not changed"


def test_a_paused_request_whose_peer_failed_is_released_with_the_waiting_ones(
    kairos: scheduler_state.KairosState,
) -> None:
    failed, paused = Req("failed", 900, 1000, done=512), Req("p", 900, 1000, done=512)
    waiting, lost = Req("w", 9, 9), Req("lost", 9, 9)
    pause(kairos, failed, paused)
    scheduler = make_scheduler([waiting, lost], None)

    def upstream(scheduler: Any) -> None:
        assert scheduler.waiting_queue == [waiting, lost, failed, paused]
        scheduler.waiting_queue = [waiting, paused]

    pausing.resolve_waiting_queue_bootstrap(upstream, scheduler)
    assert scheduler.waiting_queue == [waiting]
    assert kairos.paused == [paused]
    assert kairos.counters["paused_failures"] == 1


def test_a_poll_that_raises_leaves_queue_and_paused_as_they_were(
    kairos: scheduler_state.KairosState,
) -> None:
    paused, waiting = Req("p", 900, 1000, done=512), Req("w", 9, 9)
    pause(kairos, paused)
    scheduler = make_scheduler([waiting], None)
    with pytest.raises(ZeroDivisionError):
        pausing.resolve_waiting_queue_bootstrap(lambda s: 1 / 0, scheduler)
    assert scheduler.waiting_queue == [waiting]
    assert kairos.paused == [paused]


def test_a_scheduler_with_paused_work_is_not_idle(kairos: scheduler_state.KairosState) -> None:
    assert pausing.is_fully_idle(lambda *a, **k: True, None) is True
    pause(kairos, Req("p", 1000, 1000, done=400))
    assert pausing.is_fully_idle(lambda *a, **k: True, None, for_health_check=True) is False
    assert pausing.is_fully_idle(lambda *a, **k: True, None, ignore_waiting=True) is False


def test_every_load_report_counts_what_is_left_of_paused_requests(
    kairos: scheduler_state.KairosState,
) -> None:
    def loads(inquirer: Any) -> Any:
        return SimpleNamespace(
            num_waiting_reqs=2,
            num_total_tokens=50,
            num_active_tokens=40,
            queues=SimpleNamespace(waiting=2),
        )

    assert vars(pausing.get_loads(loads, None)) == vars(loads(None))
    pause(kairos, Req("p", 1000, 1000, done=400), Req("q", 500, 1000, done=100))
    snapshot = pausing.get_loads(loads, None)
    assert (snapshot.num_waiting_reqs, snapshot.queues.waiting) == (4, 4)
    assert (snapshot.num_total_tokens, snapshot.num_active_tokens) == (1050, 1040)
    assert pausing.num_pending_tokens(lambda *a, **k: 50, None) == 1050
    assert pausing.num_waiting_uncached_tokens(lambda *a: 50, None) == 1050
    report = kairos.report()
    assert (report["paused"], report["paused_tokens"]) == (2, 500)


def test_a_request_held_back_still_counts_as_pending_while_the_batch_is_built(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [Req("a", 10, 100), Req("b", 33, 100)]
    monkeypatch.setattr(prefill, "_decide", lambda *a: PrefillPlan([0], -1, None, 0, [1]))
    pending: list[int] = []

    def upstream(scheduler: Any, running: Any) -> Any:
        pending.append(pausing.num_pending_tokens(lambda i: 10, None))
        return SimpleNamespace(batch_to_run=None, running_batch=running)

    prefill.get_new_batch_prefill(upstream, make_scheduler(waiting, None), "r")
    assert pending == [43] and pausing.num_pending_tokens(lambda i: 43, None) == 43


def test_log_lines_and_gauges_count_paused_requests_in_the_queue(
    kairos: scheduler_state.KairosState,
) -> None:
    waiting, paused = Req("w", 9, 9), Req("p", 900, 1000, done=512)
    reporter = SimpleNamespace(scheduler=make_scheduler([waiting], None))

    def upstream(reporter: Any, batch: str) -> int:
        assert batch == "batch"
        return len(reporter.scheduler.waiting_queue)

    assert pausing.report_with_paused(upstream, reporter, batch="batch") == 1
    pause(kairos, paused)
    assert pausing.report_with_paused(upstream, reporter, batch="batch") == 2
    assert reporter.scheduler.waiting_queue == [waiting]


def test_a_request_paused_too_long_runs_next(kairos: scheduler_state.KairosState) -> None:
    old = Req("old", 8000, ttft_ms=60_000, done=512)
    pause(kairos, old, since_s=kairos.now() - 61.0)
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(4)], None)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is old


def test_pauses_add_up_and_who_has_sat_out_its_share_keeps_the_slot(
    kairos: scheduler_state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=600_000, done=512)
    urgent = [Req(f"u{i}", 256, ttft_ms=200) for i in range(4)]
    for _ in range(2):
        scheduler = make_scheduler(urgent, long)
        kairos.paused.clear()
        prefill.get_new_batch_prefill(build(), scheduler, "running")
        assert scheduler.chunked_req is None, "a short pause is no reason to run"
        kairos.promise(long).pause(kairos.now() - 40.0)
        pausing.give_slot(kairos, scheduler, long)
    assert kairos.promise(long).paused_s == pytest.approx(80.0, abs=1.0)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is long and not kairos.paused


def test_at_most_max_paused_sit_out(kairos: scheduler_state.KairosState) -> None:
    kairos.config = dataclasses.replace(kairos.config, max_paused=2)
    pause(kairos, *(Req(f"p{i}", 8000, 600_000, done=512) for i in range(2)), since_s=kairos.now())
    urgent = [Req(f"u{i}", 256, ttft_ms=200) for i in range(4)]
    scheduler = make_scheduler(urgent, Req("slot", 8000, 600_000, done=512))
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert len(kairos.paused) == 2 and scheduler.chunked_req is not None


def test_no_second_long_prompt_starts_when_memory_could_not_finish_both(
    kairos: scheduler_state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    pause(kairos, long, since_s=kairos.now())
    urgent = Req("urgent", 4000, ttft_ms=2_000)
    for free, starts in ((11_000, False), (12_000, True)):
        scheduler, upstream = make_scheduler([urgent], None), build("batch")
        scheduler.token_to_kv_pool_allocator.available_size = lambda free=free: free
        kairos.paused[:] = [long]
        prefill._planned_batch(upstream, kairos, scheduler, "r")
        assert (upstream.calls[0][0] is None) is starts, "the one begun goes on instead"
        assert urgent in scheduler.waiting_queue


def test_when_one_paused_prefill_finds_no_memory_the_next_is_tried(
    kairos: scheduler_state.KairosState,
) -> None:
    big, small = Req("big", 8000, 60_000, done=512), Req("small", 600, 90_000, done=512)
    pause(kairos, big, small, since_s=kairos.now())
    scheduler = make_scheduler([], None)

    def upstream(scheduler: Any, running: Any) -> Any:
        fits = scheduler.chunked_req is small
        return SimpleNamespace(
            batch_to_run=SimpleNamespace(extend_lens=None) if fits else None, running_batch=running
        )

    result = prefill.get_new_batch_prefill(upstream, scheduler, "r")
    assert result.batch_to_run is not None and scheduler.chunked_req is small
    assert kairos.paused == [big]
