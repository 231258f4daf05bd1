"""What a decode decision costs: selection of the batch, and admission, over the number of requests.

    python -m benchmark.micro.decode_cost [--json FILE]

Rows: what, running, waiting, median and 99th percentile in microseconds, and the bound it is held
to where there is one. CPU time of the policy functions with a step-time model that has learnt;
"choose" is a selection by the planner, its own rules included.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmark.harness.arguments import parser_for
from benchmark.harness.experiment import write_json
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.state.running_table import RunningTable
from sglang_kairos.policy.admission import Occupancy, QueueView, plan_admission
from sglang_kairos.policy.decode_planner import DecodePlanner, RunningView
from sglang_kairos.policy.decode_step import choose_step
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.request_statistics import RequestStatistics

SIZES = (16, 64, 256, 512, 2048)
BOUND_US = {256: 100.0, 2048: 1000.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. Returns 1 if a bound is not met."""
    parser = parser_for("benchmark.micro.decode_cost", __doc__, json=None)
    parser.add_argument("--rounds", type=int, default=300, help="decisions timed per row")
    given = parser.parse_args(argv)
    rows = [row for size in SIZES for row in measure(size, given.rounds)]
    for row in rows:
        bound = f"  bound {row['bound_us']:.0f}" if row["bound_us"] else ""
        print(
            f"{row['what']:<10} {row['running']:>5} running {row['waiting']:>4} waiting"
            f"  median {row['median_us']:7.1f} us  p99 {row['p99_us']:7.1f} us{bound}"
        )
    if given.json:
        write_json(given.json, rows, indent=1)
    return int(any(row["bound_us"] and row["median_us"] > row["bound_us"] for row in rows))


def measure(count: int, rounds: int) -> list[dict[str, Any]]:
    """Returns one row per decision with `count` running, somewhat more than can be kept on pace."""
    rng = np.random.default_rng(count)
    model = StepTimeModel(4e-3, 5e-5, 1.3e-8)
    context = np.minimum(400 * np.exp(1.3 * rng.standard_normal(count)), 16_000.0)
    for size in (1, count // 2, count):
        model.observe(max(1, size), float(context[:size].sum()) + 1.0, 5e-3 + 5e-5 * size)
    tpot = np.full(count, 0.95 * model.step_s(count, float(context.sum())))
    slack, silent = tpot * rng.uniform(0.5, 3.0, count), tpot * rng.uniform(0.0, 2.0, count)
    served = rng.random(count) < 0.9
    queue = 64
    prompt, due = context[rng.integers(0, count, queue)], rng.uniform(-1.0, 2.0, queue)
    ttft, statistics = np.full(queue, 2.0), RequestStatistics()
    waiting = QueueView(0.0, due - ttft, ttft, np.full(queue, tpot[0]), prompt)
    full = Occupancy(context, tpot, 2.0 * context.sum(), 2 * count, float(context.sum()), count)
    reqs = [object() for _ in range(count)]
    table = RunningTable(lambda _: (0.0, float(tpot[0]), 1.0, 0.0, True))
    table.follow(reqs)
    flip = [reqs[1:], reqs]

    def select() -> None:
        choose_step(
            slack, tpot, context, silent, model.step_s, served=served, max_itl_s=2.0
        )  # fmt: skip

    planner = DecodePlanner(KairosConfig(), Counter())
    planner.trusted = lambda error: True  # type: ignore[method-assign]

    def choose() -> None:
        now_s, once, least = 0.0, np.ones(count), float(tpot.min())
        view = RunningView(now_s, slack - tpot, once, tpot, -silent, served, context, least)
        planner.choose(view, model)

    def admit() -> None:
        plan_admission(waiting, full, model.step_s, statistics)

    def change() -> None:
        flip.reverse()
        table.follow(flip[0])

    def steady() -> None:
        table.follow(table._reqs)
        table.now(1.0)
        table.ran(None)
        float(model.step_s(count, float(context.sum())))

    assert len(choose_step(slack, tpot, context, silent, model.step_s, max_itl_s=2.0).run) < count
    made: list[dict[str, Any]] = []
    for what, decide in (
        ("select", select),
        ("choose", choose),
        ("admit", admit),
        ("membership", change),
        ("all fit", steady),
    ):
        times = timed(decide, rounds)
        made.append(
            {
                "what": what,
                "running": count,
                "waiting": queue if what == "admit" else 0,
                "median_us": round(float(np.median(times)), 1),
                "p99_us": round(float(np.quantile(times, 0.99)), 1),
                "bound_us": BOUND_US.get(count) if what == "select" else None,
            }
        )
    return made


def timed(decide: Callable[[], None], rounds: int) -> list[float]:
    """Returns CPU microseconds of each of `rounds` calls, after a few to warm up."""
    times = []
    for index in range(rounds + 10):
        start = time.thread_time()
        decide()
        if index >= 10:
            times.append(1e6 * (time.thread_time() - start))
    return times


if __name__ == "__main__":
    raise SystemExit(main())
