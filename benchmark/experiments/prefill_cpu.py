"""Prefill on real SGLang servers (CPU): upstream's orders and Kairos, three kinds of targets.

    python -m benchmark.experiments.prefill_cpu --json out/prefill_cpu.json   # 25 minutes, 3 rounds

Policies alternate, the order reversed from round to round, each on a fresh prefill/decode pair. A
policy of upstream's knows no targets, so one run of it is judged under all of them. Kairos runs once
for each. All send the same trace at the same rates: `--loads` of the prefill capacity that the first
pair is measured to have, while it also decodes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import numpy as np

from benchmark.harness import arguments, page
from benchmark.harness.experiment import Experiment, Say, Trial, run_experiment
from benchmark.harness.loads import base_trace, lengths
from benchmark.harness.servers import (
    CHUNK_TOKENS,
    KAIROS,
    TIMEOUT_S,
    forget,
    kairos_reports,
    measure_prefill,
    pair_spec,
    platform,
    prefill_busy_s,
    warm_cluster,
)
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Outcome, Result, make_jobs, replay, run
from sglang_kairos.reports import report

POLICIES = ("fcfs", "lpm", "hrrn", "shortest-prefill-first", KAIROS)
TPOT_MS = 75.0
FLAT_MS = 1000.0
TIERS_MS = (500.0, 2000.0, 10_000.0)
# Length-proportional: so much, and that many times the prompt's prefill time on an idle server.
PROPORTIONAL = (300.0, 4.0)

Targets = list[float]
"""TTFT target in ms, per row of the trace."""


@dataclass(frozen=True)
class JudgedLoad:
    """One rate: the rows to send, and every request's TTFT target under each kind."""

    share: float
    rows: list[traces.Request]
    targets: dict[str, Targets]


