"""What a router costs: streaming requests per second on one core, latency added, placement time.

    python -m benchmark.router_overhead          # about 70 s

Kairos' router and upstream's Python PD balancer stand in front of the same two prefill and two
decode servers, which answer at once, one router after the other in alternating rounds. The router
has a core for itself, everything else shares the others. Router CPU per request is given as well:
it does not depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from benchmark.echo_pd import Load, closed_loop, echo_servers, open_loop
from sglang_kairos.local_http import open_url

KAIROS, UPSTREAM = "kairos", "sglang_router --mini-lb"
MODULES = {KAIROS: "sglang_kairos.launch_router", UPSTREAM: "sglang_router.launch_router"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.router_overhead")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1000.0, help="for latency, requests/s")
    parser.add_argument("--policy", default="kairos")
    parser.add_argument("--only", choices=[KAIROS, UPSTREAM])
    parser.add_argument("--out", type=Path, default=Path("out/router_overhead.json"))
    given = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    kinds = [given.only] if given.only else [KAIROS, UPSTREAM]
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with echo_servers(4) as urls:
        direct = open_loop(_port(urls[2]), given.seconds, given.rate)
        for number in range(given.rounds):
            for kind in kinds[:: -1 if number % 2 else 1]:
                with running(kind, urls, cores[:1], given.policy) as (port, process):
                    facts = measure(port, process, given, direct)
                rounds[kind].append(facts)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
                print(f"[{number + 1}/{given.rounds} {kind}] {shown}", flush=True)
    report = {
        "platform": f"CPU ({len(cores)} cores, router on one of them)",
        "direct_p99_ms": 1e3 * float(np.percentile(direct.latencies_s, 99)),
        "routers": {k: {n: median(f[n] for f in found) for n in found[0]}
                    for k, found in rounds.items()},
        "rounds": rounds,
        "placement": placement_times(),
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: report[k] for k in ("routers", "placement")}, indent=2))
    return 0


def measure(
    port: int, process: psutil.Process, given: argparse.Namespace, direct: Load
) -> dict[str, float]:
    """Closed loop for throughput, then open loop for latency."""
    closed_loop(port, 1.0, given.connections)
    before, began = process.cpu_times(), time.perf_counter()
    load = closed_loop(port, given.seconds, given.connections)
    after, wall = process.cpu_times(), time.perf_counter() - began
    user, system = after.user - before.user, after.system - before.system
    answered = max(1, len(load.latencies_s))
    slow = open_loop(port, given.seconds, given.rate)
    found = {
        "requests_per_s": load.per_s,
        "router_user_us_per_request": 1e6 * user / answered,
        "router_system_us_per_request": 1e6 * system / answered,
        "router_cpu_share": (user + system) / wall,
        "failed": float(load.failed + slow.failed),
        "rate_for_latency": len(slow.latencies_s) / slow.seconds,
    }
    for name, theirs, ours in (
        ("added_ms", direct.latencies_s, slow.latencies_s),
        ("added_first_event_ms", direct.firsts_s, slow.firsts_s),
    ):
        for q in (50, 99):
            base = float(np.percentile(theirs, q))
            found[f"{name}_p{q}"] = 1e3 * (float(np.percentile(ours, q)) - base)
    return found


def placement_times() -> dict[str, float]:
    """Microseconds of one choice, median and p99, for fleets of several sizes (half of each role).

    Every prefill server owes 20 prompts; the choice includes looking at each server's books.
    """
    from sglang_kairos.router.fleet.fleet import Fleet
    from sglang_kairos.router.fleet.prefix_index import blocks_of
    from sglang_kairos.router.options import RouterOptions
    from sglang_kairos.router.request.context import PlacedRequest

    rng, found = random.Random(0), {}
    for servers in (4, 64, 128, 1000):
        half = servers // 2
        options = RouterOptions(
            prefills=tuple((f"http://p{i}:1", 8998) for i in range(half)),
            decodes=tuple(f"http://d{i}:1" for i in range(half)),
            seed=0,
        )
        fleet = Fleet(options)
        for server in fleet.prefills:
            server.kairos = True
            for _ in range(20):
                now = time.monotonic()
                server.owe(rng.uniform(100, 8000), now + rng.uniform(0.5, 30), now)
        times = []
        for _ in range(2000):
            began = time.perf_counter()
            due = time.monotonic() + rng.uniform(0.5, 30)
            request = PlacedRequest(rng.uniform(100, 8000), due, handoff_s=0.03, tpot_s=0.05)
            placement = fleet.choose(request, (), blocks_of("x" * 4000, 4.0))
            assert placement is not None
            fleet.sent(placement.prefill, blocks_of("x" * 4000, 4.0))
            ticket = placement.prefill.owe(request.tokens, due, time.monotonic())
            times.append(time.perf_counter() - began)
            placement.prefill.settle(ticket, time.monotonic(), served=False)
        found[f"{servers}_servers_us_p50"] = round(1e6 * float(np.median(times)), 1)
        found[f"{servers}_servers_us_p99"] = round(1e6 * float(np.percentile(times, 99)), 1)
    return found


@contextmanager
def running(
    kind: str, urls: Sequence[str], cores: Sequence[int], policy: str
) -> Iterator[tuple[int, psutil.Process]]:
    """A router of that kind on those cores: its port and its process."""
    words: list[str] = []
    for url in urls[:2]:
        words += ["--prefill", url, "8998"]
    for url in urls[2:]:
        words += ["--decode", url]
    words += ["--policy", policy] if kind == KAIROS else ["--mini-lb", "--policy", "random"]
    with router_process(MODULES[kind], words, cores) as found:
        yield found


@contextmanager
def router_process(
    module: str, words: Sequence[str], cores: Sequence[int] | None
) -> Iterator[tuple[int, psutil.Process]]:
    """Any router, on those cores or where this process runs: its port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    own = ["--pd-disaggregation", "--host", "127.0.0.1", "--port", str(port)]
    root = Path(__file__).resolve().parent.parent / "python"
    # Upstream's balancer imports all of SGLang, for tracing that is off; it does without as well.
    without = tempfile.TemporaryDirectory() if module == MODULES[UPSTREAM] else None
    if without is not None:
        Path(without.name, "sglang.py").write_text("raise ImportError\n")
    folders = (without and without.name, str(root), os.environ.get("PYTHONPATH"))
    paths = os.pathsep.join(filter(None, folders))
    child = subprocess.Popen(
        [sys.executable, "-m", module, *own, *words],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait(port, child)
        process = psutil.Process(child.pid)
        for thread in process.threads() if cores else ():
            os.sched_setaffinity(thread.id, cores or ())
        yield port, process
    finally:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if without is not None:
            without.cleanup()


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


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


if __name__ == "__main__":
    sys.exit(main())
