"""Every simulated figure of the project, by one command: `make results` (about 12 minutes, 2 cores).

    python -m benchmark.results_simulated [--trace FILE …] [--quick]

Sweeps attainment over rates, looks for the rate at which stock fcfs meets half of its TTFT targets
and for the highest rate at which 90 % meet both, takes Kairos apart, and loads the decode side.
Writes ``docs/results/simulated.md``, its pictures and, with every run shown, ``simulated.json``.
Rates are found by looking, not set by hand, so any trace of the two formats will do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmark import results_page
from sglang_kairos.loads import traces
from sglang_kairos.reports.report import Run
from sglang_kairos.sim.baselines.policies import POLICIES, Policy
from sglang_kairos.sim.cli.grid import Cell, bound_available, bound_of, run_grid
from sglang_kairos.sim.cli.pool import Workers, usable_cores
from sglang_kairos.sim.core.cluster import Setup
from sglang_kairos.sim.core.predictions import PredictionError
from sglang_kairos.sim.hardware.times import SYSTEMS

SYSTEM = "minimax-m2.5-h200-tp4"
UPSTREAM = ("fcfs", "lpm", "hrrn", "shortest-prefill-first", "priority")
SWEPT = (*UPSTREAM, "edf", "kairos")
STEPS = (0.5, 0.75, 1.0, 1.25, 1.6)
"""Rates of a sweep, as shares of the one where fcfs meets half of its TTFT targets."""
HALVINGS = 7
HALF, HALF_ELSEWHERE = "rate where fcfs meets half", "other windows: rate where fcfs meets half"
GOODPUT, DECODE_HALF = "goodput", "decode: rate where stock meets half of its TPOT targets"
# Runs that only looked for a rate: left out of the JSON.
SEARCHES = frozenset((HALF, HALF_ELSEWHERE, GOODPUT, DECODE_HALF))
ATTAIN = 0.9
DEFAULT_TRACES = ("mooncake_conversation.jsonl", "azure_llm_2023_conv.csv")


@dataclass(frozen=True)
class Source:
    """Rows to take requests from, and what a user of such a service would be promised.

    `slos`: (TTFT tiers in ms, TPOT in ms). `tight_tpots_ms`: targets that load the decode side.
    """

    name: str
    rows: Sequence[traces.Request]
    requests: int
    slos: tuple[tuple[tuple[float, ...], float], ...]
    tight_tpots_ms: tuple[float, ...] = ()
    option: str = ""

    def window(self, start: int, count: int) -> list[traces.Request]:
        """`count` rows from row `start` on, the first at 0 s."""
        rows = self.rows[start : start + count]
        return [replace(row, arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


@dataclass(frozen=True)
class Group:
    """One trace window, SLO setting and shape; what the rates of a sweep have in common."""

    source: Source
    rows: tuple[traces.Request, ...]
    ttft_ms: tuple[float, ...]
    tpot_ms: float
    prefill: int
    decode: int
    seed: int = 0
    start: int = 0

    @property
    def slo(self) -> str:
        """As the simulator's command line has it."""
        return f"{'/'.join(f'{ms:g}' for ms in self.ttft_ms)}:{self.tpot_ms:g}"

    @property
    def shape(self) -> str:
        return f"{self.prefill}P{self.decode}D"

    @property
    def title(self) -> str:
        return f"{self.source.name}, {self.shape}, TTFT:TPOT {self.slo} ms"

    def command(self, rate: float, policies: str) -> str:
        """What simulates it, as a shell command."""
        limit = f" --limit {len(self.rows)}" if self.source.option.startswith("--trace") else ""
        return (
            f"python -m sglang_kairos.sim {self.source.option}{limit}"
            f" --rate {rate:.4g} --slo {self.slo} --prefill {self.prefill} --decode {self.decode}"
            f" --times law --seed {self.seed} --policies {policies}"
        )

    def cell(
        self,
        rate: float,
        policy: str | Policy,
        error: PredictionError | None = None,
        bound: bool = False,
        **facts: Any,
    ) -> Cell:
        """One simulation of it."""
        setup = Setup(
            SYSTEMS[SYSTEM],
            self.ttft_ms,
            self.tpot_ms,
            self.prefill,
            self.decode,
            self.seed,
            error or PredictionError(),
        )
        rows = _at_rate(self.rows, rate)
        asked = {"title": self.title, "asked_rate": rate, "trace": self.source.name}
        return Cell(rows, setup, policy, bound and bound_available(), facts={**asked, **facts})


_SCALED: dict[tuple[int, float], list[traces.Request]] = {}


def _at_rate(rows: tuple[traces.Request, ...], rate: float) -> list[traces.Request]:
    # One object per rate: bounds are shared between cells with the same rows.
    key = id(rows), rate
    if key not in _SCALED:
        _SCALED[key] = traces.scale_rate(rows, rate)
    return _SCALED[key]


