"""LoRA adapters while Kairos parks: every answer is stock SGLang's. Slow: needs a zygote of its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import Rows, difference, send
from pd_client import PdClient, again_if_stock_lost_one, trouble_in
from safetensors.numpy import save_file

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.tiny_model import TinyModel
from sglang_kairos.cpu.zygote import Zygote

pytestmark = pytest.mark.slow

RANK = 4
RANDOM = {"chaos_seed": 22}
ADAPTERS = ("", "one", "two")


def make_adapter(folder: Path, seed: int) -> Path:
    """A random adapter, in PEFT's format, of all attention projections of the tiny model."""
    folder.mkdir()
    shape, random_ = TinyModel(), np.random.RandomState(seed)
    narrow = shape.hidden // shape.heads * shape.kv_heads
    widths = {"q_proj": shape.hidden, "k_proj": narrow, "v_proj": narrow, "o_proj": shape.hidden}
    weights = {}
    for layer in range(shape.layers):
        for name, width in widths.items():
            base = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = random_.standard_normal((RANK, shape.hidden)) / shape.hidden**0.5
            weights[f"{base}.lora_A.weight"] = down.astype(np.float32)
            up = random_.standard_normal((width, RANK))
            weights[f"{base}.lora_B.weight"] = up.astype(np.float32)
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(widths),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def timed_bodies(per_adapter: int = 12) -> list[tuple[float, dict[str, Any]]]:
    """The same prompts for each adapter, "" for none, over a second and a half."""
    rng = random.Random(5)
    prompts = [
        [rng.randrange(10, 500) for _ in range(rng.randrange(8, 200))] for _ in range(per_adapter)
    ]
    return [
        (
            rng.uniform(0.0, 1.5),
            {
                "input_ids": prompt,
                "sampling_params": {"temperature": 0, "max_new_tokens": 40},
                **({"lora_path": adapter} if adapter else {}),
            },
        )
        for adapter in ADAPTERS
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def pageable_zygote() -> Iterator[Zygote]:
    """Forks servers whose LoRA backend does without pinned memory."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    preload = ["pageable", "sglang_kairos.launch_router"]
    with Zygote(preload=preload, env={"PYTHONPATH": path}) as started:
        yield started


def test_answers_with_and_without_adapters_are_stocks(
    pageable_zygote: Zygote, tiny_model: str, tmp_path: Path, out_dir: Path
) -> None:
    folders = [make_adapter(tmp_path / name, seed) for seed, name in enumerate(ADAPTERS[1:])]
    args = ["--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", "3"]
    args += ["--lora-paths", *(f"{folder.name}={folder}" for folder in folders)]
    bodies = timed_bodies()

    def run(kairos: bool | dict[str, Any], name: str) -> tuple[list[Rows], dict[str, Any]]:
        spec = ClusterSpec(
            model_path=tiny_model,
            kairos=kairos,
            server_args=args,
            zygote=pageable_zygote,
            log_dir=out_dir / name,
        )
        with Cluster(spec) as cluster:
            replies = asyncio.run(send(cluster.url, bodies))
            client = PdClient(cluster)
            assert client.settles()
            assert not trouble_in(cluster.logs)
            return [rows for rows, _ in replies], client.kairos()[1].get("counters", {})

    stock, _ = again_if_stock_lost_one(out_dir / "lora-stock", lambda: run(False, "lora-stock"))
    packed, counters = run(RANDOM, "lora-kairos")
    assert counters["subset_steps"] >= 20 and counters["parked"] >= 40, counters
    for got, want in zip(packed, stock, strict=True):
        assert not difference(got[0], want[0])
    texts = [rows[0]["text"] for rows in stock]
    third = len(texts) // 3
    assert len(set(texts)) == len(texts), "an adapter must change what it is asked"
    assert all(len({*texts[i::third]}) == 3 for i in range(third))
