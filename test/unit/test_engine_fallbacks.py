"""What cannot run in part runs whole: every reason, one line each, and packing comes back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import features
from sglang_kairos.engine.hooks import admission, decode
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.engine.state.running_table import EMITTED, memory_of
from sglang_kairos.policy import decode_planner
from sglang_kairos.policy.chaos_decode import ChaosDecodePlanner
from sglang_kairos.policy.packing import StepChoice

torch = pytest.importorskip("torch")

LINE = "decode packing is off while {}: full batch"


class Req:
    """As much of SGLang's request as the glue looks at."""

    def __init__(self, rid: str) -> None:
        self.rid, self.beam_group = rid, None
        self.origin_input_ids, self.output_ids = [0] * 10, [1]
        wire = {"kairos": {"ttft_ms": 1000, "tpot_ms": 20}}
        self.sampling_params = SimpleNamespace(custom_params=wire)
        now = time.perf_counter()
        self.time_stats = SimpleNamespace(
            scheduler_recv_time=now, decode_prebuilt_finish_time=now, last_decode_finish_time=now
        )

    def finished(self) -> bool:
        return False


class Batch:
    """As much of SGLang's ScheduleBatch; its lengths are rebound, never changed in place."""

    def __init__(self, count: int) -> None:
        self.reqs = [Req(f"r{index}") for index in range(count)]
        self.seq_lens = self.orig_seq_lens = torch.full((count,), 10)
        self.seq_lens_cpu: Any = torch.full((count,), 10)
        self.hisparse_coordinator: Any = None
        self.spec_algorithm = SimpleNamespace(is_none=lambda: True)
        self.model_config = SimpleNamespace(is_encoder_decoder=False)
        self.sampling_info = SimpleNamespace(
            penalizer_orchestrator=SimpleNamespace(is_required=False)
        )

    def filter_batch(self, keep_indices: list[int]) -> None:
        self.reqs = [self.reqs[index] for index in keep_indices]
        for name in ("seq_lens", "orig_seq_lens", "seq_lens_cpu"):
            setattr(self, name, getattr(self, name)[keep_indices])


def upstream_prepare(batch: Batch) -> None:
    batch.forward_mode = "decode"
    for name in ("seq_lens", "orig_seq_lens", "seq_lens_cpu"):
        lengths = getattr(batch, name)
        setattr(batch, name, None if lengths is None else lengths + 1)


@pytest.fixture
def kairos(monkeypatch: pytest.MonkeyPatch) -> scheduler_state.KairosState:
    """A decode server whose policy parks all but the first request, whatever the case."""
    scheduler = SimpleNamespace(
        disaggregation_mode=SimpleNamespace(value="decode"),
        device="cpu",
        tp_size=1,
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=list),
        require_mlp_sync=False,
        req_to_token_pool=SimpleNamespace(),
        waiting_queue=[],
        server_args=SimpleNamespace(retraction_policy="length"),
    )
    made = scheduler_state.KairosState(scheduler, KairosConfig())
    monkeypatch.setattr(scheduler_state, "CURRENT", made)

    def park(slack: Any, *rest: Any, **more: Any) -> StepChoice:
        return StepChoice([0], 0.01, "packed", np.arange(len(slack)) == 0)

    monkeypatch.setattr(decode_planner, "choose_step", park)
    monkeypatch.setattr(memory_of(made).planner, "trusted", lambda error: True)
    monkeypatch.setattr(made.step_time, "step_s", lambda batch, tokens: 1.0)
    return made


def step(kairos: scheduler_state.KairosState, batch: Batch) -> Any:
    """One decision as the decode loop makes it; returns the batch to run."""

    def upstream(scheduler: Any, running_batch: Any) -> Any:
        decode.prepare_for_decode(upstream_prepare, running_batch)
        return SimpleNamespace(batch_to_run=running_batch, running_batch=running_batch)

    return decode.get_next_decode_batch(upstream, kairos.scheduler, batch).batch_to_run


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message.removeprefix("Kairos: ") for r in caplog.records if "packing" in r.message]


Spoil = Callable[[Any, Batch], None]


def speculative(scheduler: Any, batch: Batch) -> None:
    batch.spec_algorithm = SimpleNamespace(is_none=lambda: False)


def penalties(scheduler: Any, batch: Batch) -> None:
    batch.sampling_info.penalizer_orchestrator.is_required = True


def beam(scheduler: Any, batch: Batch) -> None:
    batch.reqs[-1].beam_group = object()  # type: ignore[assignment]


def hisparse(scheduler: Any, batch: Batch) -> None:
    batch.hisparse_coordinator = object()


def encoder_decoder(scheduler: Any, batch: Batch) -> None:
    batch.model_config = SimpleNamespace(is_encoder_decoder=True)


