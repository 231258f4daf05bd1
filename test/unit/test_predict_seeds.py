"""Shipped step-time laws, and the file in which a server keeps what it learnt."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.predict.learnt_file import Key, load_profile, resume, save_profile
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.predict.shipped_models import FORMAT, ProfileError, Seed, dump, parse, seed_for

KEY = Key("m", "NVIDIA H200", 4, "fa3")


@pytest.mark.parametrize(
    "name",
    ["MiniMax-M2.5", "MiniMaxAI/MiniMax-M2.5", "/models/minimax_m2.5/", "MiniMaxM2ForCausalLM"],
)
@pytest.mark.parametrize("gpu", ["H200", "NVIDIA H200", "nvidia h200 SXM"])
def test_a_model_is_found_by_name_path_or_architecture(name: str, gpu: str) -> None:
    seed = seed_for(name, gpu, 4)
    assert seed is not None and seed.model == "MiniMax-M2.5" and seed.provenance
    assert 0.01 < seed.prefill_model().step_s(64, 0) < 0.03
    assert 0.002 < seed.decode_model([1, 2, 4]).step_s(1, 256.0) < 0.01


@pytest.mark.parametrize(
    ("name", "gpu", "tp"),
    [
        ("MiniMax-M2.5", "H200", 8),
        ("MiniMax-M2.5", "NVIDIA H20", 4),
        ("MiniMax-M2.5", "NVIDIA H100 80GB HBM3", 4),
        ("MiniMax", "H200", 4),
        ("", "H200", 4),
        ("MiniMax-M2.5", "", 4),
    ],
)
def test_what_is_not_known_has_no_seed(name: str, gpu: str, tp: int) -> None:
    assert seed_for(name, gpu, tp) is None


def test_an_entry_without_laws_starts_from_the_generic_guess() -> None:
    seed = Seed("m", "g", 1)
    assert seed.prefill_model().law == PrefillTimeModel.generic().law
    assert seed.decode_model().law == StepTimeModel.generic().law


def test_a_file_is_read_back_as_it_was_written() -> None:
    prefill, decode = (
        PrefillLatency(1.0, 2.0, 3.0, 0.0, 4.0),
        DecodeLatency.of((1.0, 2.0, 4.0, 5.0, 3.0)),
    )
    seed = Seed("m", "g", 2, "A", "b", "p", prefill, decode, {"x": 1})
    assert parse(dump([seed, Seed("n", "g", 1)]), "f") == [seed, Seed("n", "g", 1)]


def entry(**changes: Any) -> str:
    raw = {"model": "m", "gpu": "g", "tp": 1, **changes}
    return json.dumps({"format": FORMAT, "version": 1, "entries": [raw]})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "f: is not JSON"),
        ("[]", "f: format: must be"),
        ('{"format": "other"}', "f: format: must be"),
        (json.dumps({"format": FORMAT, "version": 2}), "f: version: must be 1, got 2"),
        (json.dumps({"format": FORMAT, "version": 1}), "f: entries: must be a list"),
        (entry(model=""), r"entries\[0\].model: must not be empty"),
        (entry(gpu=5), r"entries\[0\].gpu: must be text, got 5"),
        (entry(tp=0), r"entries\[0\].tp: must be a whole number of at least 1, got 0"),
        (entry(tp=True), r"entries\[0\].tp"),
        (entry(prefill=[1]), r"entries\[0\].prefill: must be an object"),
        (entry(prefill={"a_s": 1, "b_s": 1}), r"entries\[0\].prefill.c_s: must be seconds"),
        (entry(prefill={"a_s": -1, "b_s": 1, "c_s": 1}), r"prefill.a_s: .* got -1"),
        (entry(decode={"a_s": 1, "b_s": 1, "c_s": float("nan")}), r"decode.c_s: .* got nan"),
        (entry(decode={"a_s": 1, "b_s": 1, "c_s": 1, "knee_s": [1]}), "knee_s: must be 2 numbers"),
        (entry(decode_state=3), r"entries\[0\].decode_state: must be an object"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_field(text: str, error: str) -> None:
    with pytest.raises(ProfileError, match=error):
        parse(text, "f")


def learnt() -> tuple[PrefillTimeModel, StepTimeModel]:
    prefill, decode = PrefillTimeModel.generic(), StepTimeModel.generic([1, 2, 4, 8])
    for step in range(1, 40):
        prefill.observe(100 * step, 50, 0.02 + 1e-5 * 100 * step)
        decode.observe(1 + step % 8, 100.0 * step, 0.004 + 1e-4 * (step % 8))
    return prefill, decode


def test_what_was_learnt_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert load_profile(path, KEY) is None, "the first start has no file yet"
    prefill, decode = learnt()
    save_profile(path, KEY, prefill_state=prefill.snapshot())
    save_profile(path, KEY, decode_state=decode.snapshot())
    found = load_profile(path, KEY)
    assert found is not None
    again, more = PrefillTimeModel.generic(), StepTimeModel.generic([1, 2, 4, 8])
    resume(found, again, more)
    assert again.step_s(512, 0) == pytest.approx(prefill.step_s(512, 0))
    assert more.step_s(3, 900.0) == pytest.approx(decode.step_s(3, 900.0))
    assert os.listdir(tmp_path) == ["profile.json"]


@pytest.mark.parametrize(
    "other",
    [
        Key("n", "NVIDIA H200", 4, "fa3"),
        Key("m", "NVIDIA H100", 4, "fa3"),
        Key("m", "NVIDIA H200", 8, "fa3"),
        Key("m", "NVIDIA H200", 4, "triton"),
    ],
)
def test_another_machines_file_is_not_used_and_its_entry_is_kept(
    tmp_path: Path, other: Key
) -> None:
    path, (prefill, _) = tmp_path / "profile.json", learnt()
    save_profile(path, KEY, prefill_state=prefill.snapshot())
    assert load_profile(path, other) is None
    save_profile(path, other, prefill_state=prefill.snapshot())
    assert load_profile(path, KEY) is not None and load_profile(path, other) is not None


def test_a_damaged_file_is_refused_when_read_and_replaced_when_written(tmp_path: Path) -> None:
    path, (prefill, _) = tmp_path / "profile.json", learnt()
    path.write_bytes(b"\xff\x00 not JSON")
    with pytest.raises(ProfileError, match=r"profile\.json: is not JSON"):
        load_profile(path, KEY)
    save_profile(path, KEY, prefill_state=prefill.snapshot())
    assert load_profile(path, KEY) is not None


def test_an_unreadable_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(tmp_path, KEY)


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (prefill, decode) = tmp_path / "profile.json", learnt()
    save_profile(path, KEY, prefill_state=prefill.snapshot())
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_profile(path, KEY, decode_state=decode.snapshot())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["profile.json"]


def test_a_state_that_does_not_fit_is_named_and_the_predictor_stays(tmp_path: Path) -> None:
    _, decode = learnt()
    seed = Seed("m", "g", 1, decode_state=decode.snapshot())
    other = StepTimeModel.generic([1, 2, 4])
    with pytest.raises(ProfileError, match=r"decode_state\.batches: not the captured sizes"):
        resume(seed, decode=other)
    assert other.step_s(3, 900.0) == StepTimeModel.generic([1, 2, 4]).step_s(3, 900.0)
    with pytest.raises(ProfileError, match=r"prefill_state\.kind"):
        resume(Seed("m", "g", 1, prefill_state=decode.snapshot()), PrefillTimeModel.generic())
