"""Runs NVIDIA Dynamo on this machine: frontend, prefill and decode worker, no etcd, no NATS."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.trees import ROOT
from sglang_kairos.cpu.flags import with_server_flags
from sglang_kairos.local_http import open_url
from sglang_kairos.other_sglang import first_on_path
from sglang_kairos.processes import EXEC_WITH_PARENT, kill_session

SGLANG = "0.5.21"  # what ai-dynamo 1.6.1 pins
# Where scripts/beside.sh puts it.
FOLDER = Path(os.environ.get("KAIROS_DYNAMO_FOLDER") or ROOT / "out" / "dynamo")
MODEL = "tiny"
# The report that SGLang's own server shows in /server_info, as a route of the worker's.
ROUTES = "kairos=get_internal_state:tm"
READY_S = 400.0


@dataclass(frozen=True)
class Dynamo:
    """What runs: the frontend's URL, and those of the workers' own ports, prefill first."""

    url: str
    workers: tuple[str, str]
    logs: Mapping[str, Path]

    def kairos(self) -> list[dict[str, Any]]:
        """Kairos' report of the prefill and of the decode worker; empty without it."""
        states = (_post(url + "/engine/kairos", {})["result"] for url in self.workers)
        return [state[0].get("kairos", {}) for state in states]

    def last_requests(self) -> list[dict[str, Any]]:
        return [report["last_request"] for report in self.kairos()]

    def metrics(self, worker: int) -> dict[str, float]:
        """What a worker shows Prometheus, by name and labels as written there."""
        with open_url(self.workers[worker] + "/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = (line.rpartition(" ") for line in lines if line and line[0] != "#")
        return {name: float(value) for name, _, value in found}


def _post(url: str, body: Any) -> Any:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with open_url(request, timeout=60) as answer:
        return json.load(answer)


@contextlib.contextmanager
def dynamo(
    sglang: Path,
    model: str,
    folder: Path,
    *,
    env: Mapping[str, str],
    args: Sequence[str] = (),
) -> Iterator[Dynamo]:
    """Runs all three until the frontend lists the model and serves; logs go to `folder`.

    `env` is Kairos' settings, `args` are flags for both workers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    http, prefill, decode, bootstrap, *own = _free_ports(7)
    path = first_on_path(FOLDER, {"PYTHONPATH": str(ROOT / "python")})
    shared = {
        **first_on_path(sglang, path),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_SGLANG_ENABLE_GENERATE": "true",
        "DYN_SGLANG_ENGINE_ROUTES": ROUTES,
        "KAIROS_CPU_START": "fork",  # or each of its children imports SGLang anew
        # Else decode is sent to this machine's outward address for the KV.
        "SGLANG_HOST_IP": "127.0.0.1",
        **env,
    }
    worker = ["--model-path", model, "--served-model-name", MODEL, "--host", "127.0.0.1"]
    worker += ["--page-size", "1", "--enable-metrics", *args]
    modes = {
        "prefill": ["--disaggregation-bootstrap-port", str(bootstrap), "--port", str(own[0])],
        "decode": ["--port", str(own[1])],
    }
    logs = {name: folder / f"{name}.log" for name in (*modes, "frontend")}
    with contextlib.ExitStack() as stack:
        processes = []
        for (mode, more), system in zip(modes.items(), (prefill, decode), strict=True):
            argv = [*worker, "--disaggregation-mode", mode, *more]
            command = ["dynamo.sglang", *with_server_flags(argv, version=SGLANG, fast_start=True)]
            mine = {**shared, "DYN_SYSTEM_PORT": str(system)}
            processes.append(stack.enter_context(_running(command, mine, logs[mode])))
        command = ["dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(http)]
        processes.append(stack.enter_context(_running(command, shared, logs["frontend"])))
        found = Dynamo(
            f"http://127.0.0.1:{http}",
            (f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}"),
            logs,
        )
        _wait(found, processes)
        yield found
        ended = [name for name, one in zip(logs, processes, strict=True) if one.poll() is not None]
        assert not ended, f"{ended} ended by themselves"


def _wait(found: Dynamo, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
    deadline = time.monotonic() + READY_S
    while True:
        for name, process in zip(found.logs, processes, strict=True):
            tail = found.logs[name].read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"{name} has ended: {tail}"
        assert time.monotonic() < deadline, f"not ready after {READY_S} s"
        with contextlib.suppress(OSError):
            _post(found.url + "/v1/completions", body)
            return
        time.sleep(0.5)


@contextlib.contextmanager
def _running(
    module: Sequence[str], env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", *module]
    words = [sys.executable, "-ISc", EXEC_WITH_PARENT, str(os.getpid()), *command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env},
        )
    try:
        yield process
    finally:
        kill_session(process.pid)
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Dynamo reads the number of a worker's own port as a signed 16-bit one."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", random.randrange(20_000, 2**15)))
                found.append(int(one.getsockname()[1]))
        return found
