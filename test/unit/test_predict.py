"""Step-time models: what they predict, how they learn, what does not fool them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_kairos.predict.least_squares import least_squares
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel

H200 = Path(__file__).resolve().parents[3] / "shared" / "h200"
SIZES = [1, 2, 4, 8, 16, 24, 32, 64]


def prefill_s(new: Any, prefix: Any) -> float:
    n, p = np.asarray(new, float), np.asarray(prefix, float)
    return float(19e-3 + 14e-6 * n.sum() + 6e-10 * (n * (p + n / 2)).sum())


def decode_s(batch: int, kv_tokens: float) -> float:
    return 3.5e-3 + 0.22e-3 * batch + 0.65e-6 * kv_tokens


def teach_prefill(model: PrefillTimeModel, count: int, seed: int = 0, noise: float = 0.0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        new, prefix = rng.integers(16, 4096, 3), rng.integers(0, 60_000, 3)
        model.observe(new, prefix, prefill_s(new, prefix) * (1 + noise * rng.standard_normal()))


def teach_decode(
    model: StepTimeModel, count: int, seed: int = 0, noise: float = 0.0, speed: float = 1.0
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        batch, kv = int(rng.integers(1, 60)), float(rng.integers(100, 60_000))
        seconds = speed * decode_s(model.padded(batch), kv)
        model.observe(batch, kv, seconds * (1 + noise * rng.standard_normal()))


def off(predicted: float, true: float) -> float:
    return abs(predicted / true - 1)


def test_prefill_law_adds_up_over_requests_and_scalars_are_one_request() -> None:
    model = PrefillTimeModel(1.0, 0.1, 0.01)
    assert model.step_s([10, 20], [0, 5]) == pytest.approx(1 + 3 + 0.01 * (50 + 20 * 15))
    assert model.step_s(10, 4) == pytest.approx(1 + 1 + 0.01 * 10 * 9)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 50_000), st.integers(1, 4096))
def test_remaining_time_is_the_sum_of_its_chunks(tokens: int, prefix: int, chunk: int) -> None:
    model = PrefillTimeModel(19e-3, 14e-6, 6e-10)
    total, done = 0.0, 0
    while done < tokens:
        n = min(chunk, tokens - done)
        total += model.step_s(n, prefix + done)
        done += n
    assert float(model.remaining_s(tokens, prefix, chunk)) == pytest.approx(total)


def test_remaining_time_is_vectorised_and_nothing_left_takes_nothing() -> None:
    got = PrefillTimeModel(1.0, 0.1, 0.0).remaining_s([0, 10, 25], [0, 0, 7], 10)
    assert got == pytest.approx([0.0, 2.0, 5.5])
    assert PrefillTimeModel(1.0, 0.1, 0.0).remaining_s([25], [0], -1) == pytest.approx([3.5])


def test_generic_prefill_model_converges_in_ten_steps() -> None:
    model = PrefillTimeModel.generic()
    teach_prefill(model, 10)
    for new, prefix in ([512, 0], [2048, 1000], [4096, 50_000]):
        assert off(model.step_s(new, prefix), prefill_s(new, prefix)) < 0.1


def test_generic_decode_model_converges_in_fifteen_steps() -> None:
    model = StepTimeModel.generic(SIZES)
    teach_decode(model, 15)
    for batch, kv in ((4, 2000.0), (32, 30_000.0), (60, 60_000.0)):
        assert off(model.step_s(batch, kv), decode_s(model.padded(batch), kv)) < 0.1


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_one_outlier_hardly_counts(factor: float) -> None:
    model = StepTimeModel.generic(SIZES)
    teach_decode(model, 100, noise=0.02)
    before = model.step_s(32, 30_000.0)
    model.observe(32, 30_000.0, before * factor)
    assert off(model.step_s(32, 30_000.0), before) < 0.03


def test_the_first_steps_may_be_slow_without_lasting_harm() -> None:
    model = StepTimeModel.generic(SIZES)
    for _ in range(2):
        model.observe(4, 1000.0, 3.0)
    teach_decode(model, 40)
    assert off(model.step_s(32, 30_000.0), decode_s(32, 30_000.0)) < 0.1


def test_an_old_regime_is_forgotten() -> None:
    model = StepTimeModel.generic(SIZES)
    teach_decode(model, 200, noise=0.02)
    teach_decode(model, 60, seed=1, noise=0.02, speed=2.0)
    assert off(model.step_s(32, 30_000.0), 2 * decode_s(32, 30_000.0)) < 0.1


def test_what_the_load_does_not_exercise_is_not_forgotten() -> None:
    model = StepTimeModel.generic(SIZES)
    teach_decode(model, 100)
    for _ in range(2000):
        model.observe(1, 200.0, decode_s(1, 200.0))
    assert off(model.step_s(60, 60_000.0), decode_s(64, 60_000.0)) < 0.05


def test_noise_is_averaged_and_the_error_says_how_much_there_is() -> None:
    model = StepTimeModel.generic(SIZES)
    teach_decode(model, 400, noise=0.05)
    assert off(model.step_s(32, 30_000.0), decode_s(32, 30_000.0)) < 0.03
    assert 0.02 < model.error.mape < 0.07 < model.error.p90 < 0.12
    assert model.error.samples == 400


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times_are_ignored(seconds: float) -> None:
    model = StepTimeModel.generic()
    model.observe(4, 100.0, seconds)
    assert model.error.samples == 0
    assert model.step_s(4, 100.0) == StepTimeModel.generic().step_s(4, 100.0)


def test_batches_are_padded_to_captured_sizes() -> None:
    model = StepTimeModel(0.0, 1.0, 0.0, [4, 8])
    assert [model.step_s(b, 0.0) for b in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, 9]
    assert model.step_s(np.arange(1, 10), np.zeros(9)).tolist() == [4] * 4 + [8] * 4 + [9]


@settings(max_examples=40, deadline=None)
@example([(1, 161499.0, 1.0), (25, 93133.0, 0.125), (1, 3.2e-69, 1.0)])
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0, 1e6), st.floats(1e-4, 10)), max_size=40))
def test_whatever_is_observed_predictions_stay_monotone(rows: Any) -> None:
    model = StepTimeModel.generic(SIZES)
    for batch, kv, seconds in rows:
        model.observe(batch, kv, seconds)
    grid = model.step_s(np.arange(1, 80), np.full(79, 1000.0))
    assert np.isfinite(grid).all() and (grid >= 0).all()
    assert (np.diff(grid) >= -1e-12).all()
    assert model.step_s(8, 2000.0) >= model.step_s(8, 1000.0)


def test_snapshot_survives_json_and_goes_on_learning_alike() -> None:
    one, two = StepTimeModel.generic(SIZES), StepTimeModel.generic(SIZES)
    teach_decode(one, 30)
    two.restore(json.loads(json.dumps(one.snapshot())))
    for model in (one, two):
        teach_decode(model, 5, seed=3)
    assert two.step_s(32, 9000.0) == pytest.approx(one.step_s(32, 9000.0))


def test_a_foreign_or_damaged_snapshot_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: 'prefill_time', expected 'step_time'"):
        StepTimeModel.generic().restore(PrefillTimeModel.generic().snapshot())
    damaged = PrefillTimeModel.generic().snapshot()
    damaged["theta"][0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        PrefillTimeModel.generic().restore(damaged)


def test_least_squares_puts_a_coefficient_that_wants_to_be_negative_at_zero() -> None:
    x = np.arange(1, 20.0)
    theta = least_squares(np.column_stack([np.ones_like(x), x]), 100 - x)
    assert theta[1] == 0 and theta[0] > 80


def table(name: str) -> Any:
    path = H200 / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return np.loadtxt(path, delimiter=",", skiprows=1)


def test_prefill_fit_of_the_h200_table() -> None:
    rows = [(p, n, ms / 1e3) for p, n, ms in table("minimax_m2.5_tp4_prefill.csv")]
    model = PrefillTimeModel.fit(rows)
    assert np.mean([off(model.step_s(n, p), s) for p, n, s in rows]) < 0.03


def test_decode_fit_of_the_h200_table() -> None:
    rows = [(int(b), b * k, ms / 1e3) for b, k, ms in table("minimax_m2.5_tp4_decode.csv")]
    model = StepTimeModel.fit(rows)
    assert np.mean([off(model.step_s(b, kv), s) for b, kv, s in rows]) < 0.025


@given(
    tokens=st.integers(1, 5000),
    prefix=st.integers(0, 5000),
    chunk=st.sampled_from([1, 7, 512, 4096]),
)
def test_the_closed_form_is_the_sum_over_chunks(tokens: int, prefix: int, chunk: int) -> None:
    chunk = max(chunk, tokens // 50)
    model = PrefillTimeModel(3e-3, 2e-5, 4e-9, 1e-8)
    done, total = 0, 0.0
    while done < tokens:
        step = min(chunk, tokens - done)
        total += model.step_s(step, prefix + done)
        done += step
    assert float(model.remaining_s(tokens, prefix, chunk)) == pytest.approx(total)


def test_a_crumb_of_a_long_prompt_is_worth_it_only_where_the_context_is_not_reread() -> None:
    paged = PrefillTimeModel(5e-3, 2e-5, 4e-9)
    padded = PrefillTimeModel(5e-3, 2e-5, 4e-9, 1.5e-8)
    assert paged.worthwhile_tokens(6000, 512) == 64
    assert padded.worthwhile_tokens(0, 512) == 64
    assert padded.worthwhile_tokens(6000, 512) == 512
