"""Routing policies on a real cluster without a GPU: two prefill and two decode servers, one slow.

    python -m benchmark.experiments.router_cpu              # one prefill server at 40 % of its speed
    python -m benchmark.experiments.router_cpu --slow 1     # equal servers
    python -m benchmark.experiments.router_cpu --utilisation 1.5 --overload shed

One cluster of Kairos servers serves every policy in turn: a fresh router each, empty caches, the
same long-tailed trace at its own times. Its rate is `--utilisation` of the prefill capacity that is
measured first. One prefill server is stopped for a share of the time. Writes ``report.json`` with
the keys of the demo, and for runs that shed, the attainment of what was accepted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.harness import arguments, driver, servers
from benchmark.harness.duty import slowed
from benchmark.harness.experiment import Experiment, Trial, run_experiment
from benchmark.harness.routers import router_process, router_words
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result
from sglang_kairos.local_http import open_url
from sglang_kairos.reports import report
from sglang_kairos.router.arguments import POLICIES

LENGTHS: dict[str, Any] = {"max_input": 4_000, "median_output": 8.0, "max_output": 24}
DEFAULTS: dict[str, Any] = {
    "policies": "random,round_robin,least_load,cache_aware,kairos",
    "utilisation": 0.75,
    "load_s": 40.0,
    "rate": None,
    "ttft_ms": 1500.0,
    "tpot_ms": 200.0,
    "seed": 0,
    "repeat": 1,
    "out": Path("out/router_cpu"),
}
TOLD = ("utilisation", "slow", "overload", "ttft_ms", "tpot_ms", "seed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line."""
    parser = arguments.parser_for("benchmark.experiments.router_cpu", __doc__, **DEFAULTS)
    arguments.add_start(parser)
    text = "speed of the second prefill server (default: %(default)s)"
    parser.add_argument("--slow", type=float, default=0.4, help=text)
    parser.add_argument("--overload", choices=("serve", "relegate", "shed"), default="serve")
    parser.add_argument("--timeout-s", type=float, default=60.0)
    given = parser.parse_args(argv)
    given.router = "none"
    given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
    positive = ("utilisation", "load_s", "rate", "ttft_ms", "tpot_ms", "repeat", "timeout_s")
    arguments.positive(parser, given, positive)
    if not 0.05 <= given.slow <= 1:
        parser.error("--slow: must be between 0.05 and 1")
    return given


class RouterCpu(Experiment):
    """A router per trial in front of the same four servers."""

    cluster: Cluster
    rows: list[traces.Request]
    rate: float

    def run(self) -> None:
        given, say = self.given, servers.narrator("[cluster]")
        pair = servers.pair_spec(servers.KAIROS, given, self.zygote, say, "servers")
        words = ["--chunked-prefill-size", "512", "--max-total-tokens", "100000"]
        spec = replace(pair, prefill=2, decode=2, server_args=words, ready_timeout_s=240.0)
        with ExitStack() as stack:
            self.cluster = stack.enter_context(Cluster(spec))
            say(f"servers ready after {self.cluster.started_in_s:.1f} s")
            # The first prefill scheduler and the slow one share no core.
            servers.separate(self.cluster, "p0")
            slow = [process.pid for process in servers.schedulers(self.cluster, "p1").values()]
            stack.enter_context(slowed(slow, given.slow))
            rows = traces.long_tail(1000, 1.0, given.seed, **LENGTHS)
            self.rate = given.rate or given.utilisation * self.capacity(rows)
            rows = traces.scale_rate(rows, self.rate)
            self.rows = traces.window(rows, n=max(2, int(self.rate * given.load_s)))
            super().run()

    def measure(self, trial: Trial) -> None:
        given = self.given
        servers.forget(self.cluster)
        with self.routed(trial.policy, given.overload) as url:
            options = {"seed": given.seed, "url": url, "timeout_s": given.timeout_s}
            targets = given.ttft_ms, given.tpot_ms
            result = driver.send(self.cluster, self.rows, *targets, **options)
            facts = {"per_server": self.first_tokens(url), **accepted(result)}
        driver.tell_failures(result, trial.say)
        trial.say(f"{driver.summary(result)}; {facts}")
        self.runs.append(report.Run(trial.policy, result, facts))
        result.dump(given.out / f"{trial.name}.jsonl")

    def capacity(self, rows: Sequence[traces.Request]) -> float:
        """Returns requests/s that both prefill servers can take of such rows, all sent at once."""
        sample = [traces.Request(0.0, row.input_tokens, 2) for row in rows[:60]]
        with self.routed("kairos", "serve") as url:
            sizes = (32, 300, 1200, 2500, 600, 100) * 2
            warm = [traces.Request(0.0, size, 4) for size in sizes]
            driver.send(self.cluster, warm, url=url, seed=-1, concurrency=4)
            servers.forget(self.cluster)
            result = driver.send(self.cluster, sample, url=url, seed=-2)
        found, say = len(sample) / result.duration_s, servers.narrator("[capacity]")
        say(f"{len(sample)} requests at once took {result.duration_s:.1f} s: {found:.2f} req/s")
        return found

    def first_tokens(self, url: str) -> dict[str, float]:
        """Returns the first tokens of each prefill server, counted by the router."""
        with open_url(url + "/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [line.split() for line in lines if "ttft_miss_seconds_count" in line]
        return {
            f"p{index}": sum(float(value) for name, value in found if server in name)
            for index, server in enumerate(self.cluster.prefill_urls)
        }

    @contextmanager
    def routed(self, policy: str, overload: str) -> Iterator[str]:
        """A router with that policy in front of the cluster: its URL."""
        cluster = self.cluster
        pairs = zip(cluster.prefill_urls, cluster.bootstrap_ports, strict=True)
        words = router_words(dict(pairs), cluster.decode_urls)
        words += ["--policy", policy, "--overload", overload, "--seed", "1"]
        with router_process("sglang_kairos.launch_router", words) as (port, _):
            url = f"http://127.0.0.1:{port}"
            # Long enough for the router to have asked the servers how fast they are.
            driver.send(cluster, [traces.Request(0.0, 16, 2)], url=url, seed=0)
            yield url

    def setup(self) -> dict[str, Any]:
        facts = {"platform": servers.platform(), "requests": len(self.rows)}
        asked = {name: getattr(self.given, name) for name in TOLD}
        return {**facts, "rate_rps": round(self.rate, 3), **asked}

    def title(self) -> str:
        slow = self.given.slow
        speeds = f"one prefill at {100 * slow:g} %" if slow < 1 else "all alike"
        return f"{servers.platform()}, 2 prefill and 2 decode servers, {speeds}"

    def save(self, trial: Trial) -> None:
        report.write_json(self.given.out / "report.json", self.runs, self.setup())
        report.write_png(self.given.out / "report.png", self.runs, self.title())

    def text(self) -> str:
        return report.table(self.runs, f"{self.title()}; {json.dumps(self.setup())}")


def accepted(result: Result) -> dict[str, float]:
    """Returns the attainment of the requests that were not shed."""
    taken = [outcome for outcome in result.outcomes if outcome.status != "http 429"]
    count = max(1, len(taken))
    return {
        "shed": len(result.outcomes) - len(taken),
        "accepted_ttft_attainment": sum(o.met_ttft for o in taken) / count,
        "accepted_e2e_attainment": sum(o.met_ttft and o.met_tpot for o in taken) / count,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Returns the exit status."""
    return run_experiment(RouterCpu, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
