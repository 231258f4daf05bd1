"""Where a server's predictors start, and the file that keeps what they learnt."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.calibrate.server import MeasuredServer, key_of
from sglang_kairos.engine.state.latency_models import SAVE_EVERY_S, Profile
from sglang_kairos.predict.learnt_file import KERNEL_SETTINGS, Key


def scheduler(model: str = "some/model", **args: Any) -> Any:
    server_args = SimpleNamespace(model_path=model, attention_backend="torch_native", **args)
    return SimpleNamespace(server_args=server_args, device="cpu", tp_size=1)


def learnt_file(path: Path) -> float:
    """Teaches a predictor that a token costs 1 ms, saves it; returns its opinion of 100 tokens."""
    profile = Profile(scheduler(), str(path))
    prefill, _ = profile.start(None)
    for tokens in range(50, 450):
        prefill.observe([tokens], [0], 1e-3 * tokens)
    profile.keep(0.0, prefill.snapshot, lambda: None)
    profile.keep(SAVE_EVERY_S + 1, prefill.snapshot, lambda: None)
    for _ in range(200):
        if path.exists():
            break
        time.sleep(0.02)
    return prefill.step_s([100], [0])


def test_what_was_learnt_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    wanted = learnt_file(path)
    profile = Profile(scheduler(), str(path))
    prefill, _ = profile.start(None)
    assert profile.source == "file"
    assert prefill.step_s([100], [0]) == pytest.approx(wanted) == pytest.approx(0.1, rel=0.05)


def test_another_models_profile_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    learnt_file(path)
    for other in (scheduler("another/model"), scheduler(kv_cache_dtype="fp8_e4m3")):
        profile = Profile(other, str(path))
        profile.start(None)
        assert profile.source == "generic"


def test_a_damaged_file_is_named_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{not json")
    profile = Profile(scheduler(), str(path))
    with caplog.at_level(logging.WARNING):
        profile.start(None)
    assert profile.source == "generic"
    assert "profile.json" in caplog.text


def test_nothing_is_written_before_a_minute_has_passed_or_without_a_path(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for where in (str(path), ""):
        profile = Profile(scheduler(), where)
        prefill, _ = profile.start(None)
        profile.keep(0.0, prefill.snapshot, lambda: None)
        profile.keep(SAVE_EVERY_S / 2, prefill.snapshot, lambda: None)
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = Profile(scheduler(), str(tmp_path / "missing" / "profile.json"))
    prefill, _ = profile.start(None)
    with caplog.at_level(logging.WARNING):
        profile._save(prefill.snapshot(), None)
    assert "cannot be written" in caplog.text


def test_the_tool_finds_the_key_that_the_server_looks_its_profile_up_by() -> None:
    told = {
        "served_model_name": "m",
        "attention_backend": "flashinfer",
        "moe_runner_backend": "auto",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e4m3",
        "dtype": "bfloat16",
    }

    def from_outside(**changed: str) -> Key:
        return key_of(MeasuredServer("http://x", {}, {**told, **changed, "tp_size": 2}), {}, "cpu")

    server = SimpleNamespace(device="cpu", tp_size=2, server_args=SimpleNamespace(**told))
    assert Profile(server, "").key == from_outside()
    assert from_outside().backends == "flashinfer/auto/fp8/fp8_e4m3/bfloat16"
    # Whatever decides which kernels run tells two servers apart.
    for name in KERNEL_SETTINGS:
        assert from_outside(**{name: "other"}) != from_outside()
