"""`calibrate.cli`: what it fits, what it writes, what it says when it cannot measure."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.calibrate import cli, kernels
from sglang_kairos.calibrate.fit import entry, fit_decode, fit_prefill, medians
from sglang_kairos.calibrate.server import (
    MeasuredServer,
    Measurement,
    ProfileFailed,
    cadence,
    key_of,
)
from sglang_kairos.engine.state.latency_models import Profile
from sglang_kairos.loads.replay import Outcome
from sglang_kairos.predict.learnt_file import Key, load_profile
from sglang_kairos.predict.shipped_models import dump

KEY = Key("m", "cpu", 1, "torch_native////")
PREFILL = [
    (prefix, new, 4e-3 + 2e-5 * new + 1e-9 * new * (prefix + new / 2))
    for prefix in (0.0, 2048.0, 8192.0)
    for new in (64.0, 256.0, 1024.0, 2048.0, 4096.0)
]
DECODE = [
    (batch, float(batch * context), 5e-3 + 4e-5 * batch + 2e-8 * batch * context)
    for batch in (1, 4, 16, 64)
    for context in (128, 1024, 8192)
]


def test_the_fit_reproduces_cells_that_were_held_out() -> None:
    prefill, decode = fit_prefill(PREFILL), fit_decode(DECODE)
    assert prefill is not None and prefill.held_out_error is not None
    assert decode is not None and decode.held_out_error is not None
    assert prefill.held_out_error < 0.05
    assert decode.held_out_error < 0.05


@given(
    laws=st.tuples(
        st.floats(1e-4, 2e-2), st.floats(1e-6, 1e-4), st.floats(0, 1e-8), st.floats(0.97, 1.03)
    )
)
def test_a_law_within_the_models_is_found_and_coefficients_are_never_negative(
    laws: tuple[float, float, float, float],
) -> None:
    a, b, c, noise = laws
    rows = [
        (p, n, (a + b * n + c * n * (p + n / 2)) * (noise if i % 2 else 1.0))
        for i, (p, n, _) in enumerate(PREFILL)
    ]
    fit = fit_prefill(rows)
    assert fit is not None
    assert min(fit.model.law) >= 0
    off = [fit.model.step_s([n], [p]) / s - 1 for p, n, s in rows]
    assert np.abs(off).max() < 0.1


def test_padding_to_captured_sizes_is_in_the_fit() -> None:
    sizes = [1, 8, 64]
    rows = [
        (batch, 100.0 * batch, 5e-3 + 1e-4 * next(size for size in sizes if size >= batch))
        for batch in (1, 2, 3, 5, 8, 9, 20, 33, 50, 64)
    ]
    fit = fit_decode(rows, sizes)
    assert fit is not None
    assert fit.model.step_s(3, 300) == pytest.approx(fit.model.step_s(8, 300), rel=1e-3)
    assert fit.model.step_s(10, 1000) == pytest.approx(5e-3 + 6.4e-3, rel=0.1)


def test_too_few_rows_are_no_fit() -> None:
    assert fit_prefill(PREFILL[:5]) is None
    assert fit_decode([]) is None


def test_both_sides_of_a_pair_end_in_one_entry_that_a_server_starts_from(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    first = entry(KEY, fit_prefill(PREFILL), None, provenance="prefill server")
    path.write_text(dump([first]))
    both = entry(KEY, None, fit_decode(DECODE), provenance="pair", old=load_profile(path, KEY))
    path.write_text(dump([both]))
    args = SimpleNamespace(model_path="m", attention_backend="torch_native")
    scheduler = SimpleNamespace(server_args=args, device="cpu", tp_size=1)
    server = Profile(scheduler, str(path))
    assert server.key == KEY
    prefill, decode = server.start(None)
    assert server.source == "file"
    assert prefill.step_s([1024], [2048]) == pytest.approx(PREFILL[7][2], rel=0.1)
    assert decode.step_s(16, 16 * 1024) == pytest.approx(DECODE[7][2], rel=0.1)


def test_a_law_without_a_state_is_used_too(tmp_path: Path) -> None:
    """What a person writes by hand, or measured with other CUDA graphs."""
    path = tmp_path / "steps.json"
    seed = entry(KEY, fit_prefill(PREFILL), fit_decode(DECODE), provenance="")
    object.__setattr__(seed, "prefill_state", None)
    object.__setattr__(seed, "decode_state", None)
    path.write_text(dump([seed]))
    args = SimpleNamespace(model_path="m", attention_backend="torch_native")
    server = Profile(SimpleNamespace(server_args=args, device="cpu", tp_size=1), str(path))
    prefill, decode = server.start([1, 2, 4, 8, 16])
    assert server.source == "file"
    assert prefill.step_s([1024], [2048]) == pytest.approx(PREFILL[7][2], rel=0.1)
    assert decode.step_s(16, 16 * 1024) == pytest.approx(DECODE[7][2], rel=0.1)


def test_hiccups_drop_out_of_the_rows() -> None:
    rows = [(4.0, 1000.0 + i, 5e-3) for i in range(9)] + [(4.0, 1005.0, 0.5)]
    assert medians(rows) == [(4.0, 1004.5, 5e-3)]


def stream(first_s: float, gaps_ms: list[float]) -> Outcome:
    end = first_s + sum(gaps_ms) / 1e3
    return Outcome(
        0, 0, 0, 1, 1, 1, 1, "ok", "", first_s, end, end, len(gaps_ms) + 1, list(gaps_ms)
    )


def test_the_cadence_counts_only_while_all_streams_run() -> None:
    alone = [2.0] * 10  # before the second one starts
    assert cadence([stream(0.0, alone + [8.0] * 20), stream(0.02, [8.0] * 20)]) == pytest.approx(
        8e-3
    )
    assert cadence([stream(0.0, [1.0] * 3), stream(5.0, [1.0] * 3)]) is None
    assert cadence([]) is None


def test_a_stock_server_needs_the_gpus_name() -> None:
    server = MeasuredServer(
        "http://x", {}, {"served_model_name": "m", "tp_size": 2, "dtype": "auto"}
    )
    with pytest.raises(ProfileFailed, match="--gpu"):
        key_of(server, {})
    assert key_of(server, {}, "H200") == Key("m", "H200", 2, "////auto")
    told = {"profile_key": {"model": "n", "gpu": "cpu", "tp": 1, "backends": ""}}
    assert key_of(server, told) == Key("n", "cpu", 1, "")


def test_an_estimate_never_shrinks_with_the_prompt() -> None:
    measuring = Measurement(MeasuredServer("http://x", {}), 10.0, print, 0)
    rows = [(0.0, 64.0, 0.01), (0.0, 1024.0, 0.1)]
    guesses = [measuring._estimate(rows, tokens) for tokens in (64, 500, 1024, 2048, 8192)]
    assert guesses == sorted(guesses)
    assert guesses[-1] >= 8 * 0.1


def measured_cells(
    budget_s: float, monkeypatch: pytest.MonkeyPatch, mode: str = "null", overhead_s: float = 0.0
) -> list[tuple[int, int]]:
    """Cells that are measured where 1,000 tokens take 0.1 s, without a server or a clock."""
    info = {"chunked_prefill_size": 4096, "max_total_num_tokens": 60_000, "context_length": 40_000}
    info |= {"disaggregation_mode": mode}
    measuring = Measurement(MeasuredServer("http://x", {}, info), budget_s, print, 0)
    spent, cells = [0.0], []

    def cell(prefix: int, new: int) -> list[tuple[float, float, float]]:
        cells.append((prefix, new))
        spent[0] += 1e-4 * (prefix + 3 * new) + overhead_s * (3 + (prefix > 0))
        return [(float(prefix), float(new), overhead_s + 1e-4 * new)]

    monkeypatch.setattr(measuring, "_send", lambda jobs: None)
    monkeypatch.setattr(measuring, "_prefill_cell", cell)
    monkeypatch.setattr(measuring, "left_s", lambda: budget_s - spent[0])
    measuring.prefill(0.0)
    assert spent[0] <= budget_s
    return cells


def test_a_short_budget_still_sees_cached_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = measured_cells(3.0, monkeypatch), measured_cells(60.0, monkeypatch)
    assert {prefix for prefix, _ in few} >= {0, 512}
    assert len(few) >= 8
    assert set(few) < set(many)
    assert max(prefix + new for prefix, new in many) <= 30_000
    assert max(new for _, new in many) == 4096


def test_what_every_step_costs_is_not_taken_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host 16 tokens take nearly as long as 256, and those are affordable all the same."""
    assert len(measured_cells(3.0, monkeypatch, overhead_s=0.03)) >= 8


def test_a_pair_sees_prefixes_in_the_chunks_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang caches no prompt of a made-up peer: whole chunks are the only prefixes there are."""
    few = measured_cells(12.0, monkeypatch, "prefill")
    many = measured_cells(60.0, monkeypatch, "prefill")
    assert {prefix for prefix, _ in few} == {0, 4096}
    assert {prefix for prefix, _ in many} == {0, 4096, 8192, 16_384}


@pytest.mark.parametrize("words", [["--url", "http://x"], ["--out", "f"], []])
def test_url_and_out_belong_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "--url and --out" in capsys.readouterr().err


def test_a_short_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--url", "http://x", "--out", "f", "--budget-s", "nan"])
    assert "--budget-s: must be at least 5" in capsys.readouterr().err


def test_kernels_say_what_is_missing_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--kernels"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name == "torch" or None)
    assert cli.main(["--kernels"]) == 1
    assert "flashinfer" in capsys.readouterr().err


def test_a_kernel_grid_must_be_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--kernels", "--batches", "1,x"])
    assert "--batches" in capsys.readouterr().err
