"""Prefill on real SGLang servers (CPU): upstream's orders and Kairos, three kinds of targets.

    python -m benchmark.experiments.prefill_cpu --json out/prefill_cpu.json   # 25 minutes, 3 rounds

Each policy of each round has a fresh prefill/decode pair (the demo's). A policy of upstream's knows
no targets, so one run of it is judged under all of them; Kairos runs once for each. All send the
same trace at the same rates: `--loads` of the prefill capacity that the first pair is measured to
have.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import numpy as np

from benchmark.harness import arguments, driver, loads, page, servers
from benchmark.harness.experiment import PairExperiment, Trial, run_experiment
from benchmark.harness.servers import KAIROS
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result
from sglang_kairos.reports import report

POLICIES = ("fcfs", "lpm", "hrrn", "shortest-prefill-first", KAIROS)
TPOT_MS = 75.0
FLAT_MS = 1000.0
TIERS_MS = (500.0, 2000.0, 10_000.0)
# Length-proportional: so much, and that many times the prompt's prefill time on an idle server.
PROPORTIONAL = (300.0, 4.0)
SLO = {
    "flat": {"ttft_ms": FLAT_MS},
    "proportional": {"ttft_ms": f"{PROPORTIONAL[0]:g} + {PROPORTIONAL[1]:g} x prefill time"},
    "tiers": {"ttft_ms": list(TIERS_MS)},
}
DEFAULTS: dict[str, Any] = {
    "policies": ",".join(POLICIES),
    "loads": "0.7,0.9,1.1",
    "repeat": 3,
    "load_s": 25.0,
    "trace": None,
    "seed": 0,
    "json": Path("out/prefill_cpu.json"),
    "markdown": None,
    "out": Path("out/prefill_cpu"),
}


@dataclass(frozen=True)
class PrefillLoad:
    """One rate: the rows to send, and every request's TTFT target in ms under each kind."""

    share: float
    rows: list[traces.Request]
    targets: dict[str, list[float]]

    def send(self, cluster: Cluster, kind: str, seed: int) -> Result:
        """Replays it open loop with the targets of that kind."""
        by_row = dict(zip(map(id, self.rows), self.targets[kind], strict=True))
        targets = (lambda row: by_row[id(row)]), TPOT_MS
        return driver.send(cluster, self.rows, *targets, seed=seed, timeout_s=servers.TIMEOUT_S)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line, with lists as lists."""
    parser = arguments.parser_for("benchmark.experiments.prefill_cpu", __doc__, **DEFAULTS)
    traces.add_reading_options(parser)
    given = parser.parse_args(argv)
    given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
    given.loads = arguments.numbers(parser, "loads", given.loads)
    if max(given.loads) > 5:
        parser.error("--loads: each must be at most 5")
    arguments.positive(parser, given, ("repeat", "load_s"))
    return given


class PrefillCpu(PairExperiment):
    """One pair per policy and round, all loads and kinds of targets on it."""

    sent: list[PrefillLoad]

    def paced(self, cluster: Cluster, say: servers.Say) -> None:
        """Sets `sent`: the same requests at every load, `load_s` seconds of the middle one."""
        given = self.given
        middle = sorted(given.loads)[len(given.loads) // 2]
        seconds = driver.measure_prefill(cluster, self.rows, middle, say)
        total = np.cumsum(seconds)
        count = int(max(20, min(len(self.rows), np.searchsorted(total, middle * given.load_s))))
        capacity = count / float(total[count - 1])
        rng = Random(f"{given.seed}/tiers")
        fixed, factor = PROPORTIONAL
        targets = {
            "flat": [FLAT_MS] * count,
            "proportional": [fixed + factor * 1e3 * float(s) for s in seconds[:count]],
            "tiers": [rng.choice(TIERS_MS) for _ in range(count)],
        }
        base = traces.window(self.rows, n=count)
        rates = {share: traces.scale_rate(base, share * capacity) for share in given.loads}
        self.sent = [PrefillLoad(share, rows, targets) for share, rows in rates.items()]
        self.plan = loads.PacedTrace(base, FLAT_MS, TPOT_MS, given.seed, capacity)
        say(f"{count} requests; prefill capacity {capacity:.2f} req/s")

    def measure_pair(self, cluster: Cluster, trial: Trial) -> None:
        """Runs every load. Stock is sent once and judged under all kinds of targets."""
        for load in self.sent:
            kinds = list(load.targets)
            kairos = trial.policy == KAIROS
            judged = {kind: [kind] for kind in kinds} if kairos else {"flat": kinds}
            for kind, kinds_of_run in judged.items():
                servers.forget(cluster)
                before = servers.prefill_busy_s(cluster)
                result = load.send(cluster, kind, self.given.seed)
                busy = (servers.prefill_busy_s(cluster) - before) / load.rows[-1].arrival_s
                facts = {
                    "load": load.share,
                    "repeat": trial.turn,
                    "rate": traces.rate_of(load.rows),
                    "prefill_utilisation": round(busy, 3),
                    **(servers.kairos_reports(cluster) if kairos else {}),
                }
                for slo in kinds_of_run:
                    one = judge(result, load.targets[slo])
                    self.runs.append(report.Run(trial.policy, one, {"slo": slo, **facts}))
                    trial.say(f"load {load.share:g} {slo}: {driver.summary(one)}")

    def setup(self) -> dict[str, Any]:
        given = {"loads": self.given.loads, "rounds": self.given.repeat, "slo": SLO}
        left = ("ttft_ms", "rate_rps")
        return {k: v for k, v in super().setup().items() if k not in left} | given

    def text(self) -> str:
        return tables(self.runs)


def judge(result: Result, targets: Sequence[float]) -> Result:
    """Returns the same run under other TTFT targets."""
    outcomes = [copy.copy(outcome) for outcome in result.outcomes]
    for outcome in outcomes:
        outcome.ttft_slo_ms = targets[outcome.index]
    return Result(outcomes, result.duration_s)


def tables(runs: Sequence[report.Run]) -> str:
    """Returns a Markdown table per kind of target: TTFT met by load, and who pays."""
    cells: dict[tuple[str, str, float], list[Any]] = {}
    for run in runs:
        key = run.facts["slo"], run.policy, run.facts["load"]
        cells.setdefault(key, []).append(run.result.metrics)

    def cell(some: Sequence[Any]) -> str:
        met = [100 * metrics.ttft_attainment for metrics in some]
        p99 = mean((metrics.ttft_p99_ms or 0.0) / 1e3 for metrics in some)
        longest = max(metrics.longest_wait_ms for metrics in some) / 1e3
        return f"{page.spread(met, always=True)}; {p99:.1f} / {longest:.1f}"

    parts: list[str] = []
    at = sorted({load for _, _, load in cells})
    for kind in dict.fromkeys(kind for kind, _, _ in cells):
        parts += [
            f"### {kind}\n",
            "TTFT met %, mean (lowest–highest); p99 TTFT s / longest wait s\n",
        ]
        policies = dict.fromkeys(policy for slo, policy, _ in cells if slo == kind)
        rows = [[p, *(cell(cells[kind, p, load]) for load in at)] for p in policies]
        parts += [page.table(["policy", *(f"load {load:g}" for load in at)], rows), ""]
    failed = sum(run.result.metrics.failed for run in runs)
    return "\n".join([*parts, f"Failed requests in all runs: {failed}."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Returns the exit status."""
    return run_experiment(PrefillCpu, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
