"""Grids of simulations: order, processes, what a run keeps, and which bounds are looked for."""

from __future__ import annotations

import multiprocessing
import operator
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from sglang_kairos.loads.traces import long_tail
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.cli.grid import Cell, run_grid, simulate
from sglang_kairos.sim.cli.pool import Workers
from sglang_kairos.sim.core.cluster import Setup
from sglang_kairos.sim.hardware.times import SYSTEMS

SETUP = Setup(next(iter(SYSTEMS.values())), (300.0,), 20.0)
ROWS = long_tail(40, 60.0, seed=1)


def test_processes_give_the_same_runs_in_the_same_order() -> None:
    cells = [
        Cell(rows, SETUP, name, label=label, facts={"n": len(rows)})
        for label, rows in (("few", ROWS[:9]), ("many", ROWS))
        for name in ("hrrn", "kairos")
    ]
    seen: list[tuple[int, int]] = []
    alone = run_grid(cells, 1)
    together = run_grid(cells, 2, progress=lambda done, total: seen.append((done, total)))
    assert [run.row() for run in together] == [run.row() for run in alone]
    assert [(run.facts["label"], run.policy, run.facts["n"]) for run in together] == [
        (label, policy, n)
        for label, n in (("few", 9), ("many", 40))
        for policy in ("hrrn", "kairos")
    ]
    assert seen[-1] == (4, 4) and seen == sorted(seen)


def test_outcomes_are_kept_only_when_asked_for() -> None:
    (lean,) = simulate(ROWS, SETUP, ["fcfs"])
    (full,) = simulate(ROWS, SETUP, [POLICIES["fcfs"]], keep_outcomes=True)
    assert lean.result.outcomes == [] and len(full.result.outcomes) == 40
    assert lean.row() == full.row() and lean.result.metrics.sent == 40
    assert lean.result.duration_s == full.result.duration_s > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: simulate([], SETUP, ["fcfs"]), "cell 0 '' has no requests"),
        (lambda: simulate(ROWS, SETUP, ["fastest"]), "unknown policy 'fastest'; known: edf"),
        (lambda: Workers(0), "jobs must be at least 1, got 0"),
    ],
)
def test_bad_calls_are_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_no_cells_no_runs() -> None:
    assert run_grid([]) == []


def test_workers_return_results_in_the_order_of_the_tasks() -> None:
    with Workers(2) as workers:
        assert workers.run([partial(pow, 2, n) for n in range(9)]) == [2**n for n in range(9)]
        with pytest.raises(ZeroDivisionError):
            workers.run([partial(operator.truediv, 1, n) for n in (1, 0)])


def test_leaving_by_an_exception_ends_the_processes_at_once() -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Workers(2) as workers:
        workers.run([partial(time.sleep, seconds) for seconds in (0, 60)], interrupt)
    assert time.monotonic() - started < 30
    assert set(multiprocessing.active_children()) <= before