class Bench:
    """Runs cells in the pool, keeps them all for the JSON, and tells how far it is."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self._began = workers, time.monotonic()
        self.runs: list[Run] = []

    def run(self, what: str, cells: Iterable[Cell]) -> list[Run]:
        """All runs, in order."""
        cells = list(cells)
        self.say(f"{what}: {len(cells)} runs")
        runs = run_grid(cells, self._workers, bound_seconds=15.0)
        self.runs += [replace(run, facts={**run.facts, "part": what}) for run in runs]
        return runs

    def bounds(self, what: str, cells: Sequence[Cell]) -> list[float]:
        """The clairvoyant bound of each cell's trace and targets."""
        self.say(f"{what}: {len(cells)} bounds")
        searches = [partial(bound_of, cell.rows, cell.setup, 5.0) for cell in cells]
        return [bound.ttft_attainment for bound in self._workers.run(searches)]

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s {text}", flush=True)


def highest_rates(
    bench: Bench,
    what: str,
    wanted: Sequence[tuple[Group, str | Policy]],
    metric: str,
    least: float,
    guess: Sequence[float],
) -> list[float]:
    """Per (group, policy) the highest rate at which `metric` is at least `least`, by halving.

    All searches advance together, so that the pool stays full. Attainment over rate is not quite
    monotone on a short trace: this finds one crossing, the lowest that halving comes across.
    """
    low = [0.0] * len(wanted)
    high = [2.0 * rate for rate in guess]
    open_ended = set(range(len(wanted)))
    for _ in range(12):  # until the upper end misses
        runs = bench.run(
            what, (wanted[i][0].cell(high[i], wanted[i][1]) for i in sorted(open_ended))
        )
        for i, run in zip(sorted(open_ended), runs, strict=True):
            if getattr(run.result.metrics, metric) >= least:
                low[i], high[i] = high[i], 2 * high[i]
            else:
                open_ended.discard(i)
        if not open_ended:
            break
    for _ in range(HALVINGS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        runs = bench.run(what, (g.cell(r, p) for (g, p), r in zip(wanted, middle, strict=True)))
        for i, run in enumerate(runs):
            met = getattr(run.result.metrics, metric) >= least
            low[i], high[i] = (middle[i], high[i]) if met else (low[i], middle[i])
    return [_rounded(rate) for rate in low]


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def offered(group: Group) -> float:
    """Requests/s that keep the prefill servers about busy: where looking starts."""
    system = SYSTEMS[SYSTEM]
    law = system.times.prefill_model()
    work = law.remaining_s([row.input_tokens for row in group.rows], 0.0, system.chunk_tokens)
    return group.prefill * len(group.rows) / float(work.sum())


def sources(given: argparse.Namespace) -> list[Source]:
    """The traces there are, and made ones."""
    quick = given.quick
    flat, tiers = ((2000.0,), 100.0), ((1000.0, 5000.0, 30000.0), 100.0)
    strict = ((4000.0,), 50.0)
    paths = list(given.trace)
    if not paths:
        beside = (Path("../shared/traces") / name for name in DEFAULT_TRACES)
        paths = [path for path in beside if path.is_file()]
    found: list[Source] = []
    for path in paths:
        rows = traces.read_trace(path)
        count = 300 if quick else 1000
        if rows[0].hash_ids is None:
            count *= 2
            slos = (((1000.0,), 100.0), ((300.0, 1000.0, 5000.0), 100.0), ((500.0,), 50.0))
            tight = (20.0, 25.0)
        else:
            slos, tight = (flat, tiers, strict), (15.0, 25.0)
        found.append(Source(path.stem, rows, count, slos, tight, f"--trace {path}"))
    for tail, shape in (
        ("lighter", {"median_input": 2000.0, "sigma_input": 0.6, "max_input": 32_000}),
        ("heavier", {"median_input": 2000.0, "sigma_input": 1.6, "max_input": 120_000}),
    ):
        count = 300 if quick else 1000
        shape |= {"median_output": 150.0, "sigma_output": 0.8, "max_output": 1000}
        made = traces.long_tail(count, 1.0, 0, **shape)
        flags = " ".join(f"--{k.replace('_', '-')} {v:g}" for k, v in shape.items())
        found.append(
            Source(f"made, {tail} tail", made, count, (flat,), (), f"--generate {count} {flags}")
        )
    return found


def groups_of(source: Source) -> list[Group]:
    """Every SLO setting at 1P1D; the first two at 2P2D with twice the requests."""
    small = tuple(source.window(0, source.requests))
    made = [Group(source, small, ttft, tpot, 1, 1) for ttft, tpot in source.slos]
    if len(source.slos) > 1:
        large = tuple(source.window(0, 2 * source.requests))
        made += [Group(source, large, ttft, tpot, 2, 2) for ttft, tpot in source.slos[:2]]
    return made


NO_PARKING = replace(POLICIES["kairos"], name="kairos-no-park", park=False)

ABLATIONS: dict[str, tuple[str | Policy, PredictionError]] = {
    "kairos": ("kairos", PredictionError()),
    "no pausing": ("kairos-no-pause", PredictionError()),
    "no prediction (deadlines only)": ("kairos", PredictionError(factor=0.01)),
    "predictions 30 % too long": ("kairos", PredictionError(factor=1.3)),
    "predictions 30 % too short": ("kairos", PredictionError(factor=0.7)),
    "predictions with 30 % noise": ("kairos", PredictionError(noise=0.3)),
    "predictors learn from nothing": ("kairos", PredictionError(learn=True)),
    "no parking": (NO_PARKING, PredictionError()),
    "no admission gate": ("kairos-no-gate", PredictionError()),
    "no pre-allocation order": ("kairos-no-reserve-order", PredictionError()),
    "prefill side only": ("kairos-prefill", PredictionError()),
    "decode side only": ("kairos-decode", PredictionError()),
    "router only": ("kairos-router", PredictionError()),
    "fcfs": ("fcfs", PredictionError()),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything and writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.results_simulated")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--trace", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--jobs", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true", help="few requests: a check of the script")
    given = parser.parse_args(argv)
    try:
        found = sources(given)
    except (OSError, traces.TraceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not any(source.tight_tpots_ms for source in found):
        print("note: no traces in ../shared/traces and no --trace: made ones only", flush=True)
    began = time.monotonic()
    with Workers(given.jobs) as workers:
        bench = Bench(workers)
        measured = measure(bench, found)
    given.out.mkdir(parents=True, exist_ok=True)
    minutes = (time.monotonic() - began) / 60
    results_page.write(given.out, measured, f"{minutes:.0f} minutes with {given.jobs} processes")
    rows = [_compact(run.row()) for run in bench.runs if run.facts["part"] not in SEARCHES]
    (given.out / "simulated.json").write_text(
        '{"runs": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n", encoding="utf-8"
    )
    bench.say(f"wrote {given.out / 'simulated.md'} and {given.out / 'simulated.json'}")
    return 0


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in row.items()
        if key != "counters"
    }


def measure(bench: Bench, found: Sequence[Source]) -> results_page.Measured:
    """All parts of the page."""
    groups = [group for source in found for group in groups_of(source)]
    half = highest_rates(
        bench,
        HALF,
        [(group, "fcfs") for group in groups],
        "ttft_attainment",
        0.5,
        [0.5 * offered(group) for group in groups],
    )
    for group, rate in zip(groups, half, strict=True):
        if rate == 0:
            bench.say(f"left out, fcfs does not meet half even when idle: {group.title}")
    groups = [group for group, rate in zip(groups, half, strict=True) if rate > 0]
    half = [rate for rate in half if rate > 0]
    sweeps = sweep(bench, groups, half)
    return results_page.Measured(
        system=SYSTEM,
        notes=SYSTEMS[SYSTEM].notes,
        sweeps=sweeps,
        windows=other_windows(bench, groups, half),
        goodput=goodput(bench, groups, half),
        ablations=ablations(bench, groups, half),
        decode=decode_side(bench, found),
        attain=ATTAIN,
        upstream=UPSTREAM,
    )


def sweep(bench: Bench, groups: Sequence[Group], half: Sequence[float]) -> list[results_page.Sweep]:
    """Attainment over rates, all policies."""
    cells = [
        group.cell(_rounded(rate * step), policy, bound=step == 1.0)
        for group, rate in zip(groups, half, strict=True)
        for step in STEPS
        for policy in SWEPT
    ]
    runs = iter(bench.run("sweep", cells))
    return [
        results_page.Sweep(
            group.title,
            group.shape,
            rate,
            {_rounded(rate * step): [next(runs) for _ in SWEPT] for step in STEPS},
            group.command(rate, ",".join(SWEPT)),
        )
        for group, rate in zip(groups, half, strict=True)
    ]


def other_windows(
    bench: Bench, groups: Sequence[Group], half: Sequence[float]
) -> list[results_page.Window]:
    """The same rate on other parts of the traces and other draws of the tiers: how sure is it?"""
    picked: list[tuple[Group, float]] = []
    for group, rate in zip(groups, half, strict=True):
        if group.prefill == 1 and group.source.tight_tpots_ms:
            total, size = len(group.source.rows), len(group.rows)
            for turn, start in enumerate((total // 3, 2 * total // 3), start=1):
                if start + size <= total:
                    rows = tuple(group.source.window(start, size))
                    picked.append((replace(group, rows=rows, start=start, seed=turn), rate))
    rates = highest_rates(
        bench,
        HALF_ELSEWHERE,
        [(group, "fcfs") for group, _ in picked],
        "ttft_attainment",
        0.5,
        [rate for _, rate in picked],
    )
    picked = [pair for pair, rate in zip(picked, rates, strict=True) if rate > 0]
    rates = [rate for rate in rates if rate > 0]
    policies = (*UPSTREAM, "kairos")
    cells = [
        group.cell(rate, policy, bound=True)
        for (group, _), rate in zip(picked, rates, strict=True)
        for policy in policies
    ]
    runs = iter(bench.run("other windows", cells))
    return [
        results_page.Window(group.title, group.start, rate, [next(runs) for _ in policies])
        for (group, _), rate in zip(picked, rates, strict=True)
    ]


def goodput(
    bench: Bench, groups: Sequence[Group], half: Sequence[float]
) -> list[results_page.Goodput]:
    """The highest rate at which 90 % meet both targets."""
    policies = ("fcfs", "hrrn", "shortest-prefill-first", "kairos")
    picked = [(g, r) for g, r in zip(groups, half, strict=True) if g.prefill == 1]
    wanted: list[tuple[Group, str | Policy]] = [(g, p) for g, _ in picked for p in policies]
    rates = iter(
        highest_rates(
            bench,
            GOODPUT,
            wanted,
            "e2e_attainment",
            ATTAIN,
            [0.7 * r for _, r in picked for _ in policies],
        )
    )
    most = iter(bounded_rates(bench, picked) if bound_available() else [None] * len(picked))
    return [
        results_page.Goodput(g.title, {p: next(rates) for p in policies}, next(most))
        for g, _ in picked
    ]


def bounded_rates(bench: Bench, picked: Sequence[tuple[Group, float]]) -> list[float | None]:
    """Highest rate at which a clairvoyant scheduler could still have 90 % meet their TTFT."""
    low, high = [0.0] * len(picked), [4.0 * rate for _, rate in picked]
    for _ in range(HALVINGS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        cells = [g.cell(rate, "fcfs") for (g, _), rate in zip(picked, middle, strict=True)]
        bounds = bench.bounds("goodput, clairvoyant", cells)
        for i, share in enumerate(bounds):
            low[i], high[i] = (middle[i], high[i]) if share >= ATTAIN else (low[i], middle[i])
    return [_rounded(rate) for rate in high]


def ablations(
    bench: Bench, groups: Sequence[Group], half: Sequence[float]
) -> list[results_page.Ablation]:
    """Kairos less one part at a time, where fcfs meets half."""
    made: list[results_page.Ablation] = []
    for group, rate in zip(groups, half, strict=True):
        if not group.source.tight_tpots_ms or group.slo.endswith(":50"):
            continue
        cells = [
            group.cell(rate, policy, error, variant=name)
            for name, (policy, error) in ABLATIONS.items()
        ]
        runs = bench.run(f"ablations, {group.title}", cells)
        made.append(
            results_page.Ablation(group.title, rate, dict(zip(ABLATIONS, runs, strict=True)))
        )
    return made


def decode_side(bench: Bench, found: Sequence[Source]) -> list[results_page.DecodeLoad]:
    """Prefill servers enough: the decode server is what is short. Stock packing against Kairos'.

    The prefill side is Kairos' in both, so that only the decode side differs; fcfs is stock on
    both sides.
    """
    policies = tuple(results_page.DECODE_COLUMNS)
    picked: list[tuple[Group, float]] = []
    for source in found:
        rows = tuple(source.window(0, source.requests))
        for tpot_ms in source.tight_tpots_ms:
            ttft_ms = source.slos[0][0]
            wide = Group(source, rows, ttft_ms, tpot_ms, 8, 1)
            picked.append((wide, 0.0))
    if not picked:
        return []
    limits = highest_rates(
        bench,
        DECODE_HALF,
        [(group, "kairos-prefill") for group, _ in picked],
        "tpot_attainment",
        0.5,
        [0.25 * offered(group) for group, _ in picked],
    )
    picked = [pair for pair, limit in zip(picked, limits, strict=True) if limit > 0]
    limits = [limit for limit in limits if limit > 0]
    shares = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
    cells = [
        group.cell(_rounded(limit * share), policy)
        for (group, _), limit in zip(picked, limits, strict=True)
        for share in shares
        for policy in policies
    ]
    runs = iter(bench.run("decode", cells))
    return [
        results_page.DecodeLoad(
            group.title,
            {_rounded(limit * share): [next(runs) for _ in policies] for share in shares},
            group.command(limit, ",".join(policies)),
        )
        for (group, _), limit in zip(picked, limits, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
