"""Model folders without weights: an 8B shape to be served with ``--load-format dummy``.

The compute and the KV have the real sizes; the tokens mean nothing. Facts of the shapes are those of
the models' published configurations. The tokenizer is the tiny model's: prompts are token ids.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sglang_kairos.cpu.tiny_model import TinyModel, make_tiny_model

_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "intermediate_size": 12_288,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
    },
    "llama-3.1-8b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
    },
}
# Large enough for the head size of real models, small enough to write in seconds.
IDENTITY = TinyModel(layers=4, hidden=1024, heads=8, vocab=4096)


def write_shape(folder: Path, name: str, layers: int | None = None) -> Path:
    """`folder`/NAME with config and tokenizer, no weights; `layers` instead of all. Returns it."""
    target = folder / (name if layers is None else f"{name}-{layers}-layers")
    target.mkdir(parents=True, exist_ok=True)
    config = dict(SHAPES[name])
    if layers is not None:
        config["num_hidden_layers"] = layers
    tiny = make_tiny_model(folder / "tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / file, target / file)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return target
