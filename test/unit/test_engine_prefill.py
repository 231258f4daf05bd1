"""Planning on a fake scheduler: who gets the chunk slot, and that nobody is lost on the way."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_scheduler import Req, build, built, make_scheduler, make_state, pause
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import features
from sglang_kairos.engine.hooks import prefill
from sglang_kairos.engine.state import decision_log, scheduler_state
from sglang_kairos.policy import prefill_planner
from sglang_kairos.policy.prefill_step import PrefillPlan


@pytest.fixture
def kairos(monkeypatch: pytest.MonkeyPatch) -> scheduler_state.KairosState:
    """A prefill state as this process' current one."""
    made = make_state()
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    return made


def test_a_long_chunk_is_paused_for_urgent_prompts_that_fill_the_budget(
    kairos: scheduler_state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    urgent = [Req(f"u{i}", 256, ttft_ms=200) for i in range(2)]
    scheduler, upstream = make_scheduler(urgent, long), build()
    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert upstream.calls == [(None, urgent)]
    assert kairos.paused == [long]
    assert kairos.counters["pauses"] == 1


def test_the_paused_prefill_comes_back_when_nothing_is_more_urgent(
    kairos: scheduler_state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    pause(kairos, long)
    scheduler, upstream = make_scheduler([], None), build()
    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert upstream.calls == [(long, [])]
    assert kairos.paused == [] and scheduler.chunked_req is long


def test_a_small_urgent_prompt_shares_the_chunk_instead_of_pausing(
    kairos: scheduler_state.KairosState,
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    scheduler, limits = make_scheduler([Req("small", 100, ttft_ms=200)], long), []

    def upstream(scheduler: Any, running: Any) -> Any:
        limits.append(prefill.chunk_limit(lambda *a: 1, None, long, [], 512, 1))
        return SimpleNamespace(batch_to_run=None, running_batch=running)

    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert scheduler.chunked_req is long and kairos.paused == []
    assert limits == [412]


def test_without_a_plan_upstream_decides_the_chunk_share(
    kairos: scheduler_state.KairosState,
) -> None:
    assert prefill.chunk_limit(lambda *a: 77, None, None, [], 512, 1) == 77


def test_a_blocked_batch_resumes_a_paused_prefill_rather_than_stall(
    kairos: scheduler_state.KairosState,
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
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [Req("a", 10, 100), Req("b", 10, 100)]
    scheduler = make_scheduler(waiting, None)
    monkeypatch.setattr(prefill, "_decide", lambda *a: PrefillPlan([0], -1, None, 0, [1]))

    def upstream(scheduler: Any, running: Any) -> Any:
        assert scheduler.waiting_queue == [waiting[0]]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert set(scheduler.waiting_queue) == set(waiting)
    assert kairos.plan is None


def test_an_optimistic_request_is_never_paused(kairos: scheduler_state.KairosState) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    long.pending_bootstrap = True
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(2)], long)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is long


def test_pausing_can_be_switched_off(kairos: scheduler_state.KairosState) -> None:
    kairos.config = dataclasses.replace(kairos.config, pause=False)
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(2)], long)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is long and not kairos.paused


def test_a_request_paused_too_long_runs_next(kairos: scheduler_state.KairosState) -> None:
    old = Req("old", 8000, ttft_ms=60_000, done=512)
    pause(kairos, old, since_s=kairos.now() - 61.0)
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(4)], None)
    prefill.get_new_batch_prefill(build(), scheduler, "running")
    assert scheduler.chunked_req is old


def test_the_age_at_the_router_counts_against_the_deadline(
    kairos: scheduler_state.KairosState,
) -> None:
    young, old = Req("young", 10, 1000), Req("old", 10, 1000, age_ms=400)
    assert kairos.promise(old).ttft_due_s < kairos.promise(young).ttft_due_s - 0.3


def test_a_malformed_slo_that_slipped_through_falls_back_to_the_default(
    kairos: scheduler_state.KairosState,
) -> None:
    req = Req("bad", 10, 1000)
    req.sampling_params.custom_params = {"kairos": {"ttft_ms": "soon"}}
    assert kairos.promise(req).slo == kairos.table.default


