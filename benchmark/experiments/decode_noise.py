"""Decoding on a host that is not quiet, simulated: what is the circuit breaker worth?

    python -m benchmark.experiments.decode_noise

One decode server with the step law of a small model on a CPU is fed KV at once, under the
long-tailed load of `benchmark.experiments.decode_cpu`. Its steps take what the law says times a
disturbance:

* scatter S: a lognormal factor of that sigma, independent from step to step, mean 1;
* spells X: now and then, for a second on average and 30 % of the time, all takes X times as long;
* whatever T: every step takes T ms on average, scattered with sigma 0.5, whoever is in it. No
  batch is shorter than another, and every request that sits out does so for nothing.

Kairos learns from these steps (`sim.calibrate.learnt`). Four systems decide: stock, Kairos with no
breaker, with one that opens wherever the mean error is above the limit, and with its own. Its own
then asks whether steps follow the predictions (`predict.prediction_error`). Writes JSON under
``--out``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

from benchmark.experiments import decode_cpu
from benchmark.harness import arguments, page
from benchmark.harness.experiment import write_json
from benchmark.harness.servers import KV_TOKENS
from sglang_kairos.loads import traces
from sglang_kairos.policy.decode_planner import DecodePlanner
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.predict.prediction_error import PredictError
from sglang_kairos.sim.baselines.policies import POLICIES, Policy
from sglang_kairos.sim.calibrate.learnt import LearntCluster
from sglang_kairos.sim.core.cluster import Setup
from sglang_kairos.sim.core.decode import SimDecodeServer
from sglang_kairos.sim.hardware.times import LawTimes, System

# decode_cpu's model on two busy cores: 8.5 ms, 0.55 ms a request, 1.1 us a KV token.
DECODE_LAW = DecodeLatency(8.5e-3, 0.55e-3, 1.1e-6)
PREFILL_LAW = PrefillLatency(1e-4, 1e-9, 0.0)
SLOTS = 256
SPELL_S, BETWEEN_S = 1.0, 2.3
HOSTS = ("quiet", "scatter 0.3", "scatter 0.5", "scatter 0.8", "spells 2", "spells 4")
HOSTS += ("whatever 80", "whatever 120")
NO_LIMIT = 100.0

Disturb = Callable[[float], float]


class ErrorOnlyPlanner(DecodePlanner):
    """Its breaker opens wherever the mean error is above the limit."""

    def trusted(self, error: PredictError) -> bool:
        return error.trusted(NO_LIMIT) and error.mape <= self.config.max_step_error


class ErrorOnlyServer(SimDecodeServer):
    planner_kind = ErrorOnlyPlanner


class ErrorOnlyCluster(LearntCluster):
    decode_kind = ErrorOnlyServer


def without_breaker(policy: Policy) -> Policy:
    return replace(policy, config=replace(policy.config, max_step_error=NO_LIMIT))


CASES: dict[str, tuple[Policy, type[LearntCluster]]] = {
    "stock": (POLICIES["fcfs"], LearntCluster),
    "no breaker": (without_breaker(POLICIES["kairos"]), LearntCluster),
    "error only": (POLICIES["kairos"], ErrorOnlyCluster),
    "kairos": (POLICIES["kairos"], LearntCluster),
}


class DisturbedTimes(LawTimes):
    """The law, and what the host makes of it."""

    def __init__(self, host: str, seed: int) -> None:
        super().__init__(PREFILL_LAW, DECODE_LAW, captured_sizes=None)
        self._disturb = disturbance(host, Random(f"{seed}/{host}"))

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        return self._disturb(super().decode_s(batch, kv_tokens))


def disturbance(host: str, rng: Random) -> Disturb:
    """Returns a step's seconds from those of the law. Raises ValueError for a host that is none."""
    kind, _, figure = host.partition(" ")
    if host == "quiet":
        return lambda seconds: seconds
    try:
        return KINDS[kind](rng, float(figure))
    except (KeyError, ValueError):
        raise ValueError(f"host: {host!r}; known: {', '.join(HOSTS)}, with other figures") from None


def _scatter(rng: Random, sigma: float) -> float:
    return math.exp(rng.gauss(0.0, sigma) - sigma * sigma / 2.0)


