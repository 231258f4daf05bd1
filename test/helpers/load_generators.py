"""GuideLLM, aiperf, inference-perf and SGLang's own benchmark, as a user starts them.

`requirements/load-generators-*.txt` pin the first three; ``make test-load-generators`` installs
each into an environment of its own below out/load-generators (KAIROS_LOAD_GENERATORS names another
folder).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
WITHIN_S = 280


@dataclass(frozen=True)
class Load:
    """What to send: `count` requests at `rate` per second, with these targets in ms in their bodies.

    Answers have about `output` tokens, normally distributed with `spread`, 1 to `longest`.
    """

    count: int
    rate: float
    output: int
    spread: int
    longest: int
    ttft_ms: float
    tpot_ms: float
    input: int = 200


def program(name: str) -> str:
    """The path of a load generator; skips the test where it is not installed."""
    folder = Path(os.environ.get("KAIROS_LOAD_GENERATORS") or ROOT / "out" / "load-generators")
    path = folder / name / "bin" / name
    if not path.is_file():
        pytest.skip(f"{name} is not in {folder}: make test-load-generators installs it")
    return str(path)


def run(command: list[str], folder: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:
        # Its environment is another one, in which this package is not.
        env.pop("PYTHONPATH", None)
        env.pop("HF_HUB_OFFLINE")
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def guidellm(url: str, model: str, load: Load, folder: Path) -> Path:
    backend = {
        "kind": "openai_http",
        "target": url,
        "request_format": "/v1/completions",
        "extras": {"body": {"ttft_ms": load.ttft_ms, "tpot_ms": load.tpot_ms}},
    }
    data = f"kind=synthetic_text,prompt_tokens={load.input},output_tokens={load.output}"
    data += f",output_tokens_stdev={load.spread},output_tokens_min=1"
    command = [program("guidellm"), "run", "--backend", json.dumps(backend)]
    command += ["--profile", f"kind=poisson,rate={load.rate}"]
    command += ["--constraint", f"kind=max_requests,count={load.count}"]
    command += ["--data", f"{data},output_tokens_max={load.longest}"]
    run([*command, "--output", "kind=json,path=guidellm.json"], folder)
    return folder / "guidellm.json"


def aiperf(url: str, model: str, load: Load, folder: Path) -> Path:
    command = [program("aiperf"), "profile", "--model", model, "--tokenizer", model, "--url", url]
    command += ["--endpoint-type", "completions", "--streaming", "--ui", "none"]
    command += ["--request-rate", str(load.rate), "--request-count", str(load.count)]
    command += ["--synthetic-input-tokens-mean", str(load.input)]
    command += ["--output-tokens-mean", str(load.output)]
    command += ["--output-tokens-stddev", str(load.spread), "--artifact-dir", "aiperf"]
    for extra in (f"ttft_ms:{load.ttft_ms}", f"tpot_ms:{load.tpot_ms}", "ignore_eos:true"):
        command += ["--extra-inputs", extra]
    run(command, folder)
    return folder / "aiperf" / "profile_export.jsonl"


def inference_perf(url: str, model: str, load: Load, folder: Path) -> Path:
    def lengths(mean: int, spread: int, longest: int) -> dict[str, Any]:
        normal = {"type": "normal", "min": 1, "max": longest, "mean": mean, "std_dev": spread}
        return normal | {"total_count": 2 * load.count}

    config = {
        "api": {
            "type": "completion",
            "streaming": True,
            "headers": {"x-slo-ttft-ms": str(load.ttft_ms), "x-slo-tpot-ms": str(load.tpot_ms)},
        },
        "data": {
            "type": "random",
            "input_distribution": lengths(load.input, 1, 2 * load.input),
            "output_distribution": lengths(load.output, load.spread, load.longest),
        },
        "load": {
            "type": "poisson",
            "stages": [{"rate": load.rate, "duration": round(load.count / load.rate)}],
            "num_workers": 1,
        },
        "server": {"type": "sglang", "model_name": model, "base_url": url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": model},
        "report": {
            "request_lifecycle": {
                "per_request": True,
                "per_request_fields": {"computed_metrics": True},
            }
        },
        "storage": {"local_storage": {"path": "inference-perf"}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    run([program("inference-perf"), "--config_file", "config.yaml"], folder)
    return folder / "inference-perf" / "per_request_lifecycle_metrics.json"


def bench(url: str, model: str, load: Load, folder: Path) -> Path:
    """SGLang's own. It tells of an answer that ended early only on the OpenAI endpoint."""
    backend = "sglang-oai" if load.spread >= load.output else "sglang"
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend]
    command += ["--base-url", url, "--model", model, "--tokenizer", model]
    command += ["--dataset-name", "random-ids", "--num-prompts", str(load.count)]
    command += ["--random-input-len", str(load.input), "--random-output-len", str(load.longest)]
    command += ["--random-range-ratio", "0.001", "--request-rate", str(load.rate), "--seed", "1"]
    command += ["--warmup-requests", "0", "--output-details", "--disable-tqdm"]
    command += ["--goodput", f"ttft:{load.ttft_ms}", f"tpot:{load.tpot_ms}"]
    command += ["--extra-request-body"]
    command += [json.dumps({"ttft_ms": load.ttft_ms, "tpot_ms": load.tpot_ms})]
    run([*command, "--output-file", str(folder / "bench.jsonl")], folder)
    return folder / "bench.jsonl"


TOOLS: dict[str, Callable[[str, str, Load, Path], Path]] = {
    "bench": bench,
    "guidellm": guidellm,
    "aiperf": aiperf,
    "inference-perf": inference_perf,
}
