"""What a router costs: streaming requests per second on one core, latency added, placement time.

    python -m benchmark.micro.router_overhead          # about 70 s

Kairos' router and upstream's Python PD balancer take turns, in alternating rounds, in front of the
same two prefill and two decode servers. The servers answer at once. The router
has a core for itself, everything else shares the others. Router CPU per request is given as well:
it does not depend on who else uses the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from benchmark.harness.arguments import parser_for
from benchmark.harness.experiment import alternated, write_json
from benchmark.harness.routers import (
    KAIROS_ROUTER,
    UPSTREAM_ROUTER,
    router_process,
    router_words,
)
from benchmark.micro.echo_pd import ClientLoad, closed_loop, echo_servers, open_loop

KAIROS, UPSTREAM = "kairos", "sglang_router --mini-lb"
MODULES = {KAIROS: KAIROS_ROUTER, UPSTREAM: UPSTREAM_ROUTER}
OWN = {KAIROS: [], UPSTREAM: ["--mini-lb", "--policy", "random"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table. Returns the exit status."""
    parser = parser_for("benchmark.micro.router_overhead", __doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="the routers in turn")
    parser.add_argument("--connections", type=int, default=64, help="for throughput")
    parser.add_argument("--rate", type=float, default=1000.0, help="for latency, requests/s")
    parser.add_argument("--policy", default="kairos", help="of Kairos' router")
    parser.add_argument("--only", choices=[KAIROS, UPSTREAM], help="one router alone")
    parser.add_argument(
        "--out", type=Path, default=Path("out/router_overhead.json"), help="the report"
    )
    given = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    kinds = [given.only] if given.only else [KAIROS, UPSTREAM]
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with echo_servers(4) as urls:
        direct = open_loop(_port(urls[2]), given.seconds, given.rate)
        for number, order in enumerate(alternated(kinds, given.rounds)):
            for kind in order:
                words = router_words(dict.fromkeys(urls[:2], 8998), urls[2:])
                words += OWN[kind] or ["--policy", given.policy]
                with router_process(MODULES[kind], words, cores[:1]) as (port, process):
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
    write_json(given.out, report)
    print(json.dumps({k: report[k] for k in ("routers", "placement")}, indent=2))
    return 0


def measure(
    port: int, process: psutil.Process, given: argparse.Namespace, direct: ClientLoad
) -> dict[str, float]:
    """Returns one router's figures: closed loop for throughput, open loop for latency."""
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
    """Returns microseconds of one choice, median and p99, by the fleet's size (half of each role).

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
                server.enqueue(rng.uniform(100, 8000), now + rng.uniform(0.5, 30), now)
        times = []
        for _ in range(2000):
            began = time.perf_counter()
            due = time.monotonic() + rng.uniform(0.5, 30)
            request = PlacedRequest(rng.uniform(100, 8000), due, handoff_s=0.03, tpot_s=0.05)
            reservation = fleet.reserve(request, (), blocks_of("x" * 4000, 4.0))
            assert reservation is not None
            with reservation:
                times.append(time.perf_counter() - began)
        found[f"{servers}_servers_us_p50"] = round(1e6 * float(np.median(times)), 1)
        found[f"{servers}_servers_us_p99"] = round(1e6 * float(np.percentile(times, 99)), 1)
    return found


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


if __name__ == "__main__":
    sys.exit(main())
