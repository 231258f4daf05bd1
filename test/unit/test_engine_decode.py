"""Parking on a fake batch: only the chosen advance, the full batch keeps everybody."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.decode_rows import chosen_again
from helpers.fake_scheduler import Batch, Req, decoding, make_decode_scheduler, upstream_prepare
from helpers.fake_scheduler import decode_step as step
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.hooks import admission, decode
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.engine.state.running_table import EMITTED, FIRST_S, memory_of
from sglang_kairos.policy import decode_planner
from sglang_kairos.policy.admission import Occupancy, QueueView
from sglang_kairos.policy.decode_planner import DecodePlanner, RunningView
from sglang_kairos.policy.decode_step import StepChoice
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.prediction_error import LEARNT_STEPS

torch = pytest.importorskip("torch")


@pytest.fixture
def kairos(monkeypatch: pytest.MonkeyPatch) -> scheduler_state.KairosState:
    """A decode state whose steps take 10 ms a request."""
    made = scheduler_state.KairosState(make_decode_scheduler(), KairosConfig())
    made.step_time = StepTimeModel(0.0, 10e-3, 0.0)
    for _ in range(LEARNT_STEPS):
        made.step_time.observe(3, 30.0, 30e-3)
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    return made


def test_with_slack_for_all_the_stock_batch_runs(kairos: scheduler_state.KairosState) -> None:
    batch = Batch([decoding("a", 50), decoding("b", 50)])
    assert step(kairos, batch) is batch
    assert batch.seq_lens.tolist() == [11, 12] and batch.out_cache_loc == "new for 2"
    assert kairos.counters["subset_steps"] == 0


def test_only_the_chosen_advance_and_nobody_leaves_the_running_batch(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        decode_planner,
        "choose_step",
        lambda *a, **k: StepChoice([0, 2], 0.02, "packed", np.array([True, False, True])),
    )
    reqs = [decoding(name, 20) for name in "abc"]
    batch = Batch(reqs)
    before = batch.seq_lens
    ran = step(kairos, batch)
    assert ran is not batch and ran.reqs == [reqs[0], reqs[2]]
    assert ran.seq_lens.tolist() == [11, 13] and ran.out_cache_loc == "new for 2"
    assert batch.reqs == reqs
    assert batch.seq_lens.tolist() == [11, 11, 13]
    assert batch.orig_seq_lens.tolist() == [11, 11, 13]
    assert batch.seq_lens_cpu.tolist() == [11, 11, 13]
    assert before.tolist() == [10, 11, 12], "an in-flight forward may still read the old tensor"
    assert batch.input_ids is None and batch.out_cache_loc is None and batch.seq_lens_sum is None
    assert batch.forward_mode == "decode"
    assert kairos.counters["parked"] == 1


def test_the_view_of_those_who_run_is_made_anew_only_when_they_or_the_batch_change(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(run: list[int], count: int) -> None:
        served = np.isin(np.arange(count), run)
        choice = StepChoice(run, 0.02, "packed", served)
        monkeypatch.setattr(decode_planner, "choose_step", lambda *a, **k: choice)

    monkeypatch.setattr(kairos.step_time, "observe", lambda *a: None)
    batch = Batch([decoding(name, 20) for name in "abcd"])
    choose([0, 2], 4)
    first = step(kairos, batch)
    first.input_ids = "of the last forward"
    assert step(kairos, batch) is first and first.input_ids is None
    assert batch.seq_lens.tolist() == [12, 11, 14, 13] and first.seq_lens.tolist() == [12, 14]
    choose([0, 1], 4)
    second = step(kairos, batch)
    assert second.seq_lens.tolist() == [13, 12]
    decode.prepare_for_decode(upstream_prepare, batch)  # a step of everybody, in between
    choose([0, 1], 4)
    assert step(kairos, batch) is not second
    batch.filter_batch([0, 1, 2])
    choose([0, 1], 3)
    last = step(kairos, batch)
    assert last.reqs == batch.reqs[:2] and last.seq_lens.tolist() == [16, 15]
    assert batch.seq_lens.tolist() == [16, 15, 15]
    assert (kairos.counters["subset_views"], kairos.counters["subset_steps"]) == (4, 5)


def test_somebody_always_runs_when_steps_are_far_too_slow(
    kairos: scheduler_state.KairosState,
) -> None:
    for _ in range(600):
        kairos.step_time.observe(2, 30.0, 2.0)
    assert kairos.step_time.error.mape < 0.2
    assert step(kairos, Batch([decoding("a", 20), decoding("b", 20)])).reqs


def test_a_failing_policy_runs_everybody(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_planner, "choose_step", lambda *a, **k: 1 / 0)
    batch = Batch([decoding(name, 20) for name in "abc"])
    assert step(kairos, batch) is batch
    assert kairos.counters["packing_errors"] == 1


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda b: setattr(b.spec_algorithm, "is_none", lambda: False), "speculative"),
        (lambda b: setattr(b.sampling_info.penalizer_orchestrator, "is_required", True), "penal"),
        (lambda b: setattr(b.reqs[0], "beam_group", object()), "beam"),
        (lambda b: setattr(b, "hisparse_coordinator", object()), "hisparse"),
        (lambda b: setattr(b.model_config, "is_encoder_decoder", True), "encoder"),
    ],
)
def test_what_cannot_run_in_part_runs_whole_and_says_so_once(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, spoil: Any, word: str
) -> None:
    for _ in range(3):
        batch = Batch([decoding(name, 20) for name in "abc"])
        spoil(batch)
        assert step(kairos, batch) is batch
    assert sum(word in record.message for record in caplog.records) == 1
    assert kairos.counters["fallback_steps"] == 3


def test_the_breaker_stops_parking_while_predictions_are_wrong(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture
) -> None:
    for seconds in (5e-3, 300e-3) * 100:
        kairos.step_time.observe(3, 30.0, seconds)
    batch = Batch([decoding(name, 1) for name in "abc"])
    assert step(kairos, batch) is batch
    assert step(kairos, batch) is batch
    assert kairos.counters["breaker_steps"] == 2
    assert sum("max-step-error" in record.message for record in caplog.records) == 1


class Queue:
    """The pre-allocation queue: pops, in order, whatever shook hands and is not held back."""

    def __init__(self, reqs: list[Req]) -> None:
        self.queue = [SimpleNamespace(req=req) for req in reqs]
        self.transfer_queue = SimpleNamespace(queue=[])
        self.handshakes = 0

    def _resolve_pending_reqs(self) -> None: ...

    def _update_handshake_waiters(self) -> None:
        self.handshakes += 1


def upstream_pop(queue: Queue, rids_to_check: set[str] | None = None) -> Any:
    through = [e for e in queue.queue if rids_to_check is None or e.req.rid in rids_to_check]
    failed = [e for e in through if e.req.finished_reason is not None]
    queue.queue = [e for e in queue.queue if e not in through]
    return [e for e in through if e not in failed], failed


def serving(kairos: scheduler_state.KairosState, reqs: list[Req], slots: int = 64) -> None:
    """The decode server runs these."""
    scheduler = kairos.scheduler
    scheduler.running_batch = Batch(reqs)
    scheduler.max_total_num_tokens, scheduler.max_running_requests = 10_000, slots
    scheduler.req_to_token_pool.size = slots
    free = 10_000 - sum(len(req.origin_input_ids) for req in reqs)
    scheduler.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: free)


def test_kv_is_reserved_by_deadline_late_ones_last(kairos: scheduler_state.KairosState) -> None:
    slow, late, soon = (
        decoding("slow", 50, ttft_ms=9000),
        decoding("late", 50),
        decoding("soon", 50, ttft_ms=500),
    )
    late.time_stats.scheduler_recv_time -= 5
    serving(kairos, [])
    queue = Queue([slow, late, soon])
    popped, _ = decode.pop_preallocated(upstream_pop, queue)
    assert [entry.req for entry in popped] == [soon, slow, late]
    kairos.scheduler.waiting_queue = [slow, late, soon]
    decode.get_new_prebuilt_batch(lambda s, b: None, kairos.scheduler, None)
    assert kairos.scheduler.waiting_queue == [soon, slow, late]


def test_who_would_make_the_steps_too_long_waits_while_memory_is_short(
    kairos: scheduler_state.KairosState,
) -> None:
    running = [decoding(f"r{i}", 50) for i in range(4)]  # 40 ms a step: one more fits 50 ms
    serving(kairos, running, slots=5)
    waiting = [decoding(name, 50, ttft_ms=9000) for name in "abc"]
    aborted = decoding("x", 50, ttft_ms=9000)
    aborted.finished_reason = "abort"
    queue = Queue([*waiting, aborted])
    popped, failed = decode.pop_preallocated(upstream_pop, queue)
    assert (len(popped), [entry.req for entry in failed]) == (0, [aborted])
    assert queue.handshakes == 1, "held back must not mean deaf"
    assert kairos.counters["held_back"] == 4
    serving(kairos, running[:2], slots=5)
    popped, _ = decode.pop_preallocated(upstream_pop, queue)
    assert len(popped) == 2 and len(queue.queue) == 1


def test_with_memory_to_spare_a_request_is_let_in_before_its_first_token_is_late(
    kairos: scheduler_state.KairosState,
) -> None:
    serving(kairos, [decoding(f"r{i}", 50) for i in range(6)])
    early, pressing = decoding("early", 50, ttft_ms=9000), decoding("pressing", 50, ttft_ms=9000)
    pressing.time_stats.scheduler_recv_time -= 8
    popped, _ = decode.pop_preallocated(upstream_pop, Queue([early, pressing]))
    assert [entry.req for entry in popped] == [pressing]
    assert kairos.promise(pressing).kept is False


@pytest.mark.parametrize("order", [True, False])
def test_a_prompt_that_no_kv_can_hold_is_answered_at_once_and_keeps_nobody_waiting(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch, order: bool
) -> None:
    said: list[str] = []

    def refuse(req: Req, text: str) -> None:
        said.append(text)
        req.finished_reason = "abort"

    monkeypatch.setattr(admission, "_refuse", refuse)
    kairos.config = dataclasses.replace(kairos.config, order=order)
    serving(kairos, [])
    kairos.scheduler.page_size = 16
    # 10,000 tokens of KV, 512 of them reserved for the output, in pages of 16.
    fits, never = decoding("fits", 50, prompt=9488), decoding("never", 50, prompt=9489)
    never.time_stats.scheduler_recv_time -= 100
    queue = Queue([never, fits])
    queue.num_reserved_decode_tokens = 512  # type: ignore[attr-defined]
    popped, failed = decode.pop_preallocated(upstream_pop, queue)
    assert [entry.req for entry in popped] == [fits]
    assert [entry.req for entry in failed] == [never]
    assert said == ["the prompt has 9489 tokens, this decode server holds at most 9488"]
    assert kairos.counters["never_fit"] == 1


def test_a_starving_request_goes_first_and_pays_for_it(kairos: scheduler_state.KairosState) -> None:
    old, soon = decoding("old", 50), decoding("soon", 50, ttft_ms=500)
    old.time_stats.scheduler_recv_time -= 100
    serving(kairos, [])
    popped, _ = decode.pop_preallocated(upstream_pop, Queue([soon, old]))
    assert [entry.req for entry in popped] == [old, soon]
    assert not memory_of(kairos).planner.late_share.may_spend()


@pytest.mark.parametrize("gate", [True, False])
def test_who_has_used_up_half_of_sglangs_time_out_is_let_in_first(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch, gate: bool
) -> None:
    """Prefill answers 500 when its clock has run out: late is better than lost."""
    monkeypatch.setenv("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "30")
    assert memory_of(kairos).planner.give_up_s == 30, (
        "the shorter of both, for decode knows its own only"
    )
    if not gate:
        monkeypatch.setattr(DecodePlanner, "trusted", lambda *args: False)
    serving(kairos, [decoding(f"r{i}", 50) for i in range(6)], slots=7)  # 60 ms a step: full
    late, older = decoding("late", 50, prompt=900), decoding("older", 50, prompt=999)
    soon = decoding("soon", 50, ttft_ms=20_000)
    late.time_stats.scheduler_recv_time -= 16
    older.time_stats.scheduler_recv_time -= 17
    soon.time_stats.scheduler_recv_time -= 14
    popped, _ = decode.pop_preallocated(upstream_pop, Queue([soon, late, older]))
    assert [entry.req for entry in popped][:2] == [older, late]
    assert len(popped) == (2 if gate else 3)
    assert kairos.counters["pressed"] == (2 if gate else 0)


def clock_left(kairos: scheduler_state.KairosState, queue: Queue, now: float) -> list[float]:
    left = memory_of(kairos).planner.clock_left(admission._asking(kairos, queue, now))
    assert left is not None
    return list(left.tolist())


def test_a_retracted_request_that_is_prefilled_again_has_no_clock_before_its_reservation(
    kairos: scheduler_state.KairosState,
) -> None:
    old = decoding("old", 50)
    old.time_stats.scheduler_recv_time -= 1000
    queue = Queue([old])
    assert clock_left(kairos, queue, kairos.now()) == [0.0]
    queue.queue[0].is_rebootstrap = True
    assert clock_left(kairos, queue, kairos.now()) == [1.0]


def test_where_decode_reserves_after_the_prefill_the_clock_starts_at_its_end(
    kairos: scheduler_state.KairosState,
) -> None:
    old = decoding("old", 50)
    old.time_stats.scheduler_recv_time -= 1000
    queue = Queue([old])
    queue.kv_manager = SimpleNamespace(defer_decode_allocation=True)
    queue.queue[0].waiting_for_input = False
    now = kairos.now()
    assert clock_left(kairos, queue, now) == [1.0]
    queue.queue[0].waiting_for_input = True
    assert clock_left(kairos, queue, now) == [1.0]
    assert clock_left(kairos, queue, now + 75) == [0.75]


def test_a_request_whose_kv_waits_on_prefill_is_reserved_before_one_that_needs_room_there(
    kairos: scheduler_state.KairosState,
) -> None:
    """Where decode reserves after the prefill, only who is ready can be; prefill may be full of them."""
    serving(kairos, [])
    urgent, ready = decoding("urgent", 5, ttft_ms=100), decoding("ready", 5, ttft_ms=9000)
    queue = Queue([urgent, ready])
    queue.queue[0].waiting_for_input = False

    def shakes_hands() -> None:
        queue.queue[1 if queue.queue[0].req is urgent else 0].waiting_for_input = True

    queue.queue[1].waiting_for_input = False
    queue._update_handshake_waiters = shakes_hands  # type: ignore[method-assign]
    popped, _ = decode.pop_preallocated(upstream_pop, queue)
    assert [entry.req for entry in popped] == [ready]
    assert [entry.req for entry in queue.queue] == [urgent]
    assert kairos.counters["held_back"] == 0


@pytest.fixture
def rows(kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The decision log's lines."""
    lines: list[str] = []

    def write(kind: str, role: str, facts: dict[str, Any]) -> None:
        lines.append(json.dumps({"kind": kind, **facts}))

    monkeypatch.setattr(kairos, "_log", SimpleNamespace(write=write))
    return lines