@pytest.mark.parametrize(
    ("has_chunk", "room", "want"),
    [(True, 99, "OTHER"), (True, 100, "upstream"), (False, 99, "upstream")],
)
def test_no_second_chunked_prefill_beside_the_slot(
    kairos: scheduler_state.KairosState,
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


class Adder:
    """The KV budget of SGLang's PrefillAdder: `free` tokens, `evictable` of them the prefix of whoever
    asks, until it is locked."""

    def __init__(self, free: int, evictable: int = 0, page_size: int = 1) -> None:
        self.rem_chunk_tokens, self.page_size = 512, page_size
        self.new_chunked_req: Any = None
        self.rem_total_tokens, self._evictable = free, evictable

    def ceil_paged_tokens(self, tokens: int) -> int:
        return -(-tokens // self.page_size) * self.page_size

    @contextmanager
    def _lock_node(self, node: Any) -> Iterator[None]:
        self.rem_total_tokens -= self._evictable
        yield
        self.rem_total_tokens += self._evictable


@pytest.mark.parametrize(
    ("begun", "adder", "want"),
    [
        ("paused", Adder(602), "upstream"),
        ("paused", Adder(601), "NO_TOKEN"),
        ("slot", Adder(601), "NO_TOKEN"),
        ("new", Adder(601), "NO_TOKEN"),
        ("nobody", Adder(0), "upstream"),
        ("paused", Adder(902, evictable=300), "upstream"),
        ("paused", Adder(901, evictable=300), "NO_TOKEN"),
        ("paused", Adder(512 + 112 + 2 * 16, page_size=16), "upstream"),
        ("paused", Adder(512 + 112 + 2 * 16 - 1, page_size=16), "NO_TOKEN"),
    ],
)
def test_nobody_is_admitted_into_kv_that_a_begun_prefill_needs(
    kairos: scheduler_state.KairosState,
    monkeypatch: pytest.MonkeyPatch,
    begun: str,
    adder: Adder,
    want: str,
) -> None:
    import sys

    policy = SimpleNamespace(AddReqResult=SimpleNamespace(OTHER="OTHER", NO_TOKEN="NO_TOKEN"))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_policy", policy)  # type: ignore[arg-type]
    long = Req("long", 1012, 60_000, done=512)  # 500 tokens left
    scheduler = kairos.scheduler
    if begun == "paused":
        pause(kairos, long)
    scheduler.chunked_req = long if begun == "slot" else None
    adder.new_chunked_req = long if begun == "new" else None
    before = adder.rem_total_tokens
    req = SimpleNamespace(
        full_untruncated_fill_ids=[0] * 120, prefix_len=20, host_hit_length=0, last_node="node"
    )
    got = prefill.add_one_req(
        lambda *a: "upstream", adder, req, has_chunked_req=False, truncation_align_size=None
    )
    assert (got, adder.rem_total_tokens) == (want, before)
    assert kairos.counters["kept_for_begun"] == (want == "NO_TOKEN")


def test_in_unified_serving_upstream_alone_decides_who_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_state()
    made.scheduler = make_scheduler([], Req("long", 1012, 60_000, done=512), mode="null")
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    req = SimpleNamespace(full_untruncated_fill_ids=[0] * 9, prefix_len=0, host_hit_length=0)
    got = prefill.add_one_req(lambda *a: "upstream", Adder(0), req, False, None)
    assert got == "upstream"


def test_a_failing_policy_leaves_stock_behaviour_and_a_counter(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(prefill_planner, "plan_prefill", broken)
    long, waiting = Req("long", 8000, 60_000, done=512), [Req("a", 9, 200), Req("b", 9, 100)]
    scheduler, upstream = make_scheduler(waiting, long), build()
    prefill.get_new_batch_prefill(upstream, scheduler, "running")
    assert upstream.calls == [(long, waiting)]
    assert kairos.counters["urgency_errors"] == 1


def test_the_predictor_learns_a_cpu_step_when_the_next_one_is_planned(
    kairos: scheduler_state.KairosState,
) -> None:
    batch = built([512], [0])
    prefill.get_new_batch_prefill(build(batch), make_scheduler([Req("a", 512, 100)], None), "r")
    assert kairos.prefill_time.error.samples == 0
    batch.launch_ts = time.monotonic() - 0.2
    prefill.get_new_batch_prefill(build(), make_scheduler([], None), "r")
    assert kairos.prefill_time.error.samples == 1
    prefill.get_new_batch_prefill(build(), make_scheduler([], None), "r")
    assert kairos.prefill_time.error.samples == 1


def test_a_crumb_for_a_short_partial_is_not_judged_by_a_long_prompt_in_the_queue(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def worthwhile(prefix: float, chunk_tokens: int) -> int:
        asked.append(prefix)
        return 64

    monkeypatch.setattr(kairos.prefill_time, "worthwhile_tokens", worthwhile)
    matched = Req("matched", 9000, 5000)
    scheduler = make_scheduler([matched], Req("slot", 1500, 60_000, done=700))
    row = kairos.roster.rows([matched])[0]
    kairos.roster.matched_tokens[row] = 8000
    prefill.get_new_batch_prefill(build(), scheduler, "r")
    assert asked == [700.0]


def test_a_policy_that_loses_a_request_leaves_stock_behaviour(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PrefillPlan(order=[0], slot=-1, chunk_limit=None, hold=[], on_time=1)
    monkeypatch.setattr(prefill_planner, "plan_prefill", lambda *a, **k: plan)
    waiting = [Req("a", 9, 200), Req("b", 9, 100)]
    upstream = build()
    prefill.get_new_batch_prefill(upstream, make_scheduler(waiting, None), "r")
    assert upstream.calls == [(None, waiting)]
    assert kairos.counters["urgency_errors"] == 1


def test_the_order_of_the_plan_survives_upstreams_own_sort(
    kairos: scheduler_state.KairosState,
) -> None:
    slow, soon = Req("slow", 10, 9000), Req("soon", 10, 100)
    late_comer = Req("grammar", 10, 100)
    seen: list[Any] = []

    def upstream(scheduler: Any, running: Any) -> Any:
        scheduler.waiting_queue.append(late_comer)  # its grammar is ready
        sort = lambda policy, queue, *a: queue.sort(key=lambda req: req.rid, reverse=True)  # noqa: E731
        prefill.calc_priority(sort, None, scheduler.waiting_queue)
        seen.extend(scheduler.waiting_queue)
        return SimpleNamespace(batch_to_run=None, running_batch=running)

    prefill.get_new_batch_prefill(upstream, make_scheduler([slow, soon], None), "r")
    assert seen == [soon, slow, late_comer]


def test_a_starving_request_goes_first_and_pays_from_the_late_share(
    kairos: scheduler_state.KairosState,
) -> None:
    kairos.planner.config = dataclasses.replace(kairos.config, max_wait=2.0)
    old = Req("old", 400, ttft_ms=100, age_ms=300_000)
    fresh = [Req(f"f{i}", 300, ttft_ms=700) for i in range(3)]
    kairos.planner.ran(20_000, 0)
    before = kairos.planner.late_share._balance
    upstream = build(built([400], reqs=[old]))
    prefill.get_new_batch_prefill(upstream, make_scheduler([*fresh, old], None), "r")
    assert upstream.calls[0][1][0] is old
    assert kairos.planner.late_share._balance < before - 300


@pytest.mark.parametrize("reason", ["enable_lora", "is_hybrid_swa", "require_mlp_sync"])
def test_where_pausing_is_not_proven_the_chunk_runs_through(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    long = Req("long", 8000, ttft_ms=60_000, done=512)
    scheduler = make_scheduler([Req(f"u{i}", 256, ttft_ms=200) for i in range(2)], long)
    setattr(scheduler, reason, True)
    made = make_state()
    made.cannot_pause = features.why_not("pause", scheduler)
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    prefill.get_new_batch_prefill(build(), scheduler, "r")
    assert made.cannot_pause and scheduler.chunked_req is long and not made.paused
    assert make_state().cannot_pause == ""


def test_prefixes_are_looked_up_for_a_bounded_number_stalest_first(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[Req] = []

    def match(req: Req, cache: Any) -> None:
        looked_up.append(req)
        req.num_matched_prefix_tokens = 7

    module = SimpleNamespace(match_kv_cache=match)
    monkeypatch.setitem(__import__("sys").modules, "sglang.srt.mem_cache.common", module)
    waiting = [Req(f"r{i}", 100, 1000) for i in range(100)]
    scheduler = make_scheduler(waiting, None)
    scheduler.tree_cache.disable = False
    for _ in range(4):
        prefill.get_new_batch_prefill(build(), scheduler, "r")
    assert len(looked_up) == 100 and set(looked_up) == set(waiting)
    assert (kairos.roster.matched_tokens[kairos.roster.rows(waiting)] == 7).all()


sizes = st.integers(1, 3000)


@given(
    waiting=st.lists(st.tuples(sizes, st.integers(1, 9000)), max_size=12),
    partials=st.lists(st.tuples(sizes, st.integers(1, 9000)), max_size=4),
    free=st.integers(0, 9000),
    admits=st.integers(0, 6),
)
def test_no_decision_loses_a_request(
    waiting: list[tuple[int, int]], partials: list[tuple[int, int]], free: int, admits: int
) -> None:
    queue = [Req(f"w{i}", n, ttft) for i, (n, ttft) in enumerate(waiting)]
    begun = [Req(f"p{i}", n + 1, ttft, done=1) for i, (n, ttft) in enumerate(partials)]
    made = make_state()
    pause(made, *begun[1:])
    scheduler = make_scheduler(queue, begun[0] if begun else None)
    scheduler.token_to_kv_pool_allocator.available_size = lambda: free
    gone: list[Req] = []

    def upstream(scheduler: Any, running: Any) -> Any:
        prefill.calc_priority(lambda *a: None, None, scheduler.waiting_queue)
        gone.extend(scheduler.waiting_queue[:admits])
        scheduler.waiting_queue = scheduler.waiting_queue[admits:]
        batch = built([1]) if gone or scheduler.chunked_req else None
        return SimpleNamespace(batch_to_run=batch, running_batch=running)

    scheduler_state.CURRENT = made
    try:
        prefill.get_new_batch_prefill(upstream, scheduler, "r")
    finally:
        scheduler_state.CURRENT = None
    slot = [scheduler.chunked_req] if scheduler.chunked_req else []
    after = [*gone, *scheduler.waiting_queue, *slot, *made.paused]
    assert sorted(map(repr, after)) == sorted(map(repr, [*queue, *begun]))
    assert made.counters["urgency_errors"] == 0
    assert len(made.paused) <= max(made.config.max_paused, len(begun))
    assert not begun or gone or slot, "prefills have begun, but nothing runs"


def test_every_process_has_a_decision_log_of_its_own_whose_rows_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "decisions.jsonl"
    config = KairosConfig(decision_log=str(log))

    def server(mode: str, port: int, rank: int) -> scheduler_state.KairosState:
        scheduler = make_scheduler([], None, mode)
        scheduler.server_args = SimpleNamespace(port=port)
        monkeypatch.setattr(decision_log, "rank_of", lambda scheduler: rank)
        return scheduler_state.KairosState(scheduler, config)

    # Two servers, two ranks, and two replicas behind one port.
    places = [("prefill", 30000, 0), ("decode", 30001, 0), ("decode", 30001, 1)] + [
        ("decode", 30002, 0)
    ] * 2
    servers = [server(*place) for place in places]
    for turn in range(2):
        for chosen, one in enumerate(servers):
            one.record("prefill", chosen=[chosen], turn=turn)
    names = ["decode-30001-0", "decode-30001-1", "decode-30002-0", "decode-30002-0-2"]
    files = {path.name: path.read_text().splitlines() for path in decision_log.files_of(log)}
    assert set(files) == {f"decisions.{n}.jsonl" for n in (*names, "prefill-30000-0")}
    assert len(decision_log.files_of(log, "prefill")) == 1 and not log.exists()
    rows = [json.loads(line) for line in files["decisions.decode-30001-1.jsonl"]]
    assert [row["chosen"] for row in rows] == [[2], [2]]
    assert rows[1].pop("server").endswith(":30001") and rows[1].pop("pid") == os.getpid()
    expected = {"kind": "prefill", "role": "decode", "rank": 1, "chosen": [2], "turn": 1}
    assert rows[1] == expected


def test_a_server_that_comes_back_goes_on_with_its_log(tmp_path: Path) -> None:
    config = KairosConfig(decision_log=str(tmp_path / "log"))
    for turn in range(2):
        made = make_state(config)
        made.record("prefill", turn=turn)
        del made  # its file closes, as when the process ends
        gc.collect()
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["turn"] for line in file.read_text().splitlines()] == [0, 1]


def test_a_disk_that_is_full_costs_the_log_and_nothing_else(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kairos, "_log", SimpleNamespace(write=full))
    slow, soon = Req("slow", 10, 9000), Req("soon", 10, 100)
    upstream = build()
    prefill.get_new_batch_prefill(upstream, make_scheduler([slow, soon], None), "r")
    assert upstream.calls == [(None, [soon, slow])]
    assert (kairos.counters["decision_log_errors"], kairos.counters["urgency_errors"]) == (1, 0)


def test_a_file_system_without_locks_has_a_log_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(decision_log.fcntl, "flock", no_locks)
    made = make_state(KairosConfig(decision_log=str(tmp_path / "log.jsonl")))
    made.record("prefill")
    assert len(decision_log.files_of(tmp_path / "log.jsonl")) == 1
