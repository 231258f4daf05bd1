"""Routers as processes: Kairos' own, and upstream's Python PD balancer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from sglang_kairos.local_http import open_url

UPSTREAM_MODULE = "sglang_router.launch_router"
START_S = 60


def pair_words(
    prefills: Sequence[str], bootstrap_ports: Sequence[int], decodes: Sequence[str]
) -> list[str]:
    """Returns a router's arguments for these servers."""
    words: list[str] = []
    for url, port in zip(prefills, bootstrap_ports, strict=True):
        words += ["--prefill", url, str(port)]
    for url in decodes:
        words += ["--decode", url]
    return words


@contextmanager
def router_process(
    module: str, words: Sequence[str], cores: Sequence[int] | None
) -> Iterator[tuple[int, psutil.Process]]:
    """Yields port and process of any router, on those cores or where this process runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", module, "--pd-disaggregation", "--host", "127.0.0.1"]
    folders = [str(Path(__file__).resolve().parents[2] / "python"), os.environ.get("PYTHONPATH")]
    with ExitStack() as stack:
        if module == UPSTREAM_MODULE:
            # It imports all of SGLang, for tracing that is off, and does without as well.
            without = stack.enter_context(tempfile.TemporaryDirectory())
            Path(without, "sglang.py").write_text("raise ImportError\n", encoding="utf-8")
            folders.insert(0, without)
        child = subprocess.Popen(
            [*command, "--port", str(port), *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(_end, child)
        _wait(port, child)
        process = psutil.Process(child.pid)
        for thread in process.threads() if cores else ():
            os.sched_setaffinity(thread.id, cores or ())
        yield port, process


def _wait(port: int, child: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the router ended with {child.returncode}")
        try:
            with open_url(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the router did not start within {START_S} s")


def _end(child: subprocess.Popen[Any]) -> None:
    child.terminate()
    try:
        child.wait(5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
