"""Every simulated figure of the project, by one command: `make results` (about 12 minutes, 2 cores).

    python -m benchmark.experiments.results_simulated [--trace FILE …] [--quick]

Sweeps attainment over rates, takes Kairos apart, and loads the decode side. Looks for two rates:
where stock fcfs meets half of its TTFT targets, and the highest at which 90 % meet both. Writes
``docs/results/simulated.md``, its pictures and, with every run shown, ``simulated.json``. Rates are
found by looking, not set by hand, so any trace of the known formats will do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.experiments import results_page
from benchmark.experiments.results_page import GoodputRates, RateSweep, SimulatedResults
from benchmark.experiments.results_traces import (
    SYSTEM,
    SampledTrace,
    TraceWindow,
    rounded,
    sources,
    windows_of,
)
from sglang_kairos.loads import traces
from sglang_kairos.reports.report import Run
from sglang_kairos.sim.baselines.policies import POLICIES, Policy
from sglang_kairos.sim.cli.grid import Cell, bound_available, bound_of, run_grid
from sglang_kairos.sim.cli.pool import Workers, usable_cores
from sglang_kairos.sim.core.predictions import PredictionError
from sglang_kairos.sim.hardware.times import SYSTEMS

UPSTREAM = ("fcfs", "lpm", "hrrn", "shortest-prefill-first", "priority")
SWEPT = (*UPSTREAM, "edf", "kairos")
GOODPUT_OF = ("fcfs", "hrrn", "shortest-prefill-first", "kairos")
STEPS = (0.5, 0.75, 1.0, 1.25, 1.6)
"""Rates of a sweep, as shares of the one where fcfs meets half of its TTFT targets."""
DECODE_STEPS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)
HALVINGS = 7
HALF, HALF_ELSEWHERE = "rate where fcfs meets half", "other windows: rate where fcfs meets half"
GOODPUT, DECODE_HALF = "goodput", "decode: rate where stock meets half of its TPOT targets"
# Runs that only looked for a rate: left out of the JSON.
SEARCHES = frozenset((HALF, HALF_ELSEWHERE, GOODPUT, DECODE_HALF))
ATTAIN = 0.9

Picked = list[tuple[TraceWindow, float]]
"""Windows, each at its rate in requests/s."""


class SimulationPool:
    """Runs cells in processes, keeps all runs for the JSON, and tells how far it is."""

    def __init__(self, workers: Workers) -> None:
        self._workers, self._began = workers, time.monotonic()
        self.runs: list[Run] = []

    def run(self, what: str, cells: Iterable[Cell]) -> list[Run]:
        """Returns all runs, in order."""
        cells = list(cells)
        self.say(f"{what}: {len(cells)} runs")
        runs = run_grid(cells, self._workers, bound_seconds=15.0)
        self.runs += [replace(run, facts={**run.facts, "part": what}) for run in runs]
        return runs

    def sweep(
        self, what: str, picked: Picked, steps: Sequence[float], policies: Sequence[str]
    ) -> list[RateSweep]:
        """Returns runs of all policies at shares of each window's rate; bounds at that rate."""
        bound = what != "decode"
        cells = [
            window.cell(rounded(rate * step), policy, bound=bound and step == 1.0)
            for window, rate in picked
            for step in steps
            for policy in policies
        ]
        runs = iter(self.run(what, cells))
        return [
            RateSweep(
                window.title,
                rate,
                {rounded(rate * step): [next(runs) for _ in policies] for step in steps},
                window.command(rate, policies),
            )
            for window, rate in picked
        ]

    def bounds(self, what: str, cells: Sequence[Cell]) -> list[float]:
        """Returns the clairvoyant bound of each cell's trace and targets."""
        self.say(f"{what}: {len(cells)} bounds")
        searches = [partial(bound_of, cell.rows, cell.setup, 5.0) for cell in cells]
        return [bound.ttft_attainment for bound in self._workers.run(searches)]

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:5.0f} s {text}", flush=True)


