"""What cannot run in part runs whole: every reason, one line each, and packing comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.fake_scheduler import Batch, decoding, make_decode_scheduler
from helpers.fake_scheduler import decode_step as step
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import features
from sglang_kairos.engine.hooks import admission, decode
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.engine.state.running_table import EMITTED, memory_of
from sglang_kairos.policy import decode_planner
from sglang_kairos.policy.decode_step import StepChoice
from sglang_kairos.policy.random_decode import ChaosDecodePlanner

torch = pytest.importorskip("torch")

LINE = "decode packing is off while {}: full batch"


def batch_of(count: int) -> Batch:
    """A batch of requests that all ask for 20 ms a token."""
    return Batch([decoding(f"r{index}", 20) for index in range(count)])


@pytest.fixture
def kairos(monkeypatch: pytest.MonkeyPatch) -> scheduler_state.KairosState:
    """A decode server whose policy parks all but the first request, whatever the case."""
    made = scheduler_state.KairosState(make_decode_scheduler(), KairosConfig())
    monkeypatch.setattr(scheduler_state, "CURRENT", made)

    def park(slack: Any, *rest: Any, **more: Any) -> StepChoice:
        return StepChoice([0], 0.01, "packed", np.arange(len(slack)) == 0)

    monkeypatch.setattr(decode_planner, "choose_step", park)
    monkeypatch.setattr(memory_of(made).planner, "trusted", lambda error: True)
    monkeypatch.setattr(made.step_time, "step_s", lambda batch, tokens: 1.0)
    return made


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
    batch = batch_of(3)
    assert step(kairos, batch).reqs == batch.reqs[:1]
    assert batch.seq_lens.tolist() == [11, 11, 12]


@excluded
def test_the_full_batch_runs_as_upstream_prepared_it_and_one_line_says_why(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    for _ in range(3):
        batch = batch_of(3)
        EXCLUDED[reason](kairos.scheduler, batch)
        assert step(kairos, batch) is batch
        assert batch.seq_lens.tolist() == [11, 12, 13]
    assert lines(caplog) == [LINE.format(reason)]
    assert kairos.counters["fallback_steps"] == 3
    assert kairos.counters["subset_steps"] == kairos.counters["parked"] == 0


@excluded
def test_random_decisions_keep_to_it_too(kairos: scheduler_state.KairosState, reason: str) -> None:
    planner = memory_of(kairos).planner = ChaosDecodePlanner(KairosConfig(), Counter())
    choice = StepChoice([0], 0.01, "chaos", np.array([True, False, False]))
    planner.choose = lambda view, times: choice  # type: ignore[method-assign]
    batch = batch_of(3)
    EXCLUDED[reason](kairos.scheduler, batch)
    assert step(kairos, batch) is batch


@excluded
def test_a_request_alone_needs_no_fallback_and_no_line(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    batch = batch_of(1)
    EXCLUDED[reason](kairos.scheduler, batch)
    assert step(kairos, batch) is batch
    assert not lines(caplog) and kairos.counters["fallback_steps"] == 0


@pytest.mark.parametrize("reason", ["a request uses penalties", "a request uses beam search"])
def test_packing_resumes_behind_such_requests_and_the_line_is_not_repeated(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    for _ in range(2):
        batch = batch_of(3)
        EXCLUDED[reason](kairos.scheduler, batch)
        assert step(kairos, batch) is batch
        assert len(step(kairos, batch_of(3)).reqs) == 1
    assert lines(caplog) == [LINE.format(reason)]
    assert (kairos.counters["fallback_steps"], kairos.counters["subset_steps"]) == (2, 2)


def test_two_reasons_have_a_line_each(
    kairos: scheduler_state.KairosState, caplog: pytest.LogCaptureFixture
) -> None:
    for reason in ("a request uses penalties", "hisparse is on") * 2:
        batch = batch_of(3)
        EXCLUDED[reason](kairos.scheduler, batch)
        step(kairos, batch)
    assert lines(caplog) == [LINE.format(r) for r in ("a request uses penalties", "hisparse is on")]


def test_a_fallback_step_counts_as_a_token_of_everybody(
    kairos: scheduler_state.KairosState,
) -> None:
    batch = batch_of(3)
    penalties(kairos.scheduler, batch)
    step(kairos, batch)
    batch.sampling_info.penalizer_orchestrator.is_required = False
    step(kairos, batch)
    assert memory_of(kairos).table.columns[EMITTED].tolist() == [4, 3, 3]


def test_lengths_that_only_the_device_knows_do_not_end_a_speculating_server(
    kairos: scheduler_state.KairosState,
) -> None:
    """Attention backends that need no lengths on the CPU leave `seq_lens_cpu` None (SGLang 0.5.23,
    `FutureMap.resolve_seq_lens_cpu`)."""
    batch = batch_of(3)
    speculative(kairos.scheduler, batch)
    batch.seq_lens_cpu = None
    assert step(kairos, batch) is batch


def test_admission_is_not_gated_by_the_steps_of_a_speculating_server(
    kairos: scheduler_state.KairosState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step then yields several tokens: all would look late, and newcomers be held back for it."""
    kairos.scheduler.spec_algorithm = SimpleNamespace(is_none=lambda: False)
    monkeypatch.setattr(admission, "reserve", lambda *args: "held back")
    queue = SimpleNamespace(
        queue=[SimpleNamespace(req=decoding("a", 20)), SimpleNamespace(req=decoding("b", 20))]
    )
    assert decode.pop_preallocated(lambda queue: "all of them", queue) == "all of them"
