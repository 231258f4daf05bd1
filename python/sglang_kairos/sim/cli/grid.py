"""Runs many simulations at once: cells of (trace, set-up, policy) in a process pool, as report runs."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sglang_kairos.loads.replay import Metrics, Result
from sglang_kairos.loads.traces import Request, rate_of
from sglang_kairos.reports.report import Run
from sglang_kairos.sim.baselines.policies import POLICIES, Policy
from sglang_kairos.sim.cli.pool import Progress, Workers, usable_cores
from sglang_kairos.sim.core.cluster import Setup, SimCluster

if TYPE_CHECKING:
    from sglang_kairos.sim.bound.bound import Bound

BOUND_SECONDS = 60.0


@dataclass(frozen=True)
class Cell:
    """One simulation. `label` and `facts` join the run's facts and mean nothing here.

    Cells that want the bound share it if they share the `rows` object, targets, servers and seed.
    """

    rows: Sequence[Request]
    setup: Setup
    policy: Policy | str
    want_bound: bool = False
    label: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SimResult(Result):
    """A simulated run, measured where it ran. `outcomes` is empty unless asked for.

    `cpu_s`: processor time that it took, without the bound.
    """

    measured: Metrics
    cpu_s: float

    @property
    def metrics(self) -> Metrics:
        return self.measured


def run_grid(
    cells: Iterable[Cell],
    jobs: int | Workers | None = None,
    *,
    keep_outcomes: bool = False,
    bound_seconds: float = BOUND_SECONDS,
    progress: Progress | None = None,
) -> list[Run]:
    """Simulates every cell. Returns the runs in the cells' order, whatever `jobs` is.

    `jobs`: processes (None: one per usable core; 1: in this process), or `Workers` to use again.
    `keep_outcomes` keeps each request's outcome, which plots need and which takes time to pickle.
    `bound_seconds` limits the search for each bound. `progress(done, all)` counts simulations and
    bounds.

    Facts of a run: label (when given), rate (requests/s; None: all at once), slo, seed, servers,
    and those of `SimCluster.facts`. ttft_bound, share_of_bound, bound_method and bound_exact are
    None when the cell did not want them. Raises ValueError for a cell without requests.
    """
    cells = list(cells)
    for number, cell in enumerate(cells):
        if not cell.rows:
            raise ValueError(f"cell {number} {cell.label!r} has no requests")
    bounded = {_bound_key(cell): cell for cell in cells if cell.want_bound}
    searches = [partial(bound_of, c.rows, c.setup, bound_seconds) for c in bounded.values()]
    simulations = [partial(_run, cell, keep_outcomes) for cell in cells]
    if not isinstance(jobs, Workers):
        jobs = Workers(max(1, min(jobs or usable_cores(), len(searches) + len(simulations))))
        held: Any = jobs
    else:
        held = nullcontext(jobs)
    with held as workers:
        results: list[Any] = workers.run([*searches, *simulations], progress)
    bounds = dict(zip(bounded, results, strict=False))
    runs: list[Run] = results[len(bounded) :]
    return [
        _with_bound(run, bounds[_bound_key(cell)] if cell.want_bound else None)
        for cell, run in zip(cells, runs, strict=True)
    ]


def simulate(
    rows: Sequence[Request],
    setup: Setup,
    policies: Iterable[Policy | str],
    jobs: int | Workers | None = 1,
    *,
    want_bound: bool = False,
    keep_outcomes: bool = False,
) -> list[Run]:
    """Simulates one trace under several policies (or names in `POLICIES`), in their order."""
    cells = [Cell(rows, setup, policy, want_bound) for policy in policies]
    return run_grid(cells, jobs, keep_outcomes=keep_outcomes)


def bound_available() -> bool:
    """Returns whether bounds can be computed here: they need scipy (extra `sim`)."""
    return find_spec("scipy") is not None


def policy_of(policy: Policy | str) -> Policy:
    """Returns the policy of that name. Raises ValueError for an unknown one."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    return POLICIES[policy]


def _run(cell: Cell, keep_outcomes: bool) -> Run:
    setup, policy = cell.setup, policy_of(cell.policy)
    started = time.process_time()
    cluster = SimCluster(setup, policy, cell.rows)
    whole = cluster.run()
    metrics = whole.metrics
    cpu_s = time.process_time() - started
    rate = rate_of(cell.rows)
    facts = {
        **({"label": cell.label} if cell.label else {}),
        "rate": rate if math.isfinite(rate) else None,
        "slo": {"ttft_ms": list(setup.ttft_ms), "tpot_ms": setup.tpot_ms},
        "seed": setup.seed,
        "servers": {"prefill": setup.prefills, "decode": setup.decodes},
        **cluster.facts(),
        **cell.facts,
    }
    kept = whole.outcomes if keep_outcomes else []
    return Run(policy.name, SimResult(kept, whole.duration_s, metrics, cpu_s), facts)


def bound_of(rows: Sequence[Request], setup: Setup, seconds: float) -> Bound:
    """Returns `sim.bound.bound.ttft_bound`; for a pool, as scipy is imported where it runs."""
    from sglang_kairos.sim.bound.bound import ttft_bound

    return ttft_bound(rows, setup, time_limit_s=seconds)


def _bound_key(cell: Cell) -> Hashable:
    """Returns what the bound depends on: not the policy, nor what it predicts about step times."""
    setup = cell.setup
    targets = (tuple(setup.ttft_ms), setup.tpot_ms)
    return id(cell.rows), id(setup.system), targets, setup.prefills, setup.decodes, setup.seed


def _with_bound(run: Run, bound: Bound | None) -> Run:
    facts: dict[str, Any] = dict.fromkeys(
        ("ttft_bound", "share_of_bound", "bound_method", "bound_exact")
    )
    if bound is not None:
        from sglang_kairos.sim.bound.bound import share_of_bound

        facts = {
            "ttft_bound": bound.ttft_attainment,
            "share_of_bound": share_of_bound(run.result.metrics.ttft_attainment, bound),
            "bound_method": bound.method,
            "bound_exact": bound.exact,
        }
    return replace(run, facts={**run.facts, **facts})
