"""`tools.profile` on real servers: each part of a pair, then a unified server started from the file."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pd_client import trouble_in

from sglang_kairos.cluster import Cluster, ClusterSpec
from sglang_kairos.cluster_layout import PortBook
from sglang_kairos.cpu.flags import with_server_flags
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.predict.cache import Key, load_profile
from sglang_kairos.tools import profile

BUDGET_S = 6


def kairos_of(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url + "/server_info", timeout=30) as answer:
        report: dict[str, Any] = json.load(answer)["internal_states"][0]["kairos"]
    return report


def profiled(url: str, out: Path) -> dict[str, list[Any]]:
    """Runs the tool as a person would; the rows it measured."""
    rows = out.with_suffix(".rows.json")
    words = ["--url", url, "--out", str(out), "--rows", str(rows), "--budget-s", str(BUDGET_S)]
    begun = time.monotonic()
    assert profile.main([*words, "--seed", "1"]) == 0
    assert time.monotonic() - begun < 4 * BUDGET_S
    measured: dict[str, list[Any]] = json.loads(rows.read_text())
    return measured


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
        prefill = profiled(cluster.prefill_urls[0], out)
        decode = profiled(cluster.decode_urls[0], out)
        key = Key(**kairos_of(cluster.decode_urls[0])["profile_key"])
        assert not trouble_in(cluster.logs)
    assert prefill["source"] == decode["source"] == "the server's own steps"
    assert not prefill["decode"] and not decode["prefill"]
    assert {cached for cached, *_ in prefill["prefill"]} - {0}, "nothing ran behind a prefix"
    assert max(batch for batch, *_ in decode["decode"]) >= 8

    seed = load_profile(out, key)
    assert seed is not None
    model, steps = seed.prefill_model(), seed.decode_model()
    off = [model.step_s([n], [cached]) / s - 1 for cached, n, s in prefill["prefill"]]
    assert np.median(np.abs(off)) < 0.5
    off = [steps.step_s(int(b), tokens) / s - 1 for b, tokens, s in decode["decode"]]
    assert np.median(np.abs(off)) < 0.5

    port = PortBook().take().http
    argv = ["--model-path", tiny_model, "--host", "127.0.0.1", "--port", str(port)]
    argv = with_server_flags([*argv, "--kairos-profile", str(out)], fast_start=True)
    server = zygote.start("sglang_kairos.launch_server", argv, log=logs / "unified.log")
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        assert kairos_of(url)["profile"] == "file"
        unified = profiled(url, tmp_path / "unified.json")
    finally:
        server.stop()
    assert unified["source"] == "HTTP times"
    assert len(unified["prefill"]) >= 8 and len(unified["decode"]) >= 8


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
    assert profile.main(["--url", url, "--out", str(tmp_path / "x.json")]) == 1
    assert url in capsys.readouterr().err
