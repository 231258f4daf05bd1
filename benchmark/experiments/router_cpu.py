"""Routing policies on a real cluster without a GPU: two prefill and two decode servers, one slow.

    python -m benchmark.experiments.router_cpu             # one prefill server at 40 % of its speed
    python -m benchmark.experiments.router_cpu --slow 1    # equal servers
    python -m benchmark.experiments.router_cpu --utilisation 1.5 --overload shed

One cluster of Kairos servers serves every policy in turn: a fresh router each, empty caches, the
same long-tailed trace at its own times. Its rate is `--utilisation` of the prefill capacity that is
measured first. One prefill server is stopped for a share of the time. Writes ``report.json`` with
the demo's keys, and for runs that shed, the attainment of what was accepted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmark.harness import arguments
from benchmark.harness.duty import slowed
from benchmark.harness.experiment import Experiment, Say, Trial, run_experiment
from benchmark.harness.routers import pair_words, router_process
from benchmark.harness.servers import (
    QUIET_ENV,
    RELAXED_MS,
    forget,
    is_scheduler,
    narrator,
    platform,
    processes,
    prompts_of,
    separate,
    summary,
)
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result, failures, make_jobs, replay, run
from sglang_kairos.local_http import open_url
from sglang_kairos.reports import report
from sglang_kairos.router.arguments import POLICIES

COMPARED = ("random", "round_robin", "least_load", "cache_aware", "kairos")
MEDIAN_OUTPUT, LONGEST_OUTPUT, LONGEST_INPUT = 8.0, 24, 4_000


class RouterCpu(Experiment):
    """One cluster for all trials; a trial is a router."""

    cluster: Cluster
    trace: list[traces.Request]

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = arguments.parser_for(
            "benchmark.experiments.router_cpu",
            __doc__,
            policies=",".join(COMPARED),
            utilisation=0.75,
            load_s=40.0,
            rate=None,
            ttft_ms=1500.0,
            tpot_ms=200.0,
            seed=0,
            repeat=1,
            out=Path("out/router_cpu"),
        )
        add = parser.add_argument
        add("--slow", type=float, default=0.4, help="speed of the second prefill server")
        add("--overload", choices=("serve", "relegate", "shed"), default="serve")
        add("--timeout-s", type=float, default=60.0, help="an answer that takes longer has failed")
        add("--start", choices=("fork", "spawn"), help="fork servers, or start each anew")
        given = parser.parse_args(argv)
        given.router, given.json = "none", given.out / "report.json"
        given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
        if not 0.05 <= given.slow <= 1:
            parser.error("--slow: must be between 0.05 and 1")
        names = ("rate", "utilisation", "load_s", "ttft_ms", "tpot_ms", "repeat", "timeout_s")
        arguments.positive(parser, given, names)
        return given

    def run(self) -> None:
        given, say = self.given, narrator("[cluster]")
        with Cluster(spec(given, self.zygote, say)) as cluster:
            say(f"servers ready after {cluster.started_in_s:.1f} s")
            separate(cluster, "p0")  # the slow one shares no core with it
            self.cluster = cluster
            slow = [p.pid for name, p in processes(cluster) if name == "p1" and is_scheduler(p)]
            with slowed(slow, given.slow):
                tail = {"median_output": MEDIAN_OUTPUT, "max_output": LONGEST_OUTPUT}
                rows = traces.long_tail(1000, 1.0, given.seed, max_input=LONGEST_INPUT, **tail)
                rate = given.rate or given.utilisation * capacity(cluster, rows, say)
                rows = traces.scale_rate(rows, rate)
                self.trace = traces.window(rows, n=max(2, int(rate * given.load_s)))
                super().run()

    def measure(self, trial: Trial) -> None:
        given, cluster = self.given, self.cluster
        forget(cluster)
        jobs = make_jobs(self.trace, given.ttft_ms, given.tpot_ms, seed=given.seed)
        with routed(cluster, trial.policy, given.overload) as url:
            result = run(replay(url, jobs, timeout_s=given.timeout_s, check=cluster.check))
            facts = {"per_server": first_tokens(url, cluster), **accepted(result)}
        for line in failures(result.outcomes):
            trial.say(f"failed: {line[:200]}")
        trial.say(f"{summary(result)}; {facts}")
        self.runs.append(report.Run(trial.policy, result, facts))
        result.dump(given.out / f"{trial.name}.jsonl")

    def setup(self) -> dict[str, Any]:
        names = ("utilisation", "slow", "overload", "ttft_ms", "tpot_ms", "seed")
        return {
            "platform": platform(),
            "requests": len(self.trace),
            "rate_rps": round(traces.rate_of(self.trace), 3),
            **{name: getattr(self.given, name) for name in names},
        }

    def text(self) -> str:
        slow = self.given.slow
        speeds = f"one prefill at {100 * slow:g} %" if slow < 1 else "all alike"
        title = f"{platform()}, 2 prefill and 2 decode servers, {speeds}"
        report.write_png(self.given.out / "report.png", self.runs, title)
        return report.table(self.runs, f"{title}; {json.dumps(self.setup())}")


def spec(given: argparse.Namespace, zygote: Any, say: Say) -> ClusterSpec:
    """Returns the four servers; routers are started beside them, one per policy."""
    return ClusterSpec(
        prefill=2,
        decode=2,
        router="none",
        server_args=["--chunked-prefill-size", "512", "--max-total-tokens", "100000"],
        env=QUIET_ENV,
        log_dir=given.out / "logs",
        stop_grace_s=5.0,
        ready_timeout_s=240.0,
        zygote=zygote,
        say=say,
    )


def capacity(cluster: Cluster, rows: Sequence[traces.Request], say: Say) -> float:
    """Returns requests/s that both prefill servers can take of such rows, with all sent at once."""
    sample = [traces.Request(0.0, row.input_tokens, 2) for row in rows[:60]]
    with routed(cluster, "kairos", "serve") as url:
        warm = prompts_of((32, 300, 1200, 2500, 600, 100) * 2, 4)
        run(replay(url, make_jobs(warm, RELAXED_MS, RELAXED_MS, seed=-1), concurrency=4))
        forget(cluster)
        jobs = make_jobs(sample, RELAXED_MS, RELAXED_MS, seed=-2)
        result = run(replay(url, jobs, check=cluster.check))
    found = len(sample) / result.duration_s
    say(f"{len(sample)} requests at once took {result.duration_s:.1f} s: {found:.2f} req/s")
    return found


def accepted(result: Result) -> dict[str, float]:
    """Returns the attainment of the requests that were not shed."""
    taken = [outcome for outcome in result.outcomes if outcome.status != "http 429"]
    count = max(1, len(taken))
    return {
        "shed": len(result.outcomes) - len(taken),
        "accepted_ttft_attainment": sum(o.met_ttft for o in taken) / count,
        "accepted_e2e_attainment": sum(o.met_ttft and o.met_tpot for o in taken) / count,
    }


def first_tokens(url: str, cluster: Cluster) -> dict[str, float]:
    """Returns first tokens of each prefill server, counted by the router."""
    with open_url(url + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line.split() for line in lines if "ttft_miss_seconds_count" in line]
    return {
        f"p{index}": sum(float(value) for name, value in found if server in name)
        for index, server in enumerate(cluster.prefill_urls)
    }


@contextmanager
def routed(cluster: Cluster, policy: str, overload: str) -> Iterator[str]:
    """Yields the URL of a router with that policy in front of the cluster."""
    words = pair_words(cluster.prefill_urls, cluster.bootstrap_ports, cluster.decode_urls)
    words += ["--policy", policy, "--overload", overload, "--seed", "1"]
    with router_process("sglang_kairos.launch_router", words, None) as (port, _):
        # Long enough for the router to have asked the servers how fast they are.
        url = f"http://127.0.0.1:{port}"
        run(replay(url, make_jobs(prompts_of([16], 2), RELAXED_MS, RELAXED_MS)))
        yield url


if __name__ == "__main__":
    sys.exit(run_experiment(RouterCpu))
