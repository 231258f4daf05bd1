"""Policies against each other: rates x SLOs x seeds x policies, as tables, JSON and plots."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from sglang_kairos.commands import parser_of
from sglang_kairos.reports.report import Run, by_policy, table, write_json
from sglang_kairos.sim.cli import options
from sglang_kairos.sim.cli.grid import Cell, SimResult, bound_available, run_grid
from sglang_kairos.sim.cli.plots import Group, draw_all
from sglang_kairos.sim.cli.progress import progress_bar

DEFAULT_POLICIES = ("fcfs", "lpm", "hrrn", "shortest-prefill-first", "priority", "edf", "kairos")


def parser() -> argparse.ArgumentParser:
    """The command line without a subcommand."""
    made = parser_of(
        "sim",
        description="Simulate a PD cluster under a trace, with the servers' own decisions.\n"
        "How many servers do I need? `kairos plan` says it.",
    )
    options.add_trace_options(made)
    options.add_run_options(made, DEFAULT_POLICIES)
    for side in ("prefill", "decode"):
        made.add_argument(
            f"--{side}",
            type=options.whole(f"--{side}", 1, 1024),
            default=1,
            help=f"{side} servers (default 1)",
        )
    made.add_argument(
        "--bound",
        action=argparse.BooleanOptionalAction,
        help="also the most TTFT targets that any order could meet (default: if scipy is there)",
    )
    made.add_argument(
        "--bound-seconds",
        type=options.real("--bound-seconds", 0.1, 86_400),
        default=60.0,
        help="the longest search for one bound (default %(default)g)",
    )
    made.add_argument("--plots", metavar="DIR", help="draw PNG files there (needs matplotlib)")
    return made


def compare(args: argparse.Namespace) -> None:
    """Simulates, prints, writes. Raises `UsageError`, `TraceError` and `OSError`."""
    options.check_together(args)
    if args.bound and not bound_available():
        raise options.UsageError('--bound needs scipy: pip install "sglang-kairos[sim]"')
    want_bound = bound_available() if args.bound is None else args.bound
    folder = None if args.plots is None else _plot_folder(args.plots)
    source, system = options.TraceSource(args), options.system_of(args)

    cells: list[Cell] = []
    wanted = [(rate, slo) for rate in args.rate or [None] for slo in options.targets_of(args)]
    for rate, slo in wanted:
        for seed in args.seed:
            rows = source.rows(rate, seed)
            setup = options.setup_of(args, system, slo, seed, args.prefill, args.decode)
            cells += [Cell(rows, setup, name, want_bound) for name in args.policies]
    started = time.monotonic()
    with progress_bar("simulations") as progress:
        runs = run_grid(
            cells,
            args.jobs,
            keep_outcomes=folder is not None,
            bound_seconds=args.bound_seconds,
            progress=progress,
        )
    wall_s = time.monotonic() - started

    width = len(args.seed) * len(args.policies)
    groups = []
    for number, (asked, slo) in enumerate(wanted):
        some = runs[number * width : (number + 1) * width]
        groups.append(_group(args, str(source), asked, slo, some))
    if args.json is not None:
        shape = {"prefill": args.prefill, "decode": args.decode}
        write_json(Path(args.json), runs, {**options.described(args, system), **shape})
    drawn = [] if folder is None else draw_all(folder, groups)
    for group in groups:
        print("\n".join([table(group.runs, group.title), *_bound_line(group.runs)]), end="\n\n")
    print(_cost_line(runs, wall_s, args.jobs), *(f"drawn: {path}" for path in drawn), sep="\n")


def _group(
    args: argparse.Namespace,
    source: str,
    asked: float | None,
    slo: options.TargetSet,
    runs: list[Run],
) -> Group:
    # A made trace's rate differs a little from seed to seed.
    rates = [run.facts["rate"] for run in runs if run.facts["rate"] is not None]
    about = f"{args.system}, {args.prefill}P{args.decode}D, {source}"
    return Group(about, slo, asked, mean(rates) if rates else None, runs)


def _bound_line(runs: Sequence[Run]) -> list[str]:
    """How far each policy gets to what is possible at all; nothing without bounds."""
    if any(run.facts["ttft_bound"] is None for run in runs):
        return []
    most = mean(run.facts["ttft_bound"] for run in runs)
    exact = "exact" if all(run.facts["bound_exact"] for run in runs) else "or fewer"
    methods = ", ".join(sorted({run.facts["bound_method"] for run in runs}))
    shares = [
        f"{policy} {100 * mean(run.facts['share_of_bound'] for run in group):.1f}"
        for policy, group in by_policy(runs).items()
    ]
    return [
        f"at most {100 * most:.1f} % of TTFT targets can be met ({exact}; {methods}); % of that: "
        + ", ".join(shares)
    ]


def _cost_line(runs: Sequence[Run], wall_s: float, jobs: int) -> str:
    cpu_s = sum(run.result.cpu_s for run in runs if isinstance(run.result, SimResult))
    simulated = sum(run.result.metrics.sent for run in runs)
    return (
        f"{simulated} requests simulated in {cpu_s:.1f} s of CPU "
        f"({simulated / max(cpu_s, 1e-9) * 60:,.0f} a minute), {wall_s:.1f} s with --jobs {jobs}"
    )


def _plot_folder(name: str) -> Path:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise options.UsageError(
            '--plots needs matplotlib: pip install "sglang-kairos[sim]"'
        ) from None
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
