"""Starts real gateways in front of a cluster: a context manager each, which gives the URL."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sglang_kairos.cluster.run import Cluster
from sglang_kairos.local_http import open_url
from sglang_kairos.processes import EXEC_WITH_PARENT, kill_session

# Where scripts/beside.sh puts packages that must not be installed beside SGLang's.
PACKAGES = Path(__file__).resolve().parents[2] / "out" / "front-ends"
READY_S = 120.0


def program(package: str) -> Path:
    """The program of that name in its own environment; it may not be there."""
    return PACKAGES / package / "bin" / package


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, health: str, log: Path, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Runs a command until its health check answers 200; ends it and what it has started."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-ISc", EXEC_WITH_PARENT, str(os.getpid()), *command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
    try:
        deadline = time.monotonic() + READY_S
        while not _answers(url + health):
            tail = log.read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"{command[0]} has ended: {tail}"
            assert time.monotonic() < deadline, f"{command[0]} is not ready: {tail}"
            time.sleep(0.1)
        yield url
    finally:
        kill_session(process.pid)
        process.wait()


def _answers(url: str) -> bool:
    try:
        with open_url(urllib.request.Request(url), timeout=5.0) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _pair(cluster: Cluster) -> list[str]:
    words = ["--pd-disaggregation", "--prefill", cluster.prefill_urls[0]]
    return [*words, str(cluster.bootstrap_ports[0]), "--decode", cluster.decode_urls[0]]


def _rust_gateway(
    command: Sequence[str], cluster: Cluster, log: Path, *, pd: bool
) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    words = [*command, *(_pair(cluster) if pd else ["--worker-urls", cluster.url])]
    words += ["--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--prometheus-port", str(free_port())]
    return running(words, f"http://127.0.0.1:{port}", "/health", log)


def sglang_router(
    cluster: Cluster, log: Path, *, pd: bool
) -> contextlib.AbstractContextManager[str]:
    """SGLang's Rust gateway, which is installed beside SGLang itself."""
    command = [sys.executable, "-m", "sglang_router.launch_router"]
    return _rust_gateway(command, cluster, log, pd=pd)


def smg(cluster: Cluster, log: Path, *, pd: bool) -> contextlib.AbstractContextManager[str]:
    """Its successor."""
    return _rust_gateway([str(program("smg")), "launch"], cluster, log, pd=pd)


def litellm(cluster: Cluster, log: Path) -> contextlib.AbstractContextManager[str]:
    """The proxy, with client headers passed on, and a model name that stands for a class."""

    def model(name: str, **more: object) -> dict[str, object]:
        params = {"model": "openai/m", "api_base": cluster.url + "/v1", "api_key": "none", **more}
        return {"model_name": name, "litellm_params": params}

    config = {
        "model_list": [
            model("m"),
            model("m-in-class", extra_body={"slo_class": "by-model"}),
        ],
        "general_settings": {"forward_client_headers_to_llm_api": True},
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    path = log.with_suffix(".yaml")
    path.write_text(json.dumps(config))  # which YAML is, too
    port = free_port()
    command = [str(program("litellm")), "--config", str(path)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    env = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it looks for one on the net
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "PYTHONPATH": "",
    }
    return running(command, f"http://127.0.0.1:{port}", "/health/liveliness", log, env)
