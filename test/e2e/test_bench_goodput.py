"""SGLang's own serving benchmark against our cluster: its goodput and our table must agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from router_counts import counted

from helpers.upstream import upstream_goodput
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.reports.bench_serving import from_bench_record
from sglang_kairos.reports.outcomes import Targets

PROMPTS = 40


@pytest.fixture(scope="module")
def cluster(zygote: Zygote, tiny_model: str, out_dir: Path) -> Iterator[Cluster]:
    """A Kairos pair and its router: what users point the benchmark at."""
    spec = ClusterSpec(model_path=tiny_model, log_dir=out_dir / "bench-goodput", zygote=zygote)
    with Cluster(spec) as running:
        yield running


def bench(url: str, model: str, out: Path, *more: str) -> dict[str, Any]:
    """Runs the benchmark and returns its record."""
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang"]
    command += ["--base-url", url, "--model", model, "--tokenizer", model]
    command += ["--dataset-name", "random-ids", "--num-prompts", str(PROMPTS)]
    command += ["--random-input-len", "600", "--random-output-len", "24"]
    command += ["--random-range-ratio", "0.2", "--request-rate", "8", "--seed", "1"]
    command += ["--warmup-requests", "0"]
    command += ["--output-file", str(out), "--output-details", "--disable-tqdm", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    return record


def test_the_table_of_a_run_agrees_with_upstreams_goodput(
    cluster: Cluster, tiny_model: str, tmp_path: Path
) -> None:
    before = counted(cluster)
    record = bench(
        cluster.url, tiny_model, tmp_path / "bench.jsonl", "--goodput", "ttft:400", "tpot:25"
    )
    cluster.check()
    seen = counted(cluster) - before
    metrics = from_bench_record(record, Targets()).metrics
    assert (metrics.sent, metrics.failed) == (PROMPTS, 0)
    # Its latency ends with the [DONE] line, ours with the last token: one request may flip.
    one = 1.01 / PROMPTS
    assert metrics.e2e_attainment == pytest.approx(record["slo_attainment"], abs=one)
    by_metric = record["slo_attainment_by_metric"]
    assert metrics.ttft_attainment == by_metric["ttft"]
    assert metrics.tpot_attainment == pytest.approx(by_metric["tpot"], abs=one)
    assert metrics.goodput_rps == pytest.approx(
        record["request_goodput"], abs=1.01 / record["duration"]
    )
    assert metrics.decode_tokens_per_s == pytest.approx(record["output_throughput"])
    assert metrics.ttft_p50_ms == pytest.approx(record["median_ttft_ms"])
    assert metrics.ttft_p99_ms == pytest.approx(record["p99_ttft_ms"])
    # The [DONE] line's delay is shared by a handful of tokens: theirs is the larger.
    assert record["p99_tpot_ms"] - 5.0 < metrics.tpot_p99_ms < record["p99_tpot_ms"] + 0.1

    # And with the router's counts, in front of which the client waits for its turn on two cores.
    assert (seen.answers(), seen.answers("200")) == (PROMPTS, PROMPTS)
    assert seen.met("ttft")[1] == seen.met("tpot")[1] == PROMPTS
    assert -1.0 < record["mean_ttft_ms"] - seen.mean_ms("ttft") < 40.0 + seen.mean_ms("ttft")

    # At targets that half of the requests miss, whatever this machine's speed.
    ttft_ms = float(sorted(record["ttfts"])[PROMPTS // 2]) * 1e3
    theirs = upstream_goodput().calculate_goodput(
        [
            SimpleNamespace(success=True, output_len=length, ttft=ttft, latency=ttft + sum(itls))
            for length, ttft, itls in zip(
                record["output_lens"], record["ttfts"], record["itls"], strict=True
            )
        ],
        {"ttft": ttft_ms, "tpot": metrics.tpot_p99_ms},
        record["duration"],
    )
    ours = from_bench_record(record, Targets(ttft_ms, metrics.tpot_p99_ms)).metrics
    assert 0.3 < ours.e2e_attainment < 0.8
    assert ours.e2e_attainment == theirs.slo_attainment
    assert ours.goodput_rps == pytest.approx(theirs.request_goodput)
