"""Prefill on real SGLang servers (CPU): upstream's orders and Kairos, three kinds of targets.

    python -m benchmark.prefill_cpu --json out/prefill_cpu.json       # about 25 minutes, 3 rounds

Policies alternate, the order reversed from round to round, each on a fresh prefill/decode pair (the
demo's). A policy of upstream's knows no targets, so one run of it is judged under all of them; Kairos
runs once for each. All send the same trace at the same rates: `--loads` of the prefill capacity that
the first pair is measured to have, less what the machine's other processes take (see demo.py).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import numpy as np

from benchmark import demo
from sglang_kairos.cluster.run import Cluster, ClusterError
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Outcome, Result, make_jobs, replay, run
from sglang_kairos.reports import report

STOCK = ("fcfs", "lpm", "hrrn", "shortest-prefill-first")
POLICIES = (*STOCK, demo.KAIROS)
TPOT_MS = 75.0
FLAT_MS = 1000.0
TIERS_MS = (500.0, 2000.0, 10_000.0)
# Length-proportional: so much, and that many times the prompt's prefill time on an idle server.
PROPORTIONAL = (300.0, 4.0)

Targets = list[float]
"""TTFT target in ms, per row of the trace."""


@dataclass(frozen=True)
class Load:
    """One rate: the rows to send, and every request's TTFT target under each kind."""

    share: float
    rows: list[traces.Request]
    targets: dict[str, Targets]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with demo.start_method(given) as zygote:
            runs = run_all(given, zygote)
    except (ClusterError, traces.TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything stopped", file=sys.stderr)
        return 130
    text = tables(runs)
    print(text)
    if given.markdown:
        given.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, filled up with what the demo's functions want to know."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.prefill_cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--loads", default="0.7,0.9,1.1", help="shares of the prefill capacity")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--load-s", type=float, default=25.0, help="seconds of arrivals per run")
    parser.add_argument("--trace", type=Path, help="instead of our own (docs/simulator.md)")
    traces.add_reading_options(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("out/prefill_cpu.json"))
    parser.add_argument("--markdown", type=Path, help="also write the tables there")
    parser.add_argument("--out", type=Path, default=Path("out/prefill_cpu"), help="logs")
    given = parser.parse_args(argv)
    given.policies = given.policies.split(",")
    unknown = [name for name in given.policies if name not in POLICIES]
    if unknown:
        parser.error(f"--policies: {', '.join(unknown)}; known: {', '.join(POLICIES)}")
    try:
        given.loads = [float(share) for share in given.loads.split(",")]
    except ValueError:
        parser.error(f"--loads: numbers with commas, got {given.loads!r}")
    if not all(0 < share <= 5 for share in given.loads):
        parser.error("--loads: each must be above 0 and at most 5")
    if given.repeat < 1 or not given.load_s > 0:
        parser.error("--repeat and --load-s must be positive")
    defaults = demo.parse([])
    for name, value in vars(defaults).items():
        if not hasattr(given, name):
            setattr(given, name, value)
    return given


def run_all(given: argparse.Namespace, zygote: Any) -> list[report.Run]:
    """Every round, policy, load and kind of target; the JSON is rewritten after each policy."""
    runs: list[report.Run] = []
    loads: list[Load] = []
    for turn in range(given.repeat):
        for policy in given.policies[:: -1 if turn % 2 else 1]:
            say = demo.narrator(f"[round {turn + 1}/{given.repeat} {policy}]")
            spec = demo.spec_for(policy, given, zygote, say, turn)
            with Cluster(spec) as cluster:
                demo.separate(cluster)
                demo.warm_up(cluster)
                if not loads:
                    loads = plan(cluster, given, say)
                for run_ in one_cluster(cluster, policy, loads, turn, given, say):
                    runs.append(run_)
            report.write_json(given.json, runs, setup(given, loads))
    return runs


def plan(cluster: Cluster, given: argparse.Namespace, say: Callable[[str], None]) -> list[Load]:
    """The same requests at every load, `load_s` seconds of them at the middle one."""
    rows = demo.base_trace(given)
    middle = sorted(given.loads)[len(given.loads) // 2]
    seconds = demo.measure_prefill(cluster, rows, middle, say)
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
        Load(share, traces.scale_rate(base, share * capacity), targets) for share in given.loads
    ]


def one_cluster(
    cluster: Cluster,
    policy: str,
    loads: Sequence[Load],
    turn: int,
    given: argparse.Namespace,
    say: Callable[[str], None],
) -> Iterator[report.Run]:
    """All runs of a policy in one round."""
    for load in loads:
        kinds = list(load.targets)
        if policy == demo.KAIROS:
            judged = {kind: [kind] for kind in kinds}
        else:
            judged = {"flat": kinds}
        for sent, kinds_of_run in judged.items():
            demo.forget(cluster)
            before = demo.prefill_busy_s(cluster)
            result = send(cluster, load, load.targets[sent], given.seed)
            busy = (demo.prefill_busy_s(cluster) - before) / load.rows[-1].arrival_s
            for kind in kinds_of_run:
                facts = {
                    "slo": kind,
                    "load": load.share,
                    "repeat": turn,
                    "rate": traces.rate_of(load.rows),
                    "prefill_utilisation": round(busy, 3),
                }
                if policy == demo.KAIROS:
                    facts |= demo.kairos_reports(cluster)
                one = report.Run(policy, judge(result, load.targets[kind]), facts)
                metrics = one.result.metrics
                say(
                    f"load {load.share:g} {kind}: TTFT met {100 * metrics.ttft_attainment:.1f} %, "
                    f"failed {metrics.failed}, prefill busy {100 * busy:.0f} %"
                )
                yield one


def send(cluster: Cluster, load: Load, targets: Targets, seed: int) -> Result:
    """Replays the load open loop."""
    by_row = dict(zip(map(id, load.rows), targets, strict=True))
    jobs = make_jobs(load.rows, lambda row: by_row[id(row)], TPOT_MS, seed=seed)
    return run(replay(cluster.url, jobs, timeout_s=demo.TIMEOUT_S, check=cluster.check))


def judge(result: Result, targets: Targets) -> Result:
    """The same run under other TTFT targets."""
    outcomes: list[Outcome] = []
    for outcome in result.outcomes:
        other = copy.copy(outcome)
        other.ttft_slo_ms = targets[outcome.index]
        outcomes.append(other)
    return Result(outcomes, result.duration_s)


def setup(given: argparse.Namespace, loads: Sequence[Load]) -> dict[str, Any]:
    """What was run, for the JSON."""
    rows = loads[0].rows if loads else []
    return {
        "platform": demo.platform(),
        "requests": len(rows),
        "loads": given.loads,
        "rounds": given.repeat,
        "tpot_ms": TPOT_MS,
        "slo": {
            "flat": {"ttft_ms": FLAT_MS},
            "proportional": {
                "ttft_ms": f"{PROPORTIONAL[0]:g} + {PROPORTIONAL[1]:g} x prefill time"
            },
            "tiers": {"ttft_ms": list(TIERS_MS)},
        },
        "chunk_tokens": demo.CHUNK_TOKENS,
        "seed": given.seed,
        "input_tokens": demo.quantiles([row.input_tokens for row in rows]),
        "output_tokens": demo.quantiles([row.output_tokens for row in rows]),
    }


def tables(runs: Sequence[report.Run]) -> str:
    """One Markdown table per kind of target: TTFT met by load, and who pays."""
    parts: list[str] = []
    loads = sorted({run_.facts["load"] for run_ in runs})
    for kind in dict.fromkeys(run_.facts["slo"] for run_ in runs):
        parts.append(
            f"### {kind}\n\nTTFT met %, mean (lowest–highest); p99 TTFT s / longest wait s\n"
        )
        parts.append("| policy | " + " | ".join(f"load {load:g}" for load in loads) + " |")
        parts.append("|---|" + "---|" * len(loads))
        for policy in dict.fromkeys(run_.policy for run_ in runs):
            cells = []
            for load in loads:
                some = [
                    run_.result.metrics
                    for run_ in runs
                    if (run_.policy, run_.facts["slo"], run_.facts["load"]) == (policy, kind, load)
                ]
                met = [100 * metrics.ttft_attainment for metrics in some]
                p99 = mean((metrics.ttft_p99_ms or 0.0) / 1e3 for metrics in some)
                longest = max(metrics.longest_wait_ms for metrics in some) / 1e3
                cells.append(
                    f"{mean(met):.1f} ({min(met):.1f}–{max(met):.1f}); {p99:.1f} / {longest:.1f}"
                )
            parts.append(f"| {policy} | " + " | ".join(cells) + " |")
        parts.append("")
    failed = sum(run_.result.metrics.failed for run_ in runs)
    parts.append(f"Failed requests in all runs: {failed}.")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
