"""One thing, several layouts: what `compat` and the seams of older versions make of them."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import Req, built, make_scheduler, make_state, old_layout
from helpers.trees import sglang_folder
from sglang_kairos.engine import compat
from sglang_kairos.engine.hooks import prefill, step_timing
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.engine.state.request import kv_tokens, tokens_left
from sglang_kairos.policy.prefill_step import PrefillPlan

NEW, OLD = "0.5.23", "0.5.16"


def new_req(prefix: int, end: int | None) -> Any:
    made = Req("r")
    made.prefix_len, made.extend_end = prefix, end
    return made


def old_req(prefix: int, end: int | None) -> Any:
    made = old_layout(new_req(prefix, end))
    assert not {"prefix_len", "extend_end", "beam_group"} & vars(made).keys()
    return made


@pytest.mark.parametrize("req_of", [new_req, old_req])
def test_a_request_says_the_same_in_both_layouts(req_of: Any) -> None:
    assert compat.prefix_len(req_of(7, None)) == 7
    assert compat.prefix_len(req_of(0, None)) == 0
    assert compat.extend_end(req_of(7, None)) is None
    assert compat.extend_end(req_of(7, 12)) == 12
    assert not compat.in_beam_search(req_of(7, None))


def test_a_beam_group_is_seen() -> None:
    assert compat.in_beam_search(SimpleNamespace(beam_group=object()))


def test_ranks_are_counted_in_every_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ModuleType("sglang.srt.runtime_context")
    context.get_parallel = lambda: SimpleNamespace(tp_size=2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, context.__name__, context)
    alone, within = SimpleNamespace(tp_size=3), SimpleNamespace(ps=SimpleNamespace(tp_size=4))
    assert [compat.tp_size(one) for one in (alone, within, SimpleNamespace())] == [3, 4, 2]


def test_a_feature_is_an_attribute_or_an_argument_or_off() -> None:
    scheduler = SimpleNamespace(on=True, off=False, server_args=SimpleNamespace(off=True, arg=True))
    assert compat.feature(scheduler, "on") and compat.feature(scheduler, "arg")
    assert not compat.feature(scheduler, "off"), "the scheduler's own word counts"
    assert compat.feature(scheduler, "neither") is None


def test_waiting_tokens_go_to_every_total_there_is() -> None:
    old, new = SimpleNamespace(num_total_tokens=5), SimpleNamespace(num_total_tokens=5)
    new.num_active_tokens = 3
    compat.add_waiting_tokens(old, 2)
    compat.add_waiting_tokens(new, 2)
    assert vars(old) == {"num_total_tokens": 7}
    assert vars(new) == {"num_total_tokens": 7, "num_active_tokens": 5}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sglang.srt.mem_cache.common", "match_kv_cache"),
        ("sglang.srt.managers.schedule_policy", "match_prefix_for_req"),
    ],
)
def test_a_prefix_is_looked_up_with_what_there_is(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    for part in ("", ".srt", ".srt.mem_cache", ".srt.mem_cache.common", ".srt.managers"):
        monkeypatch.setitem(sys.modules, f"sglang{part}", ModuleType(f"sglang{part}"))
    fake = ModuleType(module)
    setattr(fake, name, lambda *args, **kwargs: asked.append(set(args)))
    monkeypatch.setitem(sys.modules, module, fake)
    compat._matcher.cache_clear()
    try:
        compat.match_prefix("req", "cache")
    finally:
        compat._matcher.cache_clear()
    assert asked == [{"req", "cache"}]


@pytest.mark.parametrize(
    ("version", "file", "line"),
    [
        (NEW, "managers/schedule_batch.py", "self.prefix_len: int = 0"),
        (NEW, "managers/schedule_batch.py", "self.extend_end"),
        (NEW, "managers/schedule_batch.py", "self.beam_group"),
        (NEW, "managers/schedule_batch.py", "return self.req_pool_idx is not None"),
        (NEW, "managers/schedule_policy.py", "with self._lock_node(req.last_node):"),
        (NEW, "managers/schedule_policy.py", "self.new_chunked_req = req"),
        (NEW, "managers/scheduler.py", "self.server_args = server_args"),
        (NEW, "server_args.py", "tokenizer_worker_num"),
        (NEW, "mem_cache/common.py", "def match_kv_cache("),
        (NEW, "managers/scheduler.py", "self.tp_size ="),
        (NEW, "managers/tp_worker.py", "def get_decode_cuda_graph_bs("),
        (NEW, "managers/load_snapshot.py", "num_active_tokens: int"),
        ("0.5.21", "managers/scheduler.py", "get_parallel().tp_size"),
        ("0.5.21", "runtime_context.py", "def get_parallel("),
        ("0.5.21", "managers/schedule_batch.py", "return self.req_pool_idx is not None"),
        ("0.5.21", "managers/schedule_policy.py", "def match_prefix_for_req("),
        ("0.5.20", "managers/scheduler.py", "batch.launch_ts = "),
        ("0.5.20", "managers/scheduler.py", "self.ps = ParallelState("),
        ("0.5.18", "managers/schedule_batch.py", "self.req_pool_idx: Optional[int] = None"),
        (OLD, "managers/schedule_batch.py", "self.prefix_indices"),
        (OLD, "managers/schedule_batch.py", "self.extend_range"),
        (OLD, "managers/schedule_batch.py", "self.req_pool_idx: Optional[int] = None"),
        (OLD, "managers/schedule_policy.py", "with self._lock_node(req.last_node):"),
        (OLD, "managers/schedule_policy.py", "self.new_chunked_req = req"),
        (OLD, "managers/scheduler.py", "self.server_args = server_args"),
        (OLD, "server_args.py", "tokenizer_worker_num"),
        (OLD, "managers/schedule_policy.py", "def match_prefix_for_req("),
        (OLD, "managers/scheduler.py", "self.ps = ParallelState("),
        (OLD, "model_executor/model_runner.py", "self.decode_cuda_graph_runner = "),
        (OLD, "model_executor/runner/decode_cuda_graph_runner.py", "self.capture_bs"),
        (OLD, "server_args.py", "enable_lmcache:"),
    ],
)
def test_sglang_is_laid_out_as_compat_takes_it(version: str, file: str, line: str) -> None:
    source = sglang_folder(version) / "sglang" / "srt" / file
    assert line in source.read_text(encoding="utf-8")


# The seams that only older versions have.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> scheduler_state.KairosState:
    """A prefill state whose steps end when their results come, as on a GPU."""
    made = make_state()
    made.synchronous = False
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    return made


class Adder:
    """The budget of a v0.5.16 PrefillAdder."""

    def __init__(self, rem_chunk_tokens: int | None) -> None:
        self.rem_chunk_tokens = rem_chunk_tokens
        self.seen: list[int | None] = []

    def add_chunked_req(self, want: int) -> str:
        self.seen.append(self.rem_chunk_tokens)
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= min(want, self.rem_chunk_tokens)
        return "answer"


@pytest.mark.parametrize(
    ("limit", "budget", "want", "seen", "left"),
    [
        (200, 512, 999, 200, 312),  # what the chunk may not have is there for others
        (200, 512, 50, 200, 462),
        (None, 512, 999, 512, 0),
        (512, 512, 999, 512, 0),
        (200, None, 999, None, None),  # chunking is off
    ],
)
def test_the_chunk_sees_its_share_of_the_budget_and_leaves_the_rest(
    limit: int | None,
    budget: int | None,
    want: int,
    seen: int | None,
    left: int | None,
    gpu: scheduler_state.KairosState,
) -> None:
    gpu.plan, adder = PrefillPlan([], 0, limit, 0, []), Adder(budget)
    assert prefill.add_chunked_req(Adder.add_chunked_req, adder, want) == "answer"
    assert (adder.seen, adder.rem_chunk_tokens) == ([seen], left)


def test_without_a_plan_the_chunk_gets_everything(gpu: scheduler_state.KairosState) -> None:
    adder = Adder(512)
    prefill.add_chunked_req(Adder.add_chunked_req, adder, 999)
    assert adder.seen == [512]


def launch(prefill_step: bool, seconds: float) -> tuple[Any, Any]:
    """A batch and the result of launching it `seconds` ago through the seam of run_batch."""
    mode = SimpleNamespace(is_extend_without_speculative=lambda: prefill_step)
    batch, result = built([512], [0]), SimpleNamespace()
    batch.forward_mode = mode
    del batch.launch_ts
    assert step_timing.run_batch(lambda *a: result, make_scheduler([], None), batch, None) is result
    if prefill_step:
        assert batch.launch_ts == result.launch_ts <= time.monotonic()
        result.launch_ts -= seconds
    return built([512], [0]), result  # upstream processes a copy


def test_the_predictor_learns_a_step_from_launch_to_result(
    gpu: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[float] = []
    monkeypatch.setattr(gpu.prefill_time, "observe", lambda new, old, s: learnt.append(s))
    ended = lambda *a: "done"  # noqa: E731
    first, second = launch(True, 0.3), launch(True, 0.3)
    assert step_timing.process_batch_result(ended, None, *first) == "done"
    step_timing.process_batch_result(ended, None, *second)
    assert learnt[0] == pytest.approx(0.3, abs=0.05)
    assert learnt[1] < 0.05, "overlapping steps are not counted twice"


def test_decode_steps_and_cpu_steps_are_not_learnt_there(gpu: scheduler_state.KairosState) -> None:
    step_timing.process_batch_result(lambda *a: None, None, *launch(False, 0.3))
    gpu.synchronous = True
    step_timing.process_batch_result(lambda *a: None, None, *launch(True, 0.3))
    assert gpu.prefill_time.error.samples == 0


def test_tokens_left_and_admission_work_on_the_old_layout(gpu: scheduler_state.KairosState) -> None:
    req = Req("a", 1000, ttft_ms=100)
    req.prefix_len = 300
    req = old_layout(req)
    assert tokens_left(req) == 700
    req.extend_range = SimpleNamespace(end=512)
    assert tokens_left(req) == 488
    assert kv_tokens(req) == 512
    req.full_untruncated_fill_ids, req.host_hit_length = [0] * 1000, 0
    adder = SimpleNamespace(rem_chunk_tokens=700, ceil_paged_tokens=lambda n: n)
    assert prefill.add_one_req(lambda *a: "added", adder, req, True, None) == "added"
