"""Step-time laws of known (model, GPU, TP): where the predictors start before they saw a step.

One JSON format for what ships in `predict/data`, what `tools.profile` writes and what a server
learns (`cache`):
    {"format": FORMAT, "version": 1, "entries": [
        {"model": "MiniMax-M2.5", "arch": "MiniMaxM2ForCausalLM", "gpu": "H200", "tp": 4,
         "backends": "", "provenance": "...",
         "prefill": {"a_s": ..., "b_s": ..., "c_s": ..., "d_s": ..., "e_s": ...},
         "decode": {"a_s": ..., "b_s": ..., "c_s": ..., "knee_s": [..., ...]},
         "prefill_state": {...}, "decode_state": {...}}]}
All but model, gpu and tp may be missing. Laws: `prefill_time`, `step_time`; states: their snapshots.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from sglang_kairos.predict.prefill_time import NAMES, PrefillTimeModel
from sglang_kairos.predict.step_time import KNEES, StepTimeModel

FORMAT = "sglang-kairos step times"
VERSION = 1


class ProfileError(ValueError):
    """A file of step times that cannot be used; the text names the file and the field."""


@dataclass(frozen=True)
class Seed:
    """One entry of a file. Laws in seconds per unit; None: the entry has none."""

    model: str
    gpu: str
    tp: int
    arch: str = ""
    backends: str = ""
    provenance: str = ""
    prefill: tuple[float, ...] | None = None
    decode: tuple[float, float, float, tuple[float, ...]] | None = None
    prefill_state: Mapping[str, Any] | None = None
    decode_state: Mapping[str, Any] | None = None

    def prefill_model(self) -> PrefillTimeModel:
        """A new predictor that starts here; the generic one if the entry has no law."""
        return PrefillTimeModel(*self.prefill) if self.prefill else PrefillTimeModel.generic()

    def decode_model(self, captured_sizes: Sequence[int] | None = None) -> StepTimeModel:
        """A new predictor that starts here; the generic one if the entry has no law."""
        if self.decode is None:
            return StepTimeModel.generic(captured_sizes)
        a, b, c, knees = self.decode
        return StepTimeModel(a, b, c, captured_sizes, knees)


def seed_for(model_name_or_arch: str, gpu_name: str, tp: int) -> Seed | None:
    """The shipped seed of a model (name, path or architecture) on `tp` such GPUs, if there is one.

    "MiniMaxAI/MiniMax-M2.5" and "NVIDIA H200" are found like "minimax_m2.5" and "h200". A name
    goes before an architecture.
    """
    wanted, words = _plain(model_name_or_arch), _words(gpu_name)
    fitting = [seed for seed in _shipped() if seed.tp == tp and _words(seed.gpu) <= words]
    named = [seed for seed in fitting if _plain(seed.model) == wanted]
    alike = [seed for seed in fitting if seed.arch and _plain(seed.arch) == wanted]
    return next(iter(named + alike), None)


def parse(text: str | bytes, source: str) -> list[Seed]:
    """The entries of a file; ProfileError naming `source` and the field that is wrong."""
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
    """The text of a file with these entries."""
    entries = []
    for seed in seeds:
        entry: dict[str, Any] = {"model": seed.model, "gpu": seed.gpu, "tp": seed.tp}
        for name in ("arch", "backends", "provenance", "prefill_state", "decode_state"):
            if getattr(seed, name):
                entry[name] = getattr(seed, name)
        if seed.prefill is not None:
            entry["prefill"] = dict(zip(NAMES, seed.prefill, strict=True))
        if seed.decode is not None:
            a, b, c, knees = seed.decode
            entry["decode"] = {"a_s": a, "b_s": b, "c_s": c, "knee_s": list(knees)}
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
    prefill, decode = _object(raw, "prefill", at), _object(raw, "decode", at)
    return Seed(
        tp=tp,
        prefill=None if prefill is None else _prefill_law(prefill, f"{at}.prefill"),
        decode=None if decode is None else _decode_law(decode, f"{at}.decode"),
        prefill_state=_object(raw, "prefill_state", at),
        decode_state=_object(raw, "decode_state", at),
        **text,
    )


def _prefill_law(raw: dict[str, Any], at: str) -> tuple[float, ...]:
    optional = {"d_s": 0.0, "e_s": 0.0}
    return tuple(_number(raw.get(name, optional.get(name)), f"{at}.{name}") for name in NAMES)


def _decode_law(raw: dict[str, Any], at: str) -> tuple[float, float, float, tuple[float, ...]]:
    knees = raw.get("knee_s", [0.0] * len(KNEES))
    if not isinstance(knees, list) or len(knees) != len(KNEES):
        raise ProfileError(f"{at}.knee_s: must be {len(KNEES)} numbers, got {knees!r:.80}")
    a, b, c = (_number(raw.get(name), f"{at}.{name}") for name in ("a_s", "b_s", "c_s"))
    return a, b, c, tuple(_number(knee, f"{at}.knee_s") for knee in knees)


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


def _number(value: Any, at: str) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not 0.0 <= value < 1e3 or not math.isfinite(value):
        raise ProfileError(f"{at}: must be seconds from 0 to 1000, got {value!r:.80}")
    return float(value)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rsplit("/", 1)[-1].lower())


def _words(gpu: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", gpu.lower())) - {"nvidia", "amd"}
