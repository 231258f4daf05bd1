#!/usr/bin/env python3
"""Writes python/sglang_kairos/sim/hardware/data/systems.json: the simulator's built-in systems.

    pip install -e ".[tables]" && python scripts/fit_systems.py [--check]

Step times come from aiconfigurator-core (`sglang_kairos.sim.hardware.estimator`), rounded to a
microsecond. Latency models are fitted to them by `predict.*.fit`, on one grid for all models.
--check writes nothing, and fails if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sglang_kairos.predict.latency_model import PrefillLatency
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.sim.hardware.estimator import MEMORY_FRACTION, Estimator
from sglang_kairos.sim.hardware.times import captured_up_to

FILE = Path(__file__).parents[1] / "python/sglang_kairos/sim/hardware/data/systems.json"
DATABASE = "0.5.14"
CHUNK_TOKENS = 8192
PREFIXES = (0, 1024, 4096, 8192, 16384, 32768, 65536, 98304, 131072)
NEW_TOKENS = tuple(64 << i for i in range(9))
BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512)
CONTEXTS = tuple(256 << i for i in range(10))
BYTES = {"bfloat16": 2, "fp8": 1}


@dataclass(frozen=True)
class Spec:
    """A system to fit.

    `kv_bytes_of`: the KV cache's type in the sizes, when it is not that of the step times.
    `prefill_law`: a prefill latency model to keep as it is instead of fitting one.
    """

    model: str
    tp: int
    kv_cache: str = "bfloat16"
    kv_tokens: int | None = None
    kv_bytes_of: str | None = None
    prefill_law: tuple[float, ...] | None = None
    remarks: tuple[str, ...] = ()


SPECS = {
    "minimax-m2.5-h200-tp4": Spec(
        "MiniMaxAI/MiniMax-M2.5",
        4,
        "fp8",
        1_000_000,
        "bfloat16",
        # Fitted before the law had a knee (with it 1.2 %, not 2.3 %): results made with it stay
        # comparable.
        (1.9055697686809907e-2, 1.405754143434806e-5, 5.675340609602099e-10, 0.0),
        (
            "step times are with an fp8 KV cache (aiconfigurator-core's default for fp8 weights), "
            "KV sizes with a bfloat16 one; minimax-m2.5-h200-tp4-bf16kv has both alike",
        ),
    ),
    "minimax-m2.5-h200-tp4-bf16kv": Spec("MiniMaxAI/MiniMax-M2.5", 4),
    "qwen3-8b-h200-tp1": Spec(
        "Qwen/Qwen3-8B",
        1,
        remarks=("contexts beyond 40,960 tokens need YaRN; step times do not know of it",),
    ),
    "llama-3.1-70b-h200-tp4": Spec("meta-llama/Meta-Llama-3.1-70B", 4),
    "qwen3-235b-fp8-h200-tp4": Spec(
        "Qwen/Qwen3-235B-A22B-FP8",
        4,
        remarks=("contexts beyond 40,960 tokens need YaRN; step times do not know of it",),
    ),
    "deepseek-v3-h200-tp8": Spec(
        "deepseek-ai/DeepSeek-V3",
        8,
        remarks=("every rank keeps the whole latent KV; one copy of it is transferred",),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    entries = {name: entry_of(name, spec) for name, spec in SPECS.items()}
    text = json.dumps(entries, indent=1) + "\n"
    if not check:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(text)
    elif FILE.read_text() != text:
        print(f"error: {FILE} is not what this script writes", file=sys.stderr)
        return 1
    return 0


def entry_of(name: str, spec: Spec) -> dict[str, Any]:
    """One entry of the file."""
    estimator = Estimator(spec.model, spec.tp, spec.kv_cache, DATABASE)
    # SGLang v0.5.23's default on an H200 (arg_groups/memory_hook.py).
    largest = 256 if spec.tp < 4 else 512
    prefill, decode = fit_prefill(estimator, spec), fit_decode(estimator, largest)
    print(
        f"{name:30} prefill {prefill['mean_error']:.1%} (max {prefill['max_error']:.1%})  "
        f"decode {decode['mean_error']:.1%} (max {decode['max_error']:.1%})"
    )
    return {
        "model": spec.model,
        "tp": spec.tp,
        "package": estimator.package,
        "database": DATABASE,
        "kv_cache": spec.kv_cache,
        "prefill": prefill,
        "decode": decode,
        "chunk_tokens": CHUNK_TOKENS,
        "largest_captured": largest,
        **kv_sizes(estimator, spec, largest),
        "remarks": list(spec.remarks),
    }


def fit_prefill(estimator: Estimator, spec: Spec) -> dict[str, Any]:
    rows = [(p, n, round(estimator.prefill_s(n, p), 6)) for p in PREFIXES for n in NEW_TOKENS]
    kept = spec.prefill_law
    law = PrefillTimeModel.fit(rows).law if kept is None else PrefillLatency(*kept)
    errors = [abs(law.step_s(new, prefix) / seconds - 1) for prefix, new, seconds in rows]
    return described(law[:5], errors)


def fit_decode(estimator: Estimator, largest: int) -> dict[str, Any]:
    rows = [
        (size, size * each, round(estimator.decode_s(size, each), 6))
        for size in BATCHES
        for each in CONTEXTS
    ]
    model = StepTimeModel.fit(rows, captured_up_to(largest))
    errors = [abs(model.step_s(batch, tokens) / seconds - 1) for batch, tokens, seconds in rows]
    return described(model.law.terms, errors)


def described(coefficients: Sequence[float], errors: list[float]) -> dict[str, Any]:
    return {
        # Not to the last digit, which depends on the machine's linear algebra.
        "coefficients": [float(f"{value:.12g}") for value in coefficients],
        "points": len(errors),
        "mean_error": round(float(np.mean(errors)), 4),
        "max_error": round(float(np.max(errors)), 4),
    }


def kv_sizes(estimator: Estimator, spec: Spec, largest: int) -> dict[str, Any]:
    """Bytes a token from the model's config, checked against what the capacity was made with."""
    of = spec.kv_bytes_of or spec.kv_cache
    kv_bytes, text, sharded = kv_bytes_of(config_of(spec.model), BYTES[of])
    sizes = {"kv_bytes": kv_bytes, "kv_bytes_from": f"{text}, {of}"}
    if spec.kv_tokens is not None:
        return {"kv_tokens": spec.kv_tokens, "kv_tokens_from": "assumed", **sizes}
    capacity = estimator.kv_capacity(CHUNK_TOKENS, largest)
    per_gpu = capacity["kv_size_per_token_bytes"]
    if per_gpu * (spec.tp if sharded else 1) != kv_bytes:
        raise ValueError(f"{spec.model}: {kv_bytes} bytes a token, estimate_kv_cache has {per_gpu}")
    used = capacity["memory_breakdown"]
    gb = {key.removesuffix("_bytes"): value / 1e9 for key, value in used.items()}
    total = capacity["total_gpu_capacity_bytes"]
    return {
        "kv_tokens": int(capacity["total_kv_size_tokens"]),
        "kv_tokens_from": (
            f"{estimator.package}, estimate_kv_cache: a GPU's {MEMORY_FRACTION:g} x "
            f"{total / 1e9:.1f} GB less {gb['weights']:.1f} weights, {gb['activations']:.1f} "
            f"activations, {gb['runtime_overhead']:.1f} runtime and {gb['comm_overhead']:.1f} NCCL"
        ),
        **sizes,
    }


def config_of(model: str) -> dict[str, Any]:
    """The model's config.json as aiconfigurator-core carries it."""
    name = f"{model.replace('/', '--')}_config.json"
    path = files("aiconfigurator_core").joinpath("model_configs", name)
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config


def kv_bytes_of(config: dict[str, Any], each: int) -> tuple[int, str, bool]:
    """Bytes of KV a token over all layers, in words, and whether ranks share them (MLA: no)."""
    layers = config["num_hidden_layers"]
    if "kv_lora_rank" in config:
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        return layers * width * each, f"{layers} layers x {width} (MLA) x {each} bytes", False
    heads = config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    text = f"{layers} layers x 2 x {heads} KV heads x {width} x {each} bytes"
    return layers * 2 * heads * width * each, text, True


if __name__ == "__main__":
    sys.exit(main())
