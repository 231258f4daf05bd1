"""Routing policies on a real cluster without a GPU: two prefill and two decode servers, one slow.

    python -m benchmark.router_cpu                      # one prefill server at 40 % of its speed
    python -m benchmark.router_cpu --slow 1             # equal servers
    python -m benchmark.router_cpu --utilisation 1.5 --overload shed

One cluster of Kairos servers serves every policy in turn: a fresh router each, empty caches, the
same long-tailed trace at its own times. Its rate is `--utilisation` of the prefill capacity that is
measured first. One prefill server is stopped for a share of the time. Writes ``report.json`` with
the keys of `benchmark.demo`, and for runs that shed, the attainment of what was accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmark import demo
from benchmark.duty import slowed
from benchmark.router_overhead import router_process
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result, failures, make_jobs, replay, run
from sglang_kairos.local_http import open_url
from sglang_kairos.reports import report
from sglang_kairos.router.arguments import POLICIES

COMPARED = ("random", "round_robin", "least_load", "cache_aware", "kairos")
MEDIAN_OUTPUT, LONGEST_OUTPUT, LONGEST_INPUT = 8.0, 24, 4_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    platform = demo.platform()  # before this process is confined
    with demo.start_method(given) as zygote:
        say = demo.narrator("[cluster]")
        with Cluster(spec(given, zygote, say)) as cluster:
            say(f"servers ready after {cluster.started_in_s:.1f} s")
            schedulers = confine(cluster)
            runs, setup = measure_all(given, cluster, schedulers)
    setup = {"platform": platform, **setup}
    title = f"{platform}, 2 prefill and 2 decode servers"
    title += f", one prefill at {100 * given.slow:g} %" if given.slow < 1 else ", all alike"
    print(report.table(runs, f"{title}; {json.dumps(setup)}"))
    report.write_json(given.out / "report.json", runs, setup)
    report.write_png(given.out / "report.png", runs, title)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.router_cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", default=",".join(COMPARED), help=f"of {', '.join(POLICIES)}")
    parser.add_argument(
        "--slow", type=float, default=0.4, help="speed of the second prefill server"
    )
    parser.add_argument("--utilisation", type=float, default=0.75, help="of the prefill capacity")
    parser.add_argument("--load-s", type=float, default=40.0, help="seconds of arrivals per policy")
    parser.add_argument("--rate", type=float, help="requests/s instead of a measured rate")
    parser.add_argument("--ttft-ms", type=float, default=1500.0)
    parser.add_argument("--tpot-ms", type=float, default=200.0)
    parser.add_argument("--overload", choices=("serve", "relegate", "shed"), default="serve")
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/router_cpu"))
    parser.add_argument("--start", choices=("fork", "spawn"), default="fork")
    given = parser.parse_args(argv)
    given.router = "none"
    given.policies = given.policies.split(",")
    unknown = set(given.policies) - set(POLICIES)
    if unknown:
        parser.error(f"--policies: unknown: {', '.join(sorted(unknown))}")
    if not 0.05 <= given.slow <= 1:
        parser.error("--slow: must be between 0.05 and 1")
    return given


def spec(given: argparse.Namespace, zygote: Any, say: Any) -> ClusterSpec:
    """The four servers; routers are started beside them, one per policy."""
    return ClusterSpec(
        prefill=2,
        decode=2,
        router="none",
        server_args=["--chunked-prefill-size", "512", "--max-total-tokens", "100000"],
        env={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"},
        log_dir=given.out / "logs",
        stop_grace_s=5.0,
        ready_timeout_s=240.0,
        zygote=zygote,
        say=say,
    )


def confine(cluster: Cluster) -> dict[str, int]:
    """The first prefill scheduler alone on the first core, the slow one and all else on the others:
    servers that share no core. Scheduler pids by name."""
    cores = sorted(os.sched_getaffinity(0))
    alone, beside = set(cores[:1]), set(cores[1:]) or set(cores)
    os.sched_setaffinity(0, beside)
    found: dict[str, int] = {}
    for part in cluster.parts:
        root = psutil.Process(part.process.pid)
        for process in (root, *root.children(recursive=True)):
            scheduler = "scheduler" in " ".join(process.cmdline())
            if scheduler:
                found[part.name] = process.pid
            for thread in process.threads():
                os.sched_setaffinity(
                    thread.id, alone if scheduler and part.name == "p0" else beside
                )
    return found


def measure_all(
    given: argparse.Namespace, cluster: Cluster, schedulers: dict[str, int]
) -> tuple[list[report.Run], dict[str, Any]]:
    """Every policy on the same cluster and trace."""
    say = demo.narrator("[capacity]")
    rows = traces.long_tail(
        1000,
        1.0,
        given.seed,
        max_input=LONGEST_INPUT,
        median_output=MEDIAN_OUTPUT,
        max_output=LONGEST_OUTPUT,
    )
    slow_pids = [schedulers["p1"]] if "p1" in schedulers else []
    runs: list[report.Run] = []
    with slowed(slow_pids, given.slow):
        rate = given.rate
        if rate is None:
            rate = given.utilisation * capacity(cluster, rows, say)
        rows = traces.scale_rate(rows, rate)
        rows = traces.window(rows, n=max(2, int(rate * given.load_s)))
        order = given.policies
        for turn in range(given.repeat):
            for policy in order[:: -1 if turn % 2 else 1]:
                say = demo.narrator(f"[{policy}]")
                demo.forget(cluster)
                with routed(cluster, policy, given.overload) as url:
                    result = drive(url, rows, given, cluster)
                    facts = {"per_server": spread(url, cluster), **accepted(result)}
                for line in failures(result.outcomes):
                    say(f"failed: {line[:200]}")
                say(f"{demo.summary(result)}; {facts}")
                runs.append(report.Run(policy, result, facts))
                result.dump(given.out / f"{len(runs)}-{policy}.jsonl")
    setup = {
        "requests": len(rows),
        "rate_rps": round(rate, 3),
        "utilisation": given.utilisation,
        "slow": given.slow,
        "overload": given.overload,
        "ttft_ms": given.ttft_ms,
        "tpot_ms": given.tpot_ms,
        "seed": given.seed,
    }
    return runs, setup


def capacity(cluster: Cluster, rows: Sequence[traces.Request], say: Any) -> float:
    """Requests/s that both prefill servers can take of such rows, with all sent at once."""
    sample = [traces.Request(0.0, row.input_tokens, 2) for row in list(rows)[:60]]
    with routed(cluster, "kairos", "serve") as url:
        warm = [traces.Request(0.0, size, 4) for size in (32, 300, 1200, 2500, 600, 100) * 2]
        run(replay(url, make_jobs(warm, 1e5, 1e5, seed=-1), concurrency=4))
        demo.forget(cluster)
        result = run(replay(url, make_jobs(sample, 1e5, 1e5, seed=-2), check=cluster.check))
    found = len(sample) / result.duration_s
    say(f"{len(sample)} requests at once took {result.duration_s:.1f} s: {found:.2f} req/s")
    return found


def drive(
    url: str, rows: Sequence[traces.Request], given: argparse.Namespace, cluster: Cluster
) -> Result:
    """Send the trace at its times."""
    jobs = make_jobs(list(rows), given.ttft_ms, given.tpot_ms, seed=given.seed)
    return run(replay(url, jobs, timeout_s=given.timeout_s, check=cluster.check))


def accepted(result: Result) -> dict[str, float]:
    """Attainment of the requests that were not shed."""
    taken = [outcome for outcome in result.outcomes if outcome.status != "http 429"]
    count = max(1, len(taken))
    return {
        "shed": len(result.outcomes) - len(taken),
        "accepted_ttft_attainment": sum(o.met_ttft for o in taken) / count,
        "accepted_e2e_attainment": sum(o.met_ttft and o.met_tpot for o in taken) / count,
    }


def spread(url: str, cluster: Cluster) -> dict[str, float]:
    """First tokens of each prefill server, counted by the router."""
    with open_url(url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line.split() for line in lines if "ttft_miss_seconds_count" in line]
    return {
        f"p{index}": sum(float(value) for name, value in found if server in name)
        for index, server in enumerate(cluster.prefill_urls)
    }


@contextmanager
def routed(cluster: Cluster, policy: str, overload: str) -> Iterator[str]:
    """A router with that policy in front of the cluster: its URL."""
    words: list[str] = []
    for url, port in zip(cluster.prefill_urls, cluster.bootstrap_ports, strict=True):
        words += ["--prefill", url, str(port)]
    for url in cluster.decode_urls:
        words += ["--decode", url]
    words += ["--policy", policy, "--overload", overload, "--seed", "1"]
    with router_process("sglang_kairos.launch_router", words, None) as (port, _):
        # Long enough for the router to have asked the servers how fast they are.
        run(replay(f"http://127.0.0.1:{port}", make_jobs([traces.Request(0.0, 16, 2)], 1e5, 1e5)))
        yield f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    sys.exit(main())