def test_a_logged_step_is_the_planners_again(
    kairos: scheduler_state.KairosState, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reqs = [decoding(name, 35) for name in "abcdef"]  # 60 ms for all
    now_s = reqs[0].time_stats.scheduler_recv_time
    monkeypatch.setattr(kairos, "now", lambda: now_s)
    ran = step(kairos, Batch(reqs)).reqs
    (row,) = map(json.loads, rows)
    assert [reqs[index] for index in row["run"]] == ran and len(ran) < len(reqs)
    choice = chosen_again(row)
    assert choice is not None and (choice.run, choice.reason) == (row["run"], row["reason"])


def test_a_logged_admission_is_the_planners_again(
    kairos: scheduler_state.KairosState, rows: list[str]
) -> None:
    serving(kairos, [decoding(f"r{i}", 50) for i in range(3)], slots=5)
    waiting = [decoding("a", 50), decoding("old", 50, prompt=500), decoding("b", 40, ttft_ms=600)]
    waiting[1].time_stats.scheduler_recv_time -= 100
    popped, _ = decode.pop_preallocated(upstream_pop, Queue(waiting))
    (row,) = map(json.loads, rows)
    assert (row["kind"], row["order"][0], row["starving"]) == ("admit", 1, 1)
    assert [entry.req for entry in popped] == [waiting[i] for i in row["order"][: row["count"]]]

    def view(kind: Any, columns: dict[str, Any]) -> Any:
        lists = {name: isinstance(value, list) for name, value in columns.items()}
        return kind(**{n: np.array(v) if lists[n] else v for n, v in columns.items()})

    plan = DecodePlanner(kairos.config, Counter()).admit(
        view(QueueView, row["queue"]),
        view(RunningView, row["running"]),
        view(Occupancy, row["server"]),
        kairos.step_time,
    )
    assert dataclasses.asdict(plan) == {name: row[name] for name in dataclasses.asdict(plan)}


def test_a_failing_admission_is_upstreams(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_planner, "plan_admission", lambda *a, **k: 1 / 0)
    serving(kairos, [decoding(f"r{i}", 50) for i in range(9)])
    popped, _ = decode.pop_preallocated(upstream_pop, Queue([decoding("a", 50), decoding("b", 50)]))
    assert len(popped) == 2 and kairos.counters["admission_errors"] == 1


def test_the_table_follows_who_joins_and_leaves(kairos: scheduler_state.KairosState) -> None:
    a, b, c = (decoding(name, 50) for name in "abc")
    table = memory_of(kairos).table
    assert table.follow([a, b]) == []
    table.ran([1])
    assert table.follow([b, c]) == [a]
    assert table.columns[EMITTED].tolist() == [3, 2]
    a.finished_reason = "stop"
    for req in (a, b, c):
        kairos.promise(req)
    before = memory_of(kairos).planner.statistics.output_tokens
    step(kairos, Batch([a, b, c]))
    step(kairos, Batch([b, c]))
    assert memory_of(kairos).planner.statistics.output_tokens < before


def retracted(kairos: scheduler_state.KairosState, batch: Batch) -> tuple[list[str], list[str]]:
    """Who stays and who goes, in order, when one decode step makes SGLang retract two."""
    kept: list[int] = []

    def upstream_retract(batch: Any) -> list[str]:
        kept[:] = batch._get_decode_retraction_order(batch.reqs)
        gone = [batch.reqs[kept.pop()].rid for _ in range(2)]
        batch.filter_batch(kept)
        return gone

    def upstream(scheduler: Any, running_batch: Any) -> Any:
        nonlocal gone
        gone = decode.retract_decode(upstream_retract, running_batch)
        decode.prepare_for_decode(upstream_prepare, running_batch)
        return SimpleNamespace(batch_to_run=running_batch, running_batch=running_batch)

    gone: list[str] = []
    decode.get_next_decode_batch(upstream, kairos.scheduler, batch)
    return [req.rid for req in batch.reqs], gone


def test_those_are_retracted_who_lose_least(kairos: scheduler_state.KairosState) -> None:
    batch = Batch(
        [decoding("behind", 50), decoding("lost", 50), decoding("ahead", 50), decoding("even", 50)]
    )
    memory_of(kairos).follow(batch.reqs)
    columns = memory_of(kairos).table.columns
    columns[FIRST_S] += np.array([-0.2, -5.0, 0.5, 0.0])
    assert retracted(kairos, batch) == (["behind", "even"], ["lost", "ahead"])
    assert "_get_decode_retraction_order" not in vars(batch)


@pytest.mark.parametrize("trouble", ["operator", "policy"])
def test_retraction_is_upstreams_when_the_operator_chose_one_or_the_policy_fails(
    kairos: scheduler_state.KairosState, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch([decoding("a", 50), decoding("b", 50), decoding("c", 50)])
    monkeypatch.setattr(
        batch, "_get_decode_retraction_order", lambda reqs: [1, 0, 2], raising=False
    )
    if trouble == "operator":
        kairos.scheduler.server_args.retraction_policy = "priority"
    else:
        monkeypatch.setattr(decode_planner, "keep_order", lambda *a: 1 / 0)
    assert retracted(kairos, batch) == (["b"], ["c", "a"])
    assert kairos.counters["retraction_errors"] == (trouble == "policy")


def test_an_idle_gap_is_not_learnt_as_a_step(kairos: scheduler_state.KairosState) -> None:
    batch = Batch([decoding("a", 50)])
    step(kairos, batch)
    empty = SimpleNamespace(batch_to_run=None, running_batch=batch)
    decode.get_next_decode_batch(lambda s, b: empty, kairos.scheduler, batch)
    step(kairos, batch)
    learnt = kairos.step_time.error.samples
    step(kairos, batch)
    step(kairos, batch)
    assert kairos.step_time.error.samples == learnt + 2