class PrefillCpu(Experiment):
    """A pair per policy and round; it serves all loads and kinds of targets."""

    plan: Sequence[JudgedLoad] = ()

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = arguments.parser_for(
            "benchmark.experiments.prefill_cpu",
            __doc__,
            policies=",".join(POLICIES),
            repeat=3,
            load_s=25.0,
            seed=0,
            json=Path("out/prefill_cpu.json"),
            out=Path("out/prefill_cpu"),
        )
        parser.add_argument("--loads", default="0.7,0.9,1.1", help="shares of prefill capacity")
        parser.add_argument("--trace", type=Path, help="instead of our own (docs/simulator.md)")
        traces.add_reading_options(parser)
        parser.add_argument("--markdown", type=Path, help="also write the tables there")
        given = parser.parse_args(argv)
        given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
        given.loads = arguments.numbers(parser, "loads", given.loads)
        if max(given.loads) > 5:
            parser.error("--loads: each must be above 0 and at most 5")
        arguments.positive(parser, given, ("repeat", "load_s"))
        return given

    def measure(self, trial: Trial) -> None:
        spec = pair_spec(trial.policy, self.given, self.zygote, trial.say, trial.name)
        with warm_cluster(spec) as cluster:
            self.plan = self.plan or self.find_loads(cluster, trial.say)
            for load in self.plan:
                self.runs += self.one_load(cluster, load, trial)

    def find_loads(self, cluster: Cluster, say: Say) -> list[JudgedLoad]:
        """Returns the same requests at every load, `load_s` seconds of them at the middle one."""
        given, rows = self.given, base_trace(self.given)
        middle = sorted(given.loads)[len(given.loads) // 2]
        seconds = measure_prefill(cluster, rows, middle, say)
        total = np.cumsum(seconds)
        count = int(max(20, min(len(rows), np.searchsorted(total, middle * given.load_s))))
        capacity = count / float(total[count - 1])
        rng = Random(f"{given.seed}/tiers")
        fixed, factor = PROPORTIONAL
        targets = {
            "flat": [FLAT_MS] * count,
            "proportional": [fixed + factor * 1e3 * float(s) for s in seconds[:count]],
            "tiers": [rng.choice(TIERS_MS) for _ in range(count)],
        }
        base = traces.window(rows, n=count)
        say(f"{count} requests; prefill capacity {capacity:.2f} req/s")
        return [
            JudgedLoad(share, traces.scale_rate(base, share * capacity), targets)
            for share in given.loads
        ]

    def one_load(self, cluster: Cluster, load: JudgedLoad, trial: Trial) -> Iterator[report.Run]:
        """Yields all runs of a policy at one load, one per kind of targets."""
        kinds = list(load.targets)
        ours = trial.policy == KAIROS
        for sent, judged in {kind: [kind] for kind in kinds}.items() if ours else [("flat", kinds)]:
            forget(cluster)
            before = prefill_busy_s(cluster)
            result = send(cluster, load, load.targets[sent], self.given.seed)
            busy = (prefill_busy_s(cluster) - before) / load.rows[-1].arrival_s
            for kind in judged:
                facts = {
                    "slo": kind,
                    "load": load.share,
                    "repeat": trial.turn,
                    "rate": traces.rate_of(load.rows),
                    "prefill_utilisation": round(busy, 3),
                    **(kairos_reports(cluster) if ours else {}),
                }
                one = report.Run(trial.policy, judge(result, load.targets[kind]), facts)
                metrics = one.result.metrics
                trial.say(
                    f"load {load.share:g} {kind}: TTFT met {100 * metrics.ttft_attainment:.1f} %, "
                    f"failed {metrics.failed}, prefill busy {100 * busy:.0f} %"
                )
                yield one

    def setup(self) -> dict[str, Any]:
        given, rows = self.given, self.plan[0].rows
        proportional = f"{PROPORTIONAL[0]:g} + {PROPORTIONAL[1]:g} x prefill time"
        return {
            "platform": platform(),
            "requests": len(rows),
            "loads": given.loads,
            "rounds": given.repeat,
            "tpot_ms": TPOT_MS,
            "slo": {
                "flat": {"ttft_ms": FLAT_MS},
                "proportional": {"ttft_ms": proportional},
                "tiers": {"ttft_ms": list(TIERS_MS)},
            },
            "chunk_tokens": CHUNK_TOKENS,
            "seed": given.seed,
            **lengths(rows),
        }

    def text(self) -> str:
        text = tables(self.runs)
        if self.given.markdown:
            self.given.markdown.write_text(text + "\n", encoding="utf-8")
        return text


def send(cluster: Cluster, load: JudgedLoad, targets: Targets, seed: int) -> Result:
    """Replays the load open loop."""
    by_row = dict(zip(map(id, load.rows), targets, strict=True))
    jobs = make_jobs(load.rows, lambda row: by_row[id(row)], TPOT_MS, seed=seed)
    return run(replay(cluster.url, jobs, timeout_s=TIMEOUT_S, check=cluster.check))


def judge(result: Result, targets: Targets) -> Result:
    """Returns the same run under other TTFT targets."""
    outcomes: list[Outcome] = []
    for outcome in result.outcomes:
        other = copy.copy(outcome)
        other.ttft_slo_ms = targets[outcome.index]
        outcomes.append(other)
    return Result(outcomes, result.duration_s)


def tables(runs: Sequence[report.Run]) -> str:
    """Returns one Markdown table per kind of target: TTFT met by load, and who pays."""
    parts: list[str] = []
    loads = sorted({one.facts["load"] for one in runs})
    cells: dict[tuple[str, str, float], list[Any]] = {}
    for one in runs:
        key = one.facts["slo"], one.policy, one.facts["load"]
        cells.setdefault(key, []).append(one.result.metrics)
    policies = list(dict.fromkeys(one.policy for one in runs))
    for kind in dict.fromkeys(one.facts["slo"] for one in runs):
        title = "TTFT met %, mean (lowest–highest); p99 TTFT s / longest wait s"
        rows = [
            [policy, *(_cell(cells[kind, policy, load]) for load in loads)] for policy in policies
        ]
        header = ["policy", *(f"load {load:g}" for load in loads)]
        parts += [f"### {kind}\n\n{title}\n", page.table(header, rows), ""]
    failed = sum(one.result.metrics.failed for one in runs)
    parts.append(f"Failed requests in all runs: {failed}.")
    return "\n".join(parts)


def _cell(some: Sequence[Any]) -> str:
    met = [100 * metrics.ttft_attainment for metrics in some]
    p99 = mean((metrics.ttft_p99_ms or 0.0) / 1e3 for metrics in some)
    longest = max(metrics.longest_wait_ms for metrics in some) / 1e3
    return f"{mean(met):.1f} ({min(met):.1f}–{max(met):.1f}); {p99:.1f} / {longest:.1f}"


if __name__ == "__main__":
    sys.exit(run_experiment(PrefillCpu))
