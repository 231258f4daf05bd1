"""The error window, outliers, and what recursive least squares survives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.predict.least_squares import Rls
from sglang_kairos.predict.prediction_error import (
    CLIP_FLOOR,
    LEARNT_STEPS,
    RESPONDS,
    WINDOW,
    ErrorWindow,
    Outliers,
    PredictError,
)

SCALE = (1.0, 1e3, 1e7)
TRUE = np.array([19e-3, 14e-6, 6e-10])

times = st.floats(1e-4, 10.0)


def features(rng: np.random.Generator) -> tuple[float, float, float]:
    n, prefix = float(rng.integers(16, 8192)), float(rng.integers(0, 60_000))
    return 1.0, n, n * (prefix + n / 2)


def taught(count: int, noise: float = 0.02, seed: int = 0) -> tuple[Rls, np.random.Generator]:
    rng, model = np.random.default_rng(seed), Rls((10e-3, 50e-6, 1e-9), SCALE)
    for _ in range(count):
        x = features(rng)
        model.observe(x, float(TRUE @ x) * (1 + noise * rng.standard_normal()))
    return model, rng


def mape(model: Rls, rng: np.random.Generator, speed: float = 1.0) -> float:
    xs = [features(rng) for _ in range(50)]
    return float(np.mean([abs(np.dot(model.theta, x) / (speed * TRUE @ x) - 1) for x in xs]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(times, times), min_size=1, max_size=WINDOW + 40))
def test_the_window_agrees_with_numpy(pairs: list[tuple[float, float]]) -> None:
    window = ErrorWindow()
    for predicted, measured in pairs:
        window.add(predicted, measured)
    signed = np.minimum([p / m - 1 for p, m in pairs[-WINDOW:]], 10.0)
    assert window.error.mape == pytest.approx(np.abs(signed).mean())
    assert window.error.bias == pytest.approx(signed.mean())
    assert window.error.samples == len(pairs)
    assert window.error.p90 in np.abs(signed)
    assert np.mean(np.abs(signed) <= window.error.p90) >= 0.9


def test_no_step_has_no_error_and_no_margin() -> None:
    assert ErrorWindow().error == PredictError(0.0, 0.0, 0, 0.0)
    assert ErrorWindow().upper_ratio(0.9) == 1.0


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_an_impossible_quantile_is_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile must be between 0 and 1"):
        ErrorWindow().upper_ratio(quantile)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_the_upper_quantile_covers_as_often_as_it_says(quantile: float) -> None:
    rng, window, covered = np.random.default_rng(1), ErrorWindow(), []
    for step in range(4000):
        measured = float(np.exp(0.2 * rng.standard_normal()))
        if step >= WINDOW:
            covered.append(measured <= window.upper_ratio(quantile))
        window.add(1.0, measured)
    assert np.mean(covered) == pytest.approx(quantile, abs=0.02)


def judged(steps: int, sigma: float, follows: float, spread: float, seed: int) -> ErrorWindow:
    """Steps predicted e^(`spread` z) s that take that to the power of `follows`, and scatter."""
    rng, window = np.random.default_rng(seed), ErrorWindow()
    for _ in range(steps):
        predicted = spread * rng.standard_normal()
        measured = follows * predicted + sigma * rng.standard_normal()
        window.add(float(np.exp(predicted)), float(np.exp(measured)))
    return window


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 0.8), st.floats(0.3, 1.0), st.integers(0, 2**32 - 1))
def test_steps_that_scatter_are_trusted_while_they_follow_the_predictions(
    sigma: float, spread: float, seed: int
) -> None:
    follow = judged(600, sigma, 1.0, spread, seed).error
    assert follow.mape > 0.2 and follow.response > RESPONDS and follow.trusted(0.2)
    ignore = judged(600, sigma, 0.0, spread, seed).error
    assert ignore.mape > 0.2 and ignore.response < RESPONDS and not ignore.trusted(0.2)


def test_steps_predicted_alike_leave_the_judgement_as_it_was() -> None:
    for follows in (0.0, 1.0):
        window = judged(600, 0.4, follows, 0.5, 1)
        before, rng = window.error.response, np.random.default_rng(2)
        for _ in range(20_000):
            window.add(1.0, float(np.exp(0.4 * rng.standard_normal())))
        assert window.error.response == pytest.approx(before, abs=0.2)


def test_a_host_that_changes_its_mind_changes_the_judgement() -> None:
    window, rng = judged(600, 0.4, 0.0, 0.5, 3), np.random.default_rng(4)
    assert not window.error.trusted(0.2)
    for _ in range(2000):
        predicted = 0.5 * rng.standard_normal()
        window.add(float(np.exp(predicted)), float(np.exp(predicted + 0.4 * rng.standard_normal())))
    assert window.error.trusted(0.2)


def test_before_enough_steps_nothing_is_trusted() -> None:
    assert not judged(LEARNT_STEPS - 1, 0.0, 1.0, 0.5, 0).error.trusted(100.0)
    assert judged(LEARNT_STEPS, 0.0, 1.0, 0.5, 0).error.trusted(0.0)


def test_too_few_steps_for_a_quantile_give_the_worst_seen() -> None:
    window = ErrorWindow()
    for measured in (1.0, 1.4, 0.9):
        window.add(1.0, measured)
    assert window.upper_ratio(0.9) == 1.4


def test_a_lone_outlier_is_bounded_and_casts_no_doubt_a_run_of_them_does() -> None:
    outliers = Outliers()
    for _ in range(300):
        outliers.bounded(1.0, 1.01)
    bound = 1.0 + CLIP_FLOOR
    assert outliers.bounded(1.0, 5.0) == (pytest.approx(bound), False)
    assert outliers.bounded(1.0, 1.01) == (1.01, False)
    assert outliers.bounded(1.0, 0.1) == (pytest.approx(1 / bound), False)
    seconds, doubt = outliers.bounded(1.0, 5.0)
    assert seconds < 1.2 and not doubt, "the other side starts a new run"
    later, doubt = outliers.bounded(1.0, 5.0)
    assert doubt and later > seconds


@pytest.mark.parametrize("factor", [5.0, 20.0, 0.1])
def test_hiccups_in_one_step_of_fifty_hardly_count(factor: float) -> None:
    model, rng = taught(200)
    for step in range(500):
        x = features(rng)
        late = factor if step % 50 == 25 else 1 + 0.02 * rng.standard_normal()
        model.observe(x, float(TRUE @ x) * late)
    assert mape(model, rng) < 0.03


@pytest.mark.parametrize("speed", [2.0, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_a_change_of_speed_is_followed_within_thirty_steps(speed: float, noise: float) -> None:
    for seed in range(5):
        model, rng = taught(1000, noise, seed)
        for _ in range(30):
            x = features(rng)
            model.observe(x, speed * float(TRUE @ x) * (1 + noise * rng.standard_normal()))
        assert mape(model, rng, speed) < 0.1


def test_a_slow_drift_is_followed() -> None:
    model, rng = taught(300)
    for step in range(600):
        x = features(rng)
        model.observe(x, (1 + step / 600) * float(TRUE @ x) * (1 + 0.02 * rng.standard_normal()))
    assert mape(model, rng, 2.0) < 0.1


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_an_hour_of_one_kind_of_step_spoils_nothing(noise: float) -> None:
    model, rng = taught(300, noise)
    for _ in range(10_000):
        x = (1.0, 512.0, 512.0 * 300)
        model.observe(x, float(TRUE @ x) * (1 + noise * rng.standard_normal()))
    assert mape(model, rng) < 0.06


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1e5), st.floats(0, 1e10), st.floats(1e-9, 1e6)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 20),
)
def test_whatever_is_observed_coefficients_stay_finite_and_not_negative(
    rows: list[tuple[float, float, float]], times: int
) -> None:
    model = Rls((10e-3, 50e-6, 1e-9), SCALE)
    for n, attended, seconds in rows * times:
        model.observe((1.0, n, attended), seconds)
        theta = np.asarray(model.theta)
        assert np.isfinite(theta).all() and (theta >= 0).all()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("theta", [1.0, 2.0], r"theta: shape \(2,\), expected \(3,\)"),
        ("theta", [1.0, -2.0, 0.0], "theta: .* negative"),
        ("theta", "abc", "theta: .*numbers"),
        ("information", [[1.0, 0, 0], [0, float("inf"), 0], [0, 0, 1]], "information: .*finite"),
        ("information", [[-1.0, 0, 0], [0, 1, 0], [0, 0, 1]], "information: .*definite"),
        ("spread", -1.0, "spread"),
        ("spread", None, "spread: .*not finite"),
    ],
)
def test_a_damaged_snapshot_is_refused_by_field(field: str, value: Any, text: str) -> None:
    model, _ = taught(20)
    before, state = model.theta, model.snapshot()
    state[field] = value
    with pytest.raises(ValueError, match=text):
        model.restore(state)
    assert model.theta == before


def test_its_own_snapshot_is_always_accepted_even_after_poor_excitation() -> None:
    model, _ = taught(50)
    for _ in range(3000):
        model.observe((1.0, 64.0, 2048.0), 0.02)
    again = Rls((1.0, 1.0, 1.0), SCALE)
    again.restore(model.snapshot())
    assert again.theta == pytest.approx(model.theta)