def _spells(rng: Random, factor: float) -> Disturb:
    """Returns slow and normal times in turn, measured in busy seconds."""
    now_s, until_s, slow = 0.0, 0.0, True

    def disturb(seconds: float) -> float:
        nonlocal now_s, until_s, slow
        while now_s >= until_s:
            slow = not slow
            until_s += rng.expovariate(1.0 / (SPELL_S if slow else BETWEEN_S))
        took = seconds * (factor if slow else 1.0) * _scatter(rng, 0.1)
        now_s += took
        return took

    return disturb


KINDS: dict[str, Callable[[Random, float], Disturb]] = {
    "scatter": lambda rng, sigma: lambda seconds: seconds * _scatter(rng, sigma),
    "spells": _spells,
    "whatever": lambda rng, mean_ms: lambda seconds: mean_ms / 1e3 * _scatter(rng, 0.5),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line, with lists as lists."""
    defaults = {"tpot_ms": 100.0, "ttft_ms": 1000.0, "load_s": 30.0, "seed": 0}
    defaults["out"] = Path("out/decode_noise")  # type: ignore[assignment]
    parser = arguments.parser_for("benchmark.experiments.decode_noise", __doc__, **defaults)
    parser.add_argument("--hosts", default=",".join(HOSTS), help="(default: %(default)s)")
    parser.add_argument("--rates", default="7,11", help="requests/s (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="runs per row, from --seed on")
    given = parser.parse_args(argv)
    given.rates = arguments.numbers(parser, "rates", given.rates)
    given.hosts = given.hosts.split(",")
    arguments.positive(parser, given, ("tpot_ms", "ttft_ms", "load_s", "seeds"))
    try:
        for host in given.hosts:
            disturbance(host, Random(0))
    except ValueError as error:
        parser.error(str(error))
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit status."""
    given = parse(argv)
    grid = [(host, rate, case) for host in given.hosts for rate in given.rates for case in CASES]
    rows = [row_of(*cell, given) for cell in grid]
    write_json(given.out / "rows.json", rows, indent=1)
    print(markdown(rows))
    return 0


def row_of(host: str, rate: float, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Returns means over the seeds, in percent, tokens per second and shares of the decode steps."""
    runs = [one_run(host, rate, name, given, given.seed + turn) for turn in range(given.seeds)]
    means = {key: round(mean(run[key] for run in runs), 4) for key in runs[0]}
    met = [run["both_met"] for run in runs]
    return {"host": host, "rate": rate, "case": name, **means, "range": [min(met), max(met)]}


def one_run(
    host: str, rate: float, name: str, given: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Runs one simulation."""
    policy, kind = CASES[name]
    lengths = argparse.Namespace(**decode_cpu.BY_MODE["decode"])
    rows = decode_cpu.sample(max(2, round(rate * given.load_s)), seed, lengths)
    system = System(
        DisturbedTimes(host, seed),
        decode_kv_tokens=KV_TOKENS,
        max_running=SLOTS,
        kv_bytes=1.0,
        link_latency_s=1e-4,
    )
    setup = Setup(system, (given.ttft_ms,), given.tpot_ms, seed=seed)
    cluster = kind(setup, policy, traces.scale_rate(rows, rate), late_results=False)
    metrics, facts = cluster.run().metrics, cluster.facts()
    counters = facts["counters"]
    return {
        "ttft_met": 100 * metrics.ttft_attainment,
        "tpot_met": 100 * metrics.tpot_attainment,
        "both_met": round(100 * metrics.e2e_attainment, 2),
        "tokens_per_s": facts["arrival_tokens_per_s"],
        "breaker": counters.get("breaker_steps", 0) / counters["decode_steps"],
    }


HEADS = "host|requests/s||TTFT met|TPOT met|both met (range)|tokens/s|run whole by the breaker"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a line per host, rate and case."""

    def cells(row: dict[str, Any]) -> list[str]:
        low, high = row["range"]
        met = f"{row['both_met']:.1f} ({low:.0f}–{high:.0f}) %"
        shares = [f"{row[name]:.1f} %" for name in ("ttft_met", "tpot_met")]
        breaker = f"{100 * row['breaker']:.0f} % of steps"
        words = [row["host"], f"{row['rate']:g}", row["case"]]
        return [*words, *shares, met, f"{row['tokens_per_s']:.0f}", breaker]

    return page.table(HEADS.split("|"), map(cells, rows))


if __name__ == "__main__":
    sys.exit(main())
