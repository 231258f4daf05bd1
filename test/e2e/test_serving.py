"""Serving through router, prefill and decode: SLOs on every path, errors, clients that leave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pd_client import trouble_in
from slo_load import Exported, clients_count, in_one_piece, mixed_jobs, send

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.flags import with_server_flags
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.engine.state.metrics import EVERY_S


@pytest.fixture(scope="module")
def cluster(
    zygote: Zygote, tiny_model: str, out_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """One prefill and one decode server with Kairos on, behind Kairos' router, an API key set."""
    classes = tmp_path_factory.mktemp("slo") / "classes.json"
    classes.write_text(json.dumps({"chat": {"ttft_ms": 700, "tpot_ms": 35, "weight": 2}}))
    settings = {"slo_classes": str(classes), "ttft_ms": 4321, "tpot_ms": 210}

    def own_metrics() -> dict[str, str]:
        return {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics"))}

    spec = ClusterSpec(
        model_path=tiny_model,
        kairos=settings,
        server_args=("--api-key", "secret", "--enable-metrics"),
        router_args=tuple(_flags(settings)),
        env={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"},
        prefill_env=own_metrics(),
        decode_env=own_metrics(),
        log_dir=out_dir / "serving",
        zygote=zygote,
    )
    with Cluster(spec) as running:
        yield running


def _flags(settings: dict[str, Any]) -> list[str]:
    pairs = [("--kairos-" + name.replace("_", "-"), str(v)) for name, v in settings.items()]
    return [word for pair in pairs for word in pair]


def post(url: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode(),
        headers={
            "content-type": "application/json",
            "authorization": "Bearer secret",
            **(headers or {}),
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def kairos_of(base: str) -> dict[str, Any]:
    """A server's own report."""
    request = urllib.request.Request(
        base + "/server_info", headers={"authorization": "Bearer secret"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.load(answer)["internal_states"][0]["kairos"]
        return found


def last_seen(cluster: Cluster) -> list[dict[str, Any]]:
    """The SLO of the last request as the prefill and the decode scheduler saw it."""
    bases = (cluster.prefill_urls[0], cluster.decode_urls[0])
    return [kairos_of(base)["last_request"] for base in bases]


def leave_in_the_middle(base: str) -> None:
    """A client that goes away after its first token."""
    body = {"text": "Go on", "stream": True, "sampling_params": {"max_new_tokens": 20_000}}
    request = urllib.request.Request(
        base + "/generate",
        data=json.dumps(body).encode(),
        headers={"authorization": "Bearer secret", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline().startswith(b"data: ")


def native(**more: Any) -> dict[str, Any]:
    return {"text": "Once upon", "sampling_params": {"max_new_tokens": 8}, **more}


PATHS = {
    "/generate": native(),
    "/v1/completions": {"model": "m", "prompt": "Once upon", "max_tokens": 8},
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": "Once"}],
        "max_tokens": 8,
    },
}


@pytest.mark.parametrize("path", PATHS)
def test_the_body_sets_the_slo_on_both_schedulers(cluster: Cluster, path: str) -> None:
    status, text = post(cluster.url + path, {**PATHS[path], "ttft_ms": 900, "tpot_ms": 45.5})
    assert status == 200, text
    for seen in last_seen(cluster):
        assert (seen["ttft_ms"], seen["tpot_ms"]) == (900, 45.5)
        assert 0 <= seen["age_ms"] < 5000


@pytest.mark.parametrize("path", PATHS)
def test_headers_and_classes_set_it_and_the_rest_is_the_default(
    cluster: Cluster, path: str
) -> None:
    assert post(cluster.url + path, PATHS[path], {"x-slo-ttft-ms": "800"})[0] == 200
    assert [(s["ttft_ms"], s["tpot_ms"]) for s in last_seen(cluster)] == [(800, 210)] * 2
    headers = {"x-dynamo-slo-ttft-ms": "801", "x-slo-tpot-ms": "33"}
    assert post(cluster.url + path, PATHS[path], headers)[0] == 200
    assert [(s["ttft_ms"], s["tpot_ms"]) for s in last_seen(cluster)] == [(801, 33)] * 2
    assert post(cluster.url + path, {**PATHS[path], "slo_class": "chat"})[0] == 200
    for seen in last_seen(cluster):
        assert (seen["name"], seen["ttft_ms"], seen["tpot_ms"]) == ("chat", 700, 35)
        assert seen["weight"] == 2
    assert post(cluster.url + path, PATHS[path])[0] == 200
    assert [(s["ttft_ms"], s["tpot_ms"]) for s in last_seen(cluster)] == [(4321, 210)] * 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("ttft_ms", -1), ("tpot_ms", "fast"), ("ttft_ms", 1e12), ("slo_class", "x")],
)
def test_a_bad_slo_is_a_400_that_names_it_at_router_and_servers(
    cluster: Cluster, path: str, field: str, value: Any
) -> None:
    for base in (cluster.url, cluster.prefill_urls[0], cluster.decode_urls[0]):
        status, text = post(base + path, {**PATHS[path], field: value})
        assert status == 400
        assert field in text.decode()
    nan = json.dumps(PATHS[path])[:-1] + ', "ttft_ms": NaN}'
    request = urllib.request.Request(
        cluster.url + path, data=nan.encode(), headers={"authorization": "Bearer secret"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 400


def test_servers_and_router_count_headers_that_were_not_taken_as_written(cluster: Cluster) -> None:
    """Straight at a server SGLang then refuses the request, which names no bootstrap room."""
    odd = {"x-slo-ttft-ms": "0", "x-llm-d-slo-tpot-ms": "default", "x-request-start": "t=1"}
    assert post(cluster.url + "/generate", native(), odd)[0] == 200
    post(cluster.decode_urls[0] + "/generate", native(), odd)
    for base in (cluster.url, cluster.decode_urls[0]):
        request = urllib.request.Request(
            base + "/metrics", headers={"authorization": "Bearer secret"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            lines = re.findall(r"slo_headers_adjusted_total{(.*)} 1.0", answer.read().decode())
        told = {frozenset(re.findall(r'(?:action|header)="([^"]+)"', line)) for line in lines}
        assert told == {
            frozenset(("x-slo-ttft-ms", "clamped")),
            frozenset(("x-llm-d-slo-tpot-ms", "ignored")),
            frozenset(("x-request-start", "ignored")),
        }


def test_the_openai_client_streams_with_an_slo_in_extra_body(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="secret")
    stream = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Tell me"}],
        max_tokens=20,
        stream=True,
        extra_body={"ttft_ms": 950, "tpot_ms": 60},
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len([piece for piece in pieces if piece]) >= 5
    assert [seen["ttft_ms"] for seen in last_seen(cluster)] == [950, 950]
    with pytest.raises(openai.BadRequestError, match="ttft_ms"):
        client.completions.create(model="m", prompt="x", extra_body={"ttft_ms": -1})


def test_curl_streams_token_by_token(cluster: Cluster) -> None:
    body = native(stream=True, ttft_ms=1000)
    command = ["curl", "-sN", cluster.url + "/generate", "-d", json.dumps(body)]
    command += ["-H", "content-type: application/json", "-H", "authorization: Bearer secret"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    events = [line for line in run.stdout.splitlines() if line.startswith("data: ")]
    assert len(events) >= 5
    assert events[-1] == "data: [DONE]"


def test_a_wrong_key_is_refused_by_the_server_behind_the_router(cluster: Cluster) -> None:
    status, _ = post(cluster.url + "/generate", native(), {"authorization": "Bearer wrong"})
    assert status == 401


def test_a_client_that_leaves_ends_its_request_on_both_servers(cluster: Cluster) -> None:
    leave_in_the_middle(cluster.url)
    deadline = time.monotonic() + 30
    for base in (cluster.prefill_urls[0], cluster.decode_urls[0]):
        while post(base + "/flush_cache", {})[0] != 200:
            assert time.monotonic() < deadline, f"{base} still holds the request"
            time.sleep(0.5)
    assert not trouble_in(cluster.logs)


@pytest.mark.parametrize("straight", [False, True], ids=["router", "straight"])
def test_the_servers_count_what_their_client_counts(cluster: Cluster, straight: bool) -> None:
    """Within one request by target, class and verdict; and who was aborted is told apart."""
    urls = cluster.prefill_urls[0], cluster.decode_urls[0]
    before = [Exported(url) for url in urls]
    port = cluster.bootstrap_ports[0] if straight else None
    jobs, classes = mixed_jobs(60, seed=5 + straight, bootstrap_port=port)
    outcomes = send(cluster, jobs, straight=straight)
    leave_in_the_middle(cluster.url)
    deadline = time.monotonic() + 30
    while True:
        now = [Exported(url) for url in urls]
        over = [sum((a.outcomes - b.outcomes).values()) for a, b in zip(now, before, strict=True)]
        if over == [61, 61]:
            break
        assert time.monotonic() < deadline, over
        time.sleep(0.2)
    prefill, decode = (a.slo - b.slo for a, b in zip(now, before, strict=True))
    counted = clients_count(outcomes, classes)
    assert {target for target, _, _ in decode} == {"ttft", "tpot", "both"}
    for row in counted | decode:
        unsure = in_one_piece(outcomes) if row[0] != "ttft" else 0
        assert abs(counted[row] - decode[row]) <= 1 + unsure, (row, counted[row], decode[row])
    ended = [a.outcomes - b.outcomes for a, b in zip(now, before, strict=True)]
    assert ended[1] == {("served",): 60, ("aborted",): 1}
    assert {target for target, _, _ in prefill} == {"ttft"}
    assert sum(prefill.values()) == ended[0]["served",] >= 60
    for name in ("default", "chat", "other"):  # none of these prefills takes a minute, nor 1 ms
        assert abs(prefill["ttft", "true", name] - counted["ttft", "true", name]) <= 1
    # A server's clock starts when its scheduler sees the request: no later than it can know.
    ttfts = [
        a.by("kairos_ttft_seconds_sum") - b.by("kairos_ttft_seconds_sum")
        for a, b in zip(now, before, strict=True)
    ]
    clients_s = sum(outcome.ttft_ms for outcome in outcomes) / 1e3
    assert 0 < ttfts[0][()] < ttfts[1][()] < clients_s
    for url, exported in zip(urls, now, strict=True):
        report = kairos_of(url)["attainment"]
        assert report["requests"] == {name: n for (name,), n in exported.outcomes.items() if n}
        assert {
            (target, str(met).lower(), name)
            for name, tally in report["classes"].items()
            for met in (True, False)
            for target in tally["met" if met else "missed"]
        } == set(exported.slo)


def test_sglang_serve_loads_the_same_plugin_and_says_what_is_off(
    tiny_model: str, out_dir: Path
) -> None:
    """Unified serving under SGLang's own launcher: urgency order on, decode packing off."""
    log = out_dir / "serve.log"
    port = 20_000 + time.time_ns() % 10_000
    command = [str(Path(sys.executable).parent / "sglang"), "serve"]
    command += with_server_flags(
        [
            "--model-path",
            tiny_model,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--enable-metrics",
        ],
        fast_start=True,
    )
    environment = {"KAIROS_CPU_START": "fork", "KAIROS_TTFT_MS": "1234"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline
            try:
                with urllib.request.urlopen(url + "/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.5)
        assert post(url + "/generate", native(tpot_ms=55))[0] == 200
        assert post(url + "/generate", native(ttft_ms=-1))[0] == 400
        with urllib.request.urlopen(url + "/server_info", timeout=30) as answer:
            kairos = json.load(answer)["internal_states"][0]["kairos"]
        assert kairos["mode"] == "null"
        assert kairos["last_request"]["ttft_ms"] == 1234
        assert "decode packing are off" in log.read_text()
        time.sleep(EVERY_S)  # the scheduler tells metrics no oftener, and only while it works
        assert post(url + "/generate", native())[0] == 200
        with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        assert re.search(r'^kairos_predict_error{.*role="null",statistic="mape"} ', metrics, re.M)
        assert re.search(r'^kairos_events_total{event="requests",.*} [1-9]', metrics, re.M)
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_no_part_died_or_complained_in_all_this(cluster: Cluster) -> None:
    assert cluster.dead() is None
    assert not trouble_in(cluster.logs)
