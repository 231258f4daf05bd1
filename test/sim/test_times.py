"""Step times: the built-in laws, tables and what fills them, with and without aiconfigurator-core."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.sim.hardware import systems
from sglang_kairos.sim.hardware.systems import StepTimesError, load_system
from sglang_kairos.sim.hardware.tables import MeasuredSteps, TableTimes, monotone
from sglang_kairos.sim.hardware.times import MINIMAX_M25_H200_TP4, SYSTEMS, LawTimes, built_in

ROOT = Path(__file__).resolve().parents[2]
MINIMAX = "minimax-m2.5-h200-tp4"
LAW = LawTimes(PrefillLatency(5e-3, 1e-4, 1e-9), DecodeLatency(3.5e-3, 0.22e-3, 0.65e-6), (1, 2, 8))
names = pytest.mark.parametrize("name", sorted(SYSTEMS))


# The built-in systems


@names
def test_every_built_in_law_is_within_five_percent_on_average_and_says_so(name: str) -> None:
    entry = built_in()[name]
    for phase in ("prefill", "decode"):
        assert 0 < entry[phase]["mean_error"] <= 0.05
        assert entry[phase]["mean_error"] < entry[phase]["max_error"] < 0.25
        assert entry[phase]["points"] >= 81
    text = " ".join(SYSTEMS[name].notes)
    for part in ("laws fitted to aiconfigurator-core 0.12.0", "mean error", entry["model"]):
        assert part in text


@names
def test_built_in_laws_are_positive_and_grow_with_all_they_depend_on(name: str) -> None:
    times = SYSTEMS[name].times
    assert times.captured_sizes is not None
    new, prefix = (1, 64, 512, 8192), (0, 100, 8192, 131072)
    prefill = np.array([[times.prefill_s([n], [p]) for n in new] for p in prefix])
    decode = np.array(
        [[times.decode_s(b, b * c) for c in (1, 256, 65536)] for b in times.captured_sizes]
    )
    assert prefill.min() > 1e-4 and decode.min() > 1e-4
    assert (np.diff(prefill, axis=1) > 0).all() and (np.diff(prefill, axis=0) > 0).all()
    assert (np.diff(decode, axis=1) > 0).all() and (np.diff(decode, axis=0) > 0).all()


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        (MINIMAX, 62 * 2 * 8 * 128 * 2),
        ("minimax-m2.5-h200-tp4-bf16kv", 62 * 2 * 8 * 128 * 2),
        ("qwen3-8b-h200-tp1", 36 * 2 * 8 * 128 * 2),
        ("llama-3.1-70b-h200-tp4", 80 * 2 * 8 * 128 * 2),
        ("qwen3-235b-fp8-h200-tp4", 94 * 2 * 4 * 128 * 2),
        ("deepseek-v3-h200-tp8", 61 * 576 * 2),
    ],
)
def test_kv_bytes_follow_from_the_models_configs(name: str, kv_bytes: int) -> None:
    assert SYSTEMS[name].kv_bytes == kv_bytes


@names
def test_kv_and_weights_fit_into_the_gpus(name: str) -> None:
    """Every rank of DeepSeek's holds the whole latent, those of the others their heads."""
    system, tp = SYSTEMS[name], built_in()[name]["tp"]
    copies = tp if name.startswith("deepseek") else 1
    used = system.decode_kv_tokens * system.kv_bytes * copies / tp
    assert 10e9 < used < 0.85 * 151.4e9
    assert system.prefill_kv_tokens == system.decode_kv_tokens


def test_minimax_is_what_earlier_results_were_made_with() -> None:
    slopes = (3.623066603439634e-4, 1.511747182655648e-4)
    fixed = (4.487385074560402e-3, 1.932787008939443e-5)
    old = LawTimes(
        PrefillLatency(1.9055697686809907e-2, 1.405754143434806e-5, 5.675340609602099e-10),
        DecodeLatency.of((*fixed, *slopes, 1.2688752266510454e-8)),
    )
    new = MINIMAX_M25_H200_TP4.times
    assert new.decode_s(100, 400_000) == pytest.approx(old.decode_s(100, 400_000), rel=1e-9)
    assert new.prefill_s([900, 64], [0, 7000]) == pytest.approx(
        old.prefill_s([900, 64], [0, 7000]), rel=1e-9
    )
    assert MINIMAX_M25_H200_TP4.decode_kv_tokens == 1_000_000
    assert MINIMAX_M25_H200_TP4.max_running == 512


def rows_of(phase: str) -> list[tuple[int, int, float]]:
    """The outside check: whole table of `phase`, seconds. Skips where it is not at hand."""
    folders = [ROOT.parent / "shared/h200", ROOT / "shared/h200"]
    if "KAIROS_H200_TABLES" in os.environ:
        folders = [Path(os.environ["KAIROS_H200_TABLES"])]
    for folder in folders:
        file = folder / f"minimax_m2.5_tp4_{phase}.csv"
        if file.is_file():
            with file.open() as lines:
                return [
                    (int(a), int(b), float(ms) / 1e3) for a, b, ms in list(csv.reader(lines))[1:]
                ]
    pytest.skip("no H200 tables: set KAIROS_H200_TABLES to their folder")


