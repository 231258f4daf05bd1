"""Latency models of known (model, GPU, TP): where predictors start before they saw a step.

One JSON format serves what ships in `predict/data`, what `calibrate.cli` writes and what a server
learns (`learnt_file`). All but model, gpu and tp may be missing:

    {"format": FORMAT, "version": 1, "entries": [
        {"model": "MiniMax-M2.5", "arch": "MiniMaxM2ForCausalLM", "gpu": "H200", "tp": 4,
         "backends": "", "provenance": "...",
         "prefill": {"a_s": ..., "b_s": ..., "c_s": ..., "d_s": ..., "e_s": ..., "knee": ...},
         "decode": {"a_s": ..., "b_s": ..., "c_s": ..., "knees": [[..., ...], [..., ...]]},
         "prefill_state": {...}, "decode_state": {...}}]}

`latency_model` has the coefficients; states are the predictors' snapshots.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from sglang_kairos.predict.latency_model import GENERIC_DECODE, DecodeLatency, PrefillLatency
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel

FORMAT = "sglang-kairos step times"
VERSION = 1

Law = TypeVar("Law")


class ProfileError(ValueError):
    """A file of step times cannot be used; the message names the file and the field."""


@dataclass(frozen=True)
class Seed:
    """One entry of a file; None where it has no such latency model or state."""

    model: str
    gpu: str
    tp: int
    arch: str = ""
    backends: str = ""
    provenance: str = ""
    prefill: PrefillLatency | None = None
    decode: DecodeLatency | None = None
    prefill_state: Mapping[str, Any] | None = None
    decode_state: Mapping[str, Any] | None = None

    def prefill_model(self) -> PrefillTimeModel:
        """Returns a new predictor that starts here; the generic one if the entry has no model."""
        return PrefillTimeModel(*self.prefill) if self.prefill else PrefillTimeModel.generic()

    def decode_model(self, captured_sizes: Sequence[int] | None = None) -> StepTimeModel:
        """Returns a new predictor that starts here; the generic one if the entry has no model."""
        return StepTimeModel.of(self.decode or GENERIC_DECODE, captured_sizes)


def seed_for(model_name_or_arch: str, gpu_name: str, tp: int) -> Seed | None:
    """Returns the shipped entry of a model (name, path or architecture) on `tp` such GPUs, or None.

    "MiniMaxAI/MiniMax-M2.5" and "NVIDIA H200" are found like "minimax_m2.5" and "h200". A name goes
    before an architecture.
    """
    wanted, words = _plain(model_name_or_arch), _words(gpu_name)
    fitting = [seed for seed in _shipped() if seed.tp == tp and _words(seed.gpu) <= words]
    named = [seed for seed in fitting if _plain(seed.model) == wanted]
    alike = [seed for seed in fitting if seed.arch and _plain(seed.arch) == wanted]
    return next(iter(named + alike), None)


def parse(text: str | bytes, source: str) -> list[Seed]:
    """Returns the entries of a file. Raises ProfileError naming `source` and the wrong field."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"{source}: is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProfileError(f"{source}: format: must be {FORMAT!r}: not a file of step times")
    if data.get("version") != VERSION:
        raise ProfileError(f"{source}: version: must be {VERSION}, got {data.get('version')!r}")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise ProfileError(f"{source}: entries: must be a list")
    return [_seed(entry, f"{source}: entries[{index}]") for index, entry in enumerate(entries)]


def dump(seeds: Sequence[Seed]) -> str:
    """Returns the text of a file with these entries."""
    entries = []
    for seed in seeds:
        entry: dict[str, Any] = {"model": seed.model, "gpu": seed.gpu, "tp": seed.tp}
        for name in ("arch", "backends", "provenance", "prefill_state", "decode_state"):
            if getattr(seed, name):
                entry[name] = getattr(seed, name)
        for name, law in (("prefill", seed.prefill), ("decode", seed.decode)):
            if law is not None:
                entry[name] = law.to_json()
        entries.append(entry)
    by_hand = not any("_state" in name for entry in entries for name in entry)
    data = {"format": FORMAT, "version": VERSION, "entries": entries}
    return json.dumps(data, indent=1 if by_hand else None) + "\n"


@functools.cache
def _shipped() -> tuple[Seed, ...]:
    folder = resources.files("sglang_kairos.predict").joinpath("data")
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return tuple(
        seed
        for file in files
        if file.name.endswith(".json")
        for seed in parse(file.read_bytes(), file.name)
    )


def _seed(raw: Any, at: str) -> Seed:
    if not isinstance(raw, dict):
        raise ProfileError(f"{at}: must be an object")
    text = {
        name: _text(raw, name, at) for name in ("model", "gpu", "arch", "backends", "provenance")
    }
    for name in ("model", "gpu"):
        if not text[name]:
            raise ProfileError(f"{at}.{name}: must not be empty")
    tp = raw.get("tp")
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise ProfileError(f"{at}.tp: must be a whole number of at least 1, got {tp!r}")
    return Seed(
        tp=tp,
        prefill=_law(raw, "prefill", at, PrefillLatency.from_json),
        decode=_law(raw, "decode", at, DecodeLatency.from_json),
        prefill_state=_object(raw, "prefill_state", at),
        decode_state=_object(raw, "decode_state", at),
        **text,
    )


def _law(
    raw: dict[str, Any], name: str, at: str, read: Callable[[Mapping[str, Any]], Law]
) -> Law | None:
    found = _object(raw, name, at)
    try:
        return None if found is None else read(found)
    except ValueError as error:
        raise ProfileError(f"{at}.{name}.{error}") from None


def _text(raw: dict[str, Any], name: str, at: str) -> str:
    value = raw.get(name, "")
    if not isinstance(value, str):
        raise ProfileError(f"{at}.{name}: must be text, got {value!r:.80}")
    return value


def _object(raw: dict[str, Any], name: str, at: str) -> dict[str, Any] | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
        raise ProfileError(f"{at}.{name}: must be an object, got {value!r:.80}")
    return value


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rsplit("/", 1)[-1].lower())


def _words(gpu: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", gpu.lower())) - {"nvidia", "amd"}