def mamba(scheduler: Any, batch: Batch) -> None:
    scheduler.req_to_token_pool.mamba_allocator = object()


def dp_attention(scheduler: Any, batch: Batch) -> None:
    scheduler.require_mlp_sync = True


EXCLUDED: dict[str, Spoil] = {
    "speculative decoding is on": speculative,
    "a request uses penalties": penalties,
    "a request uses beam search": beam,
    "hisparse is on": hisparse,
    "the model is an encoder-decoder": encoder_decoder,
    "the model has mamba state": mamba,
    "DP attention synchronises batches": dp_attention,
}
excluded = pytest.mark.parametrize("reason", EXCLUDED)


def test_every_reason_there_is_stands_in_this_file() -> None:
    rows = [row.reason for row in features.FEATURES if "park" in row.forbids]
    assert sorted(rows) == sorted(EXCLUDED)


def test_without_a_reason_these_batches_run_in_part(kairos: scheduler_state.KairosState) -> None:
    batch = Batch(3)
    assert step(kairos, batch).reqs == batch.reqs[:1]
    assert batch.seq_lens.tolist() == [11, 10, 10]


@excluded
def test_the_full_batch_runs_as_upstream_prepared_it_and_one_line_says_why(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    for _ in range(3):
        batch = Batch(3)
        EXCLUDED[reason](kairos.scheduler, batch)
        assert step(kairos, batch) is batch
        assert batch.seq_lens.tolist() == [11, 11, 11]
    assert lines(caplog) == [LINE.format(reason)]
    assert kairos.counters["fallback_steps"] == 3
    assert kairos.counters["subset_steps"] == kairos.counters["parked"] == 0


@excluded
def test_random_decisions_keep_to_it_too(kairos: scheduler_state.KairosState, reason: str) -> None:
    planner = memory_of(kairos).planner = ChaosDecodePlanner(KairosConfig(), Counter())
    choice = StepChoice([0], 0.01, "chaos", np.array([True, False, False]))
    planner.choose = lambda view, times: choice  # type: ignore[method-assign]
    batch = Batch(3)
    EXCLUDED[reason](kairos.scheduler, batch)
    assert step(kairos, batch) is batch


@excluded
def test_a_request_alone_needs_no_fallback_and_no_line(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    batch = Batch(1)
    EXCLUDED[reason](kairos.scheduler, batch)
    assert step(kairos, batch) is batch
    assert not lines(caplog) and kairos.counters["fallback_steps"] == 0


@pytest.mark.parametrize("reason", ["a request uses penalties", "a request uses beam search"])
def test_packing_resumes_behind_such_requests_and_the_line_is_not_repeated(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    for _ in range(2):
        batch = Batch(3)
        EXCLUDED[reason](kairos.scheduler, batch)
        assert step(kairos, batch) is batch
        assert len(step(kairos, Batch(3)).reqs) == 1
    assert lines(caplog) == [LINE.format(reason)]
    assert (kairos.counters["fallback_steps"], kairos.counters["subset_steps"]) == (2, 2)


def test_two_reasons_have_a_line_each(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in ("a request uses penalties", "hisparse is on") * 2:
        batch = Batch(3)
        EXCLUDED[reason](kairos.scheduler, batch)
        step(kairos, batch)
    assert lines(caplog) == [LINE.format(r) for r in ("a request uses penalties", "hisparse is on")]


def test_a_fallback_step_counts_as_a_token_of_everybody(
    kairos: scheduler_state.KairosState,
) -> None:
    batch = Batch(3)
    penalties(kairos.scheduler, batch)
    step(kairos, batch)
    batch.sampling_info.penalizer_orchestrator.is_required = False
    step(kairos, batch)
    assert memory_of(kairos).table.columns[EMITTED].tolist() == [3, 2, 2]


def test_lengths_that_only_the_device_knows_do_not_end_a_speculating_server(
    kairos: scheduler_state.KairosState,
) -> None:
    """Attention backends that need no lengths on the CPU leave `seq_lens_cpu` None (SGLang 0.5.23,
    `FutureMap.resolve_seq_lens_cpu`)."""
    batch = Batch(3)
    speculative(kairos.scheduler, batch)
    batch.seq_lens_cpu = None
    assert step(kairos, batch) is batch


def test_admission_is_not_gated_by_the_steps_of_a_speculating_server(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step then yields several tokens: all would look late, and newcomers be held back for it."""
    kairos.scheduler.spec_algorithm = SimpleNamespace(is_none=lambda: False)
    monkeypatch.setattr(admission, "reserve", lambda *args: "held back")
    queue = SimpleNamespace(queue=[SimpleNamespace(req=Req("a")), SimpleNamespace(req=Req("b"))])
    assert decode.pop_preallocated(lambda queue: "all of them", queue) == "all of them"
