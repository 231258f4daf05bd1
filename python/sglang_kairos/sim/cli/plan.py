"""``kairos plan``: how many prefill and decode servers do I need?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_kairos.commands import parser_of
from sglang_kairos.loads.traces import rate_of
from sglang_kairos.sim.cli import options
from sglang_kairos.sim.cli.grid import Cell, run_grid
from sglang_kairos.sim.cli.pool import Progress, Workers
from sglang_kairos.sim.cli.progress import progress_bar
from sglang_kairos.sim.cli.sizing import Search, Shape, search_together
from sglang_kairos.sim.hardware.times import System

METRICS = {
    "ttft": ("ttft_attainment", "the TTFT target"),
    "tpot": ("tpot_attainment", "the TPOT target"),
    "e2e": ("e2e_attainment", "both targets"),
}


class Question(NamedTuple):
    """One search: the servers that this policy needs for this rate and SLO."""

    rate: float | None
    slo: options.TargetSet
    policy: str


class Attained(NamedTuple):
    """Shares of the requests that met a target, each the lowest of all seeds."""

    ttft: float
    tpot: float
    e2e: float


def parser() -> argparse.ArgumentParser:
    """Returns the parser of ``kairos plan``."""
    made = parser_of(
        "plan",
        description="Find the fewest prefill and decode servers, per policy, that keep the promise."
        "\nOf equally many it takes those with fewer prefill servers.",
    )
    made.add_argument(
        "--attain",
        type=options.real("--attain", 0.01, 1),
        default=0.9,
        help="share of requests that must meet their targets, with every seed (default 0.9)",
    )
    made.add_argument(
        "--metric",
        choices=sorted(METRICS),
        default="e2e",
        help="which target counts: TTFT, TPOT or both (default e2e: both)",
    )
    made.add_argument(
        "--max-servers",
        type=options.whole("--max-servers", 2, 256),
        default=32,
        help="prefill and decode servers together, at most (default %(default)s)",
    )
    options.add_trace_options(made)
    options.add_run_options(made, ("kairos", "fcfs"))
    return made


def plan(args: argparse.Namespace) -> None:
    """Searches, prints, writes. Raises `UsageError`, `TraceError` and `OSError`."""
    options.check_together(args)
    source, system = options.TraceSource(args), options.system_of(args)
    questions = [
        Question(rate, slo, policy)
        for rate in args.rate or [None]
        for slo in options.targets_of(args)
        for policy in args.policies
    ]
    with Workers(args.jobs) as workers, progress_bar("simulations") as progress:
        bench = _Bench(args, source, system, workers, progress)
        searches = {one: Search(args.attain, args.max_servers) for one in questions}
        answers = search_together(searches, bench.probe)
    if args.json is not None:
        report = {
            "plans": [_row(args, one, answers[one], bench.attained[one]) for one in questions],
            "setup": {
                **options.described(args, system),
                "max_servers": args.max_servers,
                "seeds": args.seed,
            },
        }
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for number, question in enumerate(questions):
        if number % len(args.policies) == 0:
            print(_heading(args, source, question), end="\n\n")
        print(_told(args, question.policy, answers[question], bench.attained[question]))
        if (number + 1) % len(args.policies) == 0:
            print()


class _Bench:
    """Simulates shapes, and remembers what they attained."""

    def __init__(
        self,
        args: argparse.Namespace,
        source: options.TraceSource,
        system: System,
        workers: Workers,
        progress: Progress | None,
    ) -> None:
        self._args, self._source, self._system = args, source, system
        self._workers, self._progress = workers, progress
        self._done = 0
        self.attained: dict[Question, dict[Shape, Attained]] = {}

    def probe(self, pairs: Sequence[tuple[Question, Shape]]) -> list[float]:
        """Returns the attainment that counts, for each pair."""
        args = self._args
        cells = [
            Cell(
                self._source.rows(one.rate, seed),
                options.setup_of(args, self._system, one.slo, seed, *shape),
                one.policy,
            )
            for one, shape in pairs
            for seed in args.seed
        ]
        runs = run_grid(cells, self._workers, progress=self._show)
        self._done += len(cells)
        values = []
        for number, (one, shape) in enumerate(pairs):
            repeats = runs[number * len(args.seed) : (number + 1) * len(args.seed)]
            metrics = [run.result.metrics for run in repeats]
            lowest = Attained(
                *(min(getattr(m, name) for m in metrics) for name, _ in METRICS.values())
            )
            self.attained.setdefault(one, {})[shape] = lowest
            values.append(float(getattr(lowest, args.metric)))
        return values

    def _show(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(self._done + done, self._done + total)


def _heading(args: argparse.Namespace, source: options.TraceSource, question: Question) -> str:
    rate = rate_of(source.rows(question.rate, args.seed[0]))
    seeds = f", lowest of {len(args.seed)} seeds" if len(args.seed) > 1 else ""
    return (
        f"simulated: {args.system}, {source}, {rate:.3g} req/s, {question.slo}: at least "
        f"{100 * args.attain:g} % must meet {METRICS[args.metric][1]}{seeds}"
    )


def _told(
    args: argparse.Namespace,
    policy: str,
    answer: Shape | None,
    attained: Mapping[Shape, Attained],
) -> str:
    def percent(shape: Shape) -> str:
        return f"{100 * getattr(attained[shape], args.metric):.1f} %"

    if answer is None:
        best = max(attained, key=lambda shape: getattr(attained[shape], args.metric))
        return (
            f"{policy}: not with {args.max_servers} servers; "
            f"of those tried {best} came closest with {percent(best)}"
        )
    whole = ", ".join(
        f"{name.upper() if name != 'e2e' else 'both'} {100 * getattr(attained[answer], name):.1f} %"
        for name in METRICS
    )
    beside = ", ".join(f"{shape} {percent(shape)}" for shape in _beside(answer, attained))
    return f"{policy}: {answer}, {answer.servers} servers: {whole}\n  next to it: {beside or '-'}"


def _beside(answer: Shape, attained: Mapping[Shape, Attained]) -> list[Shape]:
    near = [
        shape
        for shape in attained
        if shape != answer and max(abs(shape[i] - answer[i]) for i in (0, 1)) == 1
    ]
    return sorted(near, key=lambda shape: shape.cost)


def _row(
    args: argparse.Namespace,
    question: Question,
    answer: Shape | None,
    attained: Mapping[Shape, Attained],
) -> dict[str, Any]:
    def described(shape: Shape) -> dict[str, Any]:
        return {**shape._asdict(), "servers": shape.servers, **attained[shape]._asdict()}

    return {
        "policy": question.policy,
        "rate": question.rate,
        "slo": {"ttft_ms": list(question.slo.ttft), "tpot_ms": question.slo.tpot},
        "attain": args.attain,
        "metric": args.metric,
        "answer": None if answer is None else described(answer),
        "tried": [described(shape) for shape in sorted(attained, key=lambda one: one.cost)],
    }
