"""Routers as processes of their own, for benchmarks that compare them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sglang_kairos.local_http import open_url

KAIROS_ROUTER, UPSTREAM_ROUTER = "sglang_kairos.launch_router", "sglang_router.launch_router"
PACKAGES = Path(__file__).resolve().parents[2] / "python"


def router_words(prefills: Mapping[str, int], decodes: Sequence[str]) -> list[str]:
    """Returns the arguments that name the servers; `prefills`: bootstrap ports by URL."""
    words: list[str] = []
    for url, port in prefills.items():
        words += ["--prefill", url, str(port)]
    for url in decodes:
        words += ["--decode", url]
    return words


@contextmanager
def router_process(
    module: str, words: Sequence[str], cores: Sequence[int] = ()
) -> Iterator[tuple[int, psutil.Process]]:
    """A router on those cores, or where this process runs: its port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    own = ["--pd-disaggregation", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(PACKAGES), os.environ.get("PYTHONPATH")]
        if module == UPSTREAM_ROUTER:
            # It imports all of SGLang, for tracing that is off; it does without as well.
            Path(folder, "sglang.py").write_text("raise ImportError\n")
            paths.insert(0, folder)
        child = subprocess.Popen(
            [sys.executable, "-m", module, *own, *words],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait(port, child)
            process = psutil.Process(child.pid)
            for thread in process.threads() if cores else ():
                os.sched_setaffinity(thread.id, cores)
            yield port, process
        finally:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait(port: int, child: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"the router ended with {child.returncode}")
        try:
            with open_url(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the router did not start")