def test_minimax_law_is_within_three_percent_of_the_h200_tables() -> None:
    times = MINIMAX_M25_H200_TP4.times
    prefill = [abs(times.prefill_s([n], [p]) / s - 1) for p, n, s in rows_of("prefill")]
    decode = [abs(times.decode_s(b, b * c) / s - 1) for b, c, s in rows_of("decode")]
    assert np.mean(prefill) < 0.03 and np.mean(decode) < 0.03


# Choosing a source


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "find_spec", lambda name: None)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("source", ["auto", "law"])
def test_without_the_extra_the_law_is_taken(source: str) -> None:
    assert load_system(MINIMAX, source) is SYSTEMS[MINIMAX]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("name", "source", "says"),
    [
        (MINIMAX, "tables", r"sglang-kairos\[tables\]"),
        (MINIMAX, "guess", "unknown source 'guess' of step times; known: auto, tables, law"),
        ("gpt-2", "law", "unknown system 'gpt-2'; known: deepseek-v3"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(name: str, source: str, says: str) -> None:
    with pytest.raises(StepTimesError, match=says) as caught:
        load_system(name, source)
    assert "\n" not in str(caught.value)


# Tables

POSITIVE = st.floats(1e-4, 10.0)


def table_of(shared: Any, attention: Any, decode: Any) -> MeasuredSteps:
    """Knots: new 1, 10, 100; prefix 0, 1000; sizes 1, 2, 8; context 1, 50, 400."""
    return MeasuredSteps(
        new=np.array([1.0, 10.0, 100.0]),
        prefix=np.array([0.0, 1000.0]),
        shared_s=np.asarray(shared, float),
        attention_s=np.asarray(attention, float),
        sizes=(1, 2, 8),
        context=np.array([1.0, 50.0, 400.0]),
        decode_s=np.asarray(decode, float),
    )


RISING = table_of(
    [1.0, 2.0, 5.0],
    [[0.1, 0.2, 1.0], [0.3, 0.8, 4.0]],
    [[1.0, 1.5, 2.0], [2.0, 3.0, 4.0], [5.0, 6.0, 9.0]],
)


@st.composite
def tables(draw: st.DrawFn) -> MeasuredSteps:
    return table_of(
        draw(arrays(float, 3, elements=POSITIVE)),
        draw(arrays(float, (2, 3), elements=POSITIVE)),
        draw(arrays(float, (3, 3), elements=POSITIVE)),
    )


def test_a_monotone_table_is_met_at_its_knots() -> None:
    times = TableTimes(RISING, LAW)
    for i, new in enumerate((1, 10, 100)):
        for j, prefix in enumerate((0, 1000)):
            expected = RISING.shared_s[i] + RISING.attention_s[j, i]
            assert times.prefill_s([new], [prefix]) == pytest.approx(expected)
    for i, size in enumerate((1, 2, 8)):
        for j, context in enumerate((1, 50, 400)):
            assert times.decode_s(size, size * context) == pytest.approx(RISING.decode_s[i, j])


@pytest.mark.parametrize(
    ("new", "prefix", "expected"),
    [
        # Halfway in both directions: the mean of the cell's corners.
        ([55], [500], 3.5 + (0.2 + 1.0 + 0.8 + 4.0) / 4),
        # Shared cost of 10 tokens in all, two attentions, their fixed cost once.
        ([1, 9], [0, 0], 2.0 + 0.1 + (0.1 + 0.1 * 8 / 9) - 0.1),
        # Beyond the last knots the line goes on.
        ([190], [0], 8.0 + 1.8),
        ([10], [2000], 2.0 + 1.4),
    ],
)
def test_prefill_steps_between_and_beyond_knots(
    new: list[int], prefix: list[int], expected: float
) -> None:
    assert TableTimes(RISING, LAW).prefill_s(new, prefix) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("batch", "kv_tokens", "expected"),
    [
        (1, 25, 1.0 + 0.5 * 24 / 49),
        # Padded to 8; the padding reads nothing: 8 x 50 tokens, whoever holds them.
        (3, 400, 6.0),
        (8, 400, 6.0),
        (1, 750, 2.5),
        # Two of the largest steps, each with half of the tokens.
        (16, 800, 12.0),
    ],
)
def test_decode_steps_are_those_of_the_captured_size(
    batch: int, kv_tokens: int, expected: float
) -> None:
    assert TableTimes(RISING, LAW).decode_s(batch, kv_tokens) == pytest.approx(expected)


@given(tables(), st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1000)), min_size=1))
def test_prefill_is_positive_and_grows_whatever_the_table(
    table: MeasuredSteps, requests: list[tuple[int, int]]
) -> None:
    times = TableTimes(table, LAW)
    new, prefix = map(list, zip(*requests, strict=True))
    seconds = times.prefill_s(new, prefix)
    assert seconds > 0
    slack = 1e-9 * seconds
    assert times.prefill_s([min(100, new[0] + 7), *new[1:]], prefix) >= seconds - slack
    assert times.prefill_s(new, [min(1000, prefix[0] + 90), *prefix[1:]]) >= seconds - slack
    assert times.prefill_s([*new, 1], [*prefix, 0]) >= seconds - slack


