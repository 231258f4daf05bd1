"""`calibrate.cli` on real servers: each part of a pair, then a unified server started from the file."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pd_client import trouble_in

from sglang_kairos.calibrate import cli
from sglang_kairos.cluster.layout import PortBook
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.cpu.flags import with_server_flags
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.predict.learnt_file import Key, load_profile

BUDGET_S, MOST_S = 6, 48


def kairos_of(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url + "/server_info", timeout=30) as answer:
        report: dict[str, Any] = json.load(answer)["internal_states"][0]["kairos"]
    return report


def profiled(
    url: str, out: Path, enough: Callable[[dict[str, list[Any]]], bool]
) -> dict[str, list[Any]]:
    """Runs the tool as a person would, on a slow host with a larger budget; the rows it measured."""
    rows = out.with_suffix(".rows.json")
    budget_s = BUDGET_S
    while True:
        words = ["--url", url, "--out", str(out), "--rows", str(rows), "--budget-s", str(budget_s)]
        begun = time.monotonic()
        status = cli.main([*words, "--seed", "1"])
        assert time.monotonic() - begun < 4 * budget_s
        if status == 0:
            measured: dict[str, list[Any]] = json.loads(rows.read_text())
            if enough(measured):
                return measured
        assert budget_s < MOST_S, f"budget of {budget_s} s, status {status}: too few cells"
        budget_s *= 2


def behind_a_prefix(rows: dict[str, list[Any]]) -> bool:
    return any(cached for cached, *_ in rows["prefill"])


def at_batch_8(rows: dict[str, list[Any]]) -> bool:
    return max((batch for batch, *_ in rows["decode"]), default=0) >= 8


def of_both(rows: dict[str, list[Any]]) -> bool:
    return min(len(rows["prefill"]), len(rows["decode"])) >= 8


def test_a_pair_is_profiled_into_one_file_that_servers_start_from(
    zygote: Zygote, tiny_model: str, out_dir: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "steps.json", out_dir / "profile"
    # Small chunks: a prefix, which is what the chunks before leave, fits any host's budget.
    chunks = ("--chunked-prefill-size", "512")
    spec = ClusterSpec(
        model_path=tiny_model, router="none", zygote=zygote, log_dir=logs, server_args=chunks
    )
    with Cluster(spec) as cluster:
        prefill = profiled(cluster.prefill_urls[0], out, behind_a_prefix)
        decode = profiled(cluster.decode_urls[0], out, at_batch_8)
        key = Key(**kairos_of(cluster.decode_urls[0])["latency_model_key"])
        assert not trouble_in(cluster.logs)
    assert prefill["source"] == decode["source"] == "the server's own steps"
    assert not prefill["decode"] and not decode["prefill"]

    seed = load_profile(out, key)
    assert seed is not None
    model, steps = seed.prefill_model(), seed.decode_model()
    off = [model.step_s([n], [cached]) / s - 1 for cached, n, s in prefill["prefill"]]
    assert np.median(np.abs(off)) < 0.5
    off = [steps.step_s(int(b), tokens) / s - 1 for b, tokens, s in decode["decode"]]
    assert np.median(np.abs(off)) < 0.5

    port = PortBook().take().http
    argv = ["--model-path", tiny_model, "--host", "127.0.0.1", "--port", str(port)]
    argv = with_server_flags([*argv, "--kairos-latency-model", str(out)], fast_start=True)
    server = zygote.start("sglang_kairos.launch_server", argv, log=logs / "unified.log")
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        assert kairos_of(url)["latency_model"] == "file"
        unified = profiled(url, tmp_path / "unified.json", of_both)
    finally:
        server.stop()
    assert unified["source"] == "HTTP times"


def wait_for(url: str, server: Any) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None and time.monotonic() < deadline
        try:
            with urllib.request.urlopen(url + "/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)


def test_a_server_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    port = PortBook().take().http
    url = f"http://127.0.0.1:{port}"
    assert cli.main(["--url", url, "--out", str(tmp_path / "x.json")]) == 1
    assert url in capsys.readouterr().err