def highest_rates(
    pool: SimulationPool,
    what: str,
    guessed: Picked,
    policies: Sequence[str],
    metric: str,
    least: float,
) -> list[float]:
    """Returns per window and policy the highest rate at which `metric` is at least `least`.

    By halving, from a guess per window. All searches advance together, so that the pool stays full.
    Attainment over rate is not quite monotone on a short trace: this finds one crossing, the lowest
    that halving comes across.
    """
    wanted = [(window, policy) for window, _ in guessed for policy in policies]
    low = [0.0] * len(wanted)
    high = [2.0 * rate for _, rate in guessed for _ in policies]

    def met(at: Sequence[int], rates: Sequence[float]) -> list[bool]:
        cells = [wanted[i][0].cell(rate, wanted[i][1]) for i, rate in zip(at, rates, strict=True)]
        return [getattr(run.result.metrics, metric) >= least for run in pool.run(what, cells)]

    rising = list(range(len(wanted)))
    for _ in range(12):  # until the upper end misses
        answers = met(rising, [high[i] for i in rising])
        rising = [i for i, answer in zip(rising, answers, strict=True) if answer]
        for i in rising:
            low[i], high[i] = high[i], 2 * high[i]
        if not rising:
            break
    for _ in range(HALVINGS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        for i, answer in enumerate(met(range(len(wanted)), middle)):
            low[i], high[i] = (middle[i], high[i]) if answer else (low[i], middle[i])
    return [rounded(rate) for rate in low]


def half_rates(
    pool: SimulationPool, what: str, guessed: Picked, policy: str = "fcfs", key: str = "ttft"
) -> Picked:
    """Returns the windows with the rate where `policy` meets half, less those where it never does."""
    rates = highest_rates(pool, what, guessed, [policy], f"{key}_attainment", 0.5)
    found = [(window, rate) for (window, _), rate in zip(guessed, rates, strict=True)]
    for window, rate in found:
        if rate == 0:
            pool.say(f"left out, {policy} does not meet half even when idle: {window.title}")
    return [(window, rate) for window, rate in found if rate > 0]


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
    """Runs everything and writes the page. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.experiments.results_simulated")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "instead of the known ones; more than once for several"
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], metavar="FILE", help=text
    )
    parser.add_argument("--jobs", type=int, default=usable_cores(), help="processes")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the page")
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
        pool = SimulationPool(workers)
        measured = measure(pool, found)
    given.out.mkdir(parents=True, exist_ok=True)
    minutes = (time.monotonic() - began) / 60
    results_page.write(given.out, measured, f"{minutes:.0f} minutes with {given.jobs} processes")
    rows = [_compact(run.row()) for run in pool.runs if run.facts["part"] not in SEARCHES]
    (given.out / "simulated.json").write_text(
        '{"runs": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n", encoding="utf-8"
    )
    pool.say(f"wrote {given.out / 'simulated.md'} and {given.out / 'simulated.json'}")
    return 0


def _compact(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in row.items()
        if key != "counters"
    }


def measure(pool: SimulationPool, found: Sequence[SampledTrace]) -> SimulatedResults:
    """Returns all parts of the page."""
    windows = [window for source in found for window in windows_of(source)]
    half = half_rates(pool, HALF, [(window, 0.5 * window.offered()) for window in windows])
    return SimulatedResults(
        system=SYSTEM,
        notes=SYSTEMS[SYSTEM].notes,
        sweeps=pool.sweep("sweep", half, STEPS, SWEPT),
        windows=other_windows(pool, half),
        goodput=goodput(pool, half),
        ablations=ablations(pool, half),
        decode=decode_side(pool, found),
        attain=ATTAIN,
        upstream=UPSTREAM,
    )


def other_windows(pool: SimulationPool, half: Picked) -> list[tuple[str, float, Sequence[Run]]]:
    """Returns the same on other parts of the traces and other draws of the tiers: how sure is it?"""
    guessed: Picked = []
    for window, rate in half:
        if window.prefill == 1 and window.source.tight_tpots_ms:
            total, size = len(window.source.rows), len(window.rows)
            for turn, start in enumerate((total // 3, 2 * total // 3), start=1):
                if start + size <= total:
                    rows = window.source.window(start, size)
                    guessed.append((replace(window, rows=rows, start=start, seed=turn), rate))
    picked = half_rates(pool, HALF_ELSEWHERE, guessed)
    sweeps = pool.sweep("other windows", picked, (1.0,), (*UPSTREAM, "kairos"))
    return [
        (f"{window.title}, from row {window.start}", rate, sweep.by_rate[rate])
        for (window, rate), sweep in zip(picked, sweeps, strict=True)
    ]


def goodput(pool: SimulationPool, half: Picked) -> list[GoodputRates]:
    """Returns the highest rate at which 90 % meet both targets."""
    picked = [(window, rate) for window, rate in half if window.prefill == 1]
    guessed = [(window, 0.7 * rate) for window, rate in picked]
    wanted = (GOODPUT, guessed, GOODPUT_OF, "e2e_attainment", ATTAIN)
    rates = iter(highest_rates(pool, *wanted))
    most = bounded_rates(pool, picked) if bound_available() else [None] * len(picked)
    return [
        GoodputRates(window.title, {policy: next(rates) for policy in GOODPUT_OF}, bound)
        for (window, _), bound in zip(picked, most, strict=True)
    ]


def bounded_rates(pool: SimulationPool, picked: Picked) -> list[float | None]:
    """Returns the highest rates at which a clairvoyant scheduler could have 90 % meet their TTFT."""
    low, high = [0.0] * len(picked), [4.0 * rate for _, rate in picked]
    for _ in range(HALVINGS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        cells = [g.cell(rate, "fcfs") for (g, _), rate in zip(picked, middle, strict=True)]
        for i, share in enumerate(pool.bounds("goodput, clairvoyant", cells)):
            low[i], high[i] = (middle[i], high[i]) if share >= ATTAIN else (low[i], middle[i])
    return [rounded(rate) for rate in high]


def ablations(pool: SimulationPool, half: Picked) -> dict[str, dict[str, Run]]:
    """Returns Kairos less one part at a time, where fcfs meets half."""
    made: dict[str, dict[str, Run]] = {}
    for window, rate in half:
        if window.source.tight_tpots_ms and not window.slo.endswith(":50"):
            cells = [
                window.cell(rate, policy, error, variant=name)
                for name, (policy, error) in ABLATIONS.items()
            ]
            runs = pool.run(f"ablations, {window.title}", cells)
            title = f"{window.title}, {rate:.3g} req/s"
            made[title] = dict(zip(ABLATIONS, runs, strict=True))
    return made


def decode_side(pool: SimulationPool, found: Sequence[SampledTrace]) -> list[RateSweep]:
    """Returns stock packing against Kairos' where the decode server is what is short.

    The prefill side is Kairos' in both, so that only the decode side differs; fcfs is stock on
    both sides.
    """
    wide = [
        TraceWindow(source, source.window(0, source.requests), source.slos[0][0], tpot_ms, 8, 1)
        for source in found
        for tpot_ms in source.tight_tpots_ms
    ]
    guessed = [(window, 0.25 * window.offered()) for window in wide]
    if not guessed:
        return []
    picked = half_rates(pool, DECODE_HALF, guessed, "kairos-prefill", "tpot")
    return pool.sweep("decode", picked, DECODE_STEPS, tuple(results_page.DECODE_COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