@given(tables(), st.integers(1, 20), st.integers(0, 4000))
def test_decode_is_positive_and_grows_with_context(
    table: MeasuredSteps, batch: int, kv_tokens: int
) -> None:
    times = TableTimes(table, LAW)
    seconds = times.decode_s(batch, kv_tokens)
    assert 0 < seconds <= times.decode_s(batch, kv_tokens + 5) * (1 + 1e-9)


@given(arrays(float, (3, 4), elements=POSITIVE))
def test_monotone_moves_no_point_further_than_the_worst_inversion_asks(table: Any) -> None:
    made = monotone(table)
    assert (np.diff(made, axis=0) >= -1e-12).all() and (np.diff(made, axis=1) >= -1e-12).all()
    fall = max(
        table[i, j] / table[k, m]
        for i in range(3)
        for j in range(4)
        for k in range(i, 3)
        for m in range(j, 4)
    )
    assert np.abs(np.log(made / table)).max() <= np.log(fall) / 2 + 1e-9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shared_s": np.ones(2)}, "shared_s: shape"),
        ({"decode_s": np.zeros((3, 3))}, "decode_s: holds a time that is not positive"),
        ({"sizes": (1, 8, 2)}, "sizes: knots must ascend"),
        ({"new": np.array([2.0, 10.0, 100.0])}, "new tokens from 1"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MeasuredSteps(**{**RISING.__dict__, **change})


def test_predictors_start_from_the_law() -> None:
    times = TableTimes(RISING, LAW)
    assert times.prefill_model().step_s([100], [0]) == LAW.prefill_s([100], [0])
    assert times.decode_model().step_s(3, 100.0) == LAW.decode_s(3, 100)
    assert times.prefill_model() is not times.prefill_model()


# With aiconfigurator-core


@pytest.fixture
def extra() -> None:
    pytest.importorskip("aiconfigurator_core")


@pytest.mark.usefixtures("extra")
def test_the_estimator_gives_the_h200_tables_to_rounding() -> None:
    from sglang_kairos.sim.hardware.estimator import Estimator

    prefill, decode = rows_of("prefill"), rows_of("decode")
    estimator = Estimator.of(built_in()[MINIMAX])
    assert all(abs(estimator.prefill_s(n, p) - s) < 0.51e-6 for p, n, s in prefill)
    assert all(abs(estimator.decode_s(b, c) - s) < 0.51e-6 for b, c, s in decode)


@pytest.mark.usefixtures("extra")
@names
def test_tables_are_near_what_they_were_made_of(name: str) -> None:
    from sglang_kairos.sim.hardware.estimator import Estimator

    system, estimator = load_system(name, "tables"), Estimator.of(built_in()[name])
    assert "table of aiconfigurator-core" in system.notes[0]
    assert system.times.captured_sizes == SYSTEMS[name].times.captured_sizes
    rng = np.random.default_rng(0)
    prefill, several, decode = [], [], []
    for _ in range(300):
        new, prefix = (int(x) for x in 2 ** rng.uniform((5, 0), (13, 17)))
        live = estimator.prefill_s(new, prefix)
        prefill.append(abs(system.times.prefill_s([new], [prefix]) / live - 1))
        new, prefix, k = max(64, new // 8), min(prefix, 16384), int(rng.integers(2, 9))
        live = estimator.prefill_s(new, prefix, k)
        several.append(abs(system.times.prefill_s([new] * k, [prefix] * k) / live - 1))
        batch = int(rng.choice(system.times.captured_sizes or ()))
        each = int(2 ** rng.uniform(4, 13))
        live = estimator.decode_s(batch, each)
        decode.append(abs(system.times.decode_s(batch, batch * each) / live - 1))
    assert np.mean(prefill) < 0.02 and np.mean(several) < 0.06 and np.mean(decode) < 0.005


@pytest.mark.usefixtures("extra")
def test_another_version_without_the_database_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = {**built_in()[MINIMAX], "database": "0.4.1"}
    monkeypatch.setattr(systems, "built_in", lambda: {MINIMAX: entry})
    with pytest.raises(StepTimesError, match=r"aiconfigurator-core 0.12.0 wanted") as caught:
        load_system(MINIMAX, "auto")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("extra")
def test_the_built_in_file_is_what_the_script_writes() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/fit_systems.py"), "--check"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
