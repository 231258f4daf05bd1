"""Does the simulator predict what real servers do? Real PD clusters on this CPU against it.

    python -m benchmark.experiments.validate_sim --load-s 45 --json out/validation.json

Each turn starts a fresh cluster with one policy and replays two traces of the same kind and load,
open loop. The first is recorded step by step (`benchmark.harness.step_recorder`) and calibrates the
simulator: `sglang_kairos.sim.calibrate.calibrate`. Then the recorder takes itself out. The second
trace, of another seed, is judged: its measured attainment against that of the simulator, which has
seen nothing of it but the trace.

*Drift* is how much longer prefill took in the judged replay than in the one calibrated on. SGLang's
own busy counter measures it, for the work in each trace. What the machine changed in between is not
the simulator's error. So the table also tells what it predicts with prefill steps scaled by that
one number.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmark.experiments import demo
from benchmark.harness import arguments, driver, loads, page, servers, step_recorder
from benchmark.harness.experiment import PairExperiment, Trial, run_experiment
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.loads.replay import Result
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.calibrate import recording
from sglang_kairos.sim.calibrate.calibrate import Calibration, CalibrationError, calibrate

OTHER_SEED = 1000  # the calibration trace's, counted from the judged one's
PERCENTILES = (50, 90, 99)
GOAL_POINTS = 5.0
DEFAULTS: dict[str, Any] = {
    "policies": f"fcfs,{servers.KAIROS}",
    "repeat": 2,
    "load_s": 45.0,
    "rate": None,
    "utilisation": 0.87,
    "ttft_ms": 1000.0,
    "tpot_ms": 75.0,
    "seed": 0,
    "out": Path("out/validation"),
    "json": None,
    "markdown": None,
}


@dataclass(frozen=True)
class JudgedTurn:
    """One cluster: what it was calibrated to, and the judged replay, measured and simulated.

    `simulated` and `drifted` (with prefill steps times `drift`) hold one run per seed. `servers` is
    what Kairos tells of itself afterwards.
    """

    policy: str
    calibration: Calibration
    drift: float
    measured: Result
    simulated: list[Result]
    drifted: list[Result]
    servers: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """Returns the JSON object of this turn: attainments in percent, errors in points."""
        return {
            "policy": self.policy,
            "requests": len(self.measured.outcomes),
            "sent_late_ms": round(self.measured.lag_ms, 1),
            "drift": round(self.drift, 4),
            "measured": figures([self.measured]),
            "simulated": figures(self.simulated),
            "simulated_with_drift": figures(self.drifted),
            "error_points": self.errors(self.simulated),
            "error_points_with_drift": self.errors(self.drifted),
            "simulated_ttft_met_range": self.spread(),
            "calibration": self.calibration.summary(),
            "servers": self.servers,
        }

    def spread(self) -> tuple[float, float]:
        """Returns the lowest and highest simulated TTFT attainment, in percent."""
        met = [100 * one.metrics.ttft_attainment for one in self.simulated]
        return round(min(met), 2), round(max(met), 2)

    def errors(self, simulated: list[Result]) -> dict[str, float]:
        """Returns simulated less measured attainment, in points."""
        told, seen = figures(simulated), figures([self.measured])
        return {name: round(told[name] - seen[name], 2) for name in ("ttft_met", "tpot_met")}


def figures(runs: Sequence[Result]) -> dict[str, float]:
    """Returns means over runs: attainments in percent, percentiles of TTFT and TPOT in ms."""
    found: list[dict[str, float]] = []
    for one in runs:
        answered = [outcome for outcome in one.outcomes if outcome.ok]
        ttft = [outcome.ttft_ms for outcome in answered] or [float("nan")]
        tpot = [o.tpot_ms for o in answered if o.output_tokens > 1] or [float("nan")]
        found.append(
            {
                "ttft_met": 100 * one.metrics.ttft_attainment,
                "tpot_met": 100 * one.metrics.tpot_attainment,
                **{f"ttft_p{p}_ms": float(np.percentile(ttft, p)) for p in PERCENTILES},
                **{f"tpot_p{p}_ms": float(np.percentile(tpot, p)) for p in PERCENTILES},
                "failed": one.metrics.failed,
            }
        )
    return {name: round(mean(one[name] for one in found), 2) for name in found[0]}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line."""
    parser = arguments.parser_for("benchmark.experiments.validate_sim", __doc__, **DEFAULTS)
    parser.epilog = (
        "A measured rate loads both traces alike; a given one need not. --markdown drops "
    )
    parser.epilog += f"the table into that page, after {page.BEGIN}."
    parser.add_argument("--sim-seeds", type=int, default=10, help="simulated runs per turn")
    given = parser.parse_args(argv)
    known = demo.known_policies()
    given.policies = arguments.chosen(parser, "policies", given.policies, known)
    positive = ("repeat", "load_s", "rate", "utilisation", "ttft_ms", "tpot_ms", "sim_seeds")
    arguments.positive(parser, given, positive)
    if given.markdown:
        try:
            page.parts_of(given.markdown)
        except (OSError, ValueError) as error:
            parser.error(f"--markdown: {error}")
    given.launcher = step_recorder.__name__
    return given


class ValidateSim(PairExperiment):
    """Calibration replay, judged replay and simulation of the judged one, for each pair."""

    fails_with = (*PairExperiment.fails_with, CalibrationError)
    rehearsal: loads.PacedTrace

    def folder(self, trial: Trial) -> Path:
        return Path(self.given.out) / trial.name

    def spec(self, trial: Trial) -> ClusterSpec:
        folder, pair = self.folder(trial), super().spec(trial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / step_recorder.GATE).touch()
        where = {step_recorder.FOLDER_VARIABLE: str(folder.resolve())}
        return replace(pair, env={**pair.env, **where})

    def paced(self, cluster: Cluster, say: servers.Say) -> None:
        """Sets `plan` and `rehearsal`, at the wanted share of the measured capacity."""
        given, judged, seed = self.given, self.rows, self.given.seed + OTHER_SEED
        other = loads.base_trace(argparse.Namespace(**{**vars(given), "seed": seed}))
        if given.rate:
            super().paced(cluster, say)
            self.rehearsal = replace(self.plan, rows=other, seed=seed)
            return
        seconds = driver.measure_prefill(cluster, [*judged, *other], given.utilisation, say)
        self.plan = loads.paced(judged, given, seconds[: len(judged)])
        rehearsal = loads.paced(other, given, seconds[len(judged) :])
        self.rehearsal = replace(rehearsal, seed=seed)
        say(f"calibration: {rehearsal.describe()}")
        say(f"judged: {self.plan.describe()}")

    def measure_pair(self, cluster: Cluster, trial: Trial) -> None:
        folder, plan = self.folder(trial), self.plan
        begun = time.perf_counter()
        rehearsal, counted_s = driver.drive(cluster, self.rehearsal, trial.say)
        (folder / step_recorder.GATE).unlink()
        driver.warm_up(cluster)  # the steps that make the recorder leave; empties the caches
        (folder / "begun.json").write_text(json.dumps(begun))
        seen = recording.read(folder, rehearsal.outcomes, begun)
        calibration = calibrate(seen, sizes(cluster), late_results=True)
        measured, judged_s = driver.drive(cluster, plan, trial.say)
        rehearsal.dump(folder / "calibration.jsonl")
        measured.dump(folder / "judged.jsonl")

        def simulate(with_: Calibration) -> tuple[list[Result], float]:
            policy = POLICIES[trial.policy]
            runs = [
                with_.simulate(policy, plan.rows, plan.ttft_ms, plan.tpot_ms, seed)
                for seed in range(self.given.sim_seeds)
            ]
            return [one.result for one in runs], mean(one.prefill_busy_s for one in runs)

        simulated, busy_s = simulate(calibration)
        # Counter and recording measure slightly different things: compare like with like.
        drift = (judged_s / counted_s) / (busy_s / sum(recording.cycles(seen.prefill)))
        drifted, _ = simulate(calibration.scaled(prefill=drift))
        told = servers.kairos_reports(cluster)
        turn = JudgedTurn(trial.policy, calibration, drift, measured, simulated, drifted, told)
        self.runs.append(turn)
        trial.say(summary(turn))

    def report(self) -> dict[str, Any]:
        return {"setup": self.setup(), "turns": [turn.row() for turn in self.runs]}

    def setup(self) -> dict[str, Any]:
        facts = super().setup()
        return {
            **{key: facts[key] for key in ("platform", "rate_rps", "ttft_ms", "tpot_ms", "seed")},
            "judged": self.plan.describe(),
            "prompts": facts["input_tokens"],
            "outputs": facts["output_tokens"],
            "calibration_seed": self.plan.seed + OTHER_SEED,
            "load_s": self.given.load_s,
            "sim_seeds": self.given.sim_seeds,
            "goal_points": GOAL_POINTS,
        }

    def finish(self) -> int:
        """Prints the table. Returns 1 if an error is above the goal."""
        text = markdown(self.runs, self.setup())
        print("\n" + text)
        if self.given.markdown:
            page.drop_in(self.given.markdown, text)
        return int(worst(self.runs) > GOAL_POINTS)


def sizes(cluster: Cluster) -> dict[str, int]:
    """Returns what `System` wants to know of the servers, from themselves."""
    prefill = servers.server_info(cluster.prefill_urls[0])
    decode = servers.server_info(cluster.decode_urls[0])
    return {
        "chunk_tokens": prefill["chunked_prefill_size"],
        "prefill_kv_tokens": prefill["max_total_num_tokens"],
        "decode_kv_tokens": decode["max_total_num_tokens"],
        "max_running": decode["max_running_requests"],
        "reserved_tokens": decode["num_reserved_decode_tokens"],
    }


def summary(turn: JudgedTurn) -> str:
    """Returns one turn in a line."""
    measured, told = figures([turn.measured]), figures(turn.simulated)
    errors, drifted = turn.errors(turn.simulated), turn.errors(turn.drifted)
    return (
        f"TTFT met {measured['ttft_met']:.1f} %, simulated {told['ttft_met']:.1f} "
        f"({errors['ttft_met']:+.1f}; with drift {turn.drift:.2f}: {drifted['ttft_met']:+.1f}); "
        f"TPOT met {measured['tpot_met']:.1f} %, simulated {told['tpot_met']:.1f}"
    )


def worst(turns: Sequence[JudgedTurn]) -> float:
    """Returns the largest error of an attainment in any turn, in points."""
    return max(abs(error) for turn in turns for error in turn.errors(turn.simulated).values())


HEAD = (
    "turn | policy | TTFT met %: measured | simulated (seeds) | error | drift | error with drift | "
    "TPOT met %: measured | simulated | error | TTFT p50/p90/p99 s: measured | simulated | "
    "TPOT p50/p90/p99 ms: measured | simulated"
)


def markdown(turns: Sequence[JudgedTurn], setup: dict[str, Any]) -> str:
    """Returns the figures as a page shows them."""

    def quantiles(values: dict[str, float], kind: str, unit: float, digits: int) -> str:
        return "/".join(f"{values[f'{kind}_p{p}_ms'] * unit:.{digits}f}" for p in PERCENTILES)

    def cells(number: int, turn: JudgedTurn) -> list[str]:
        seen, told = figures([turn.measured]), figures(turn.simulated)
        errors, drifted = turn.errors(turn.simulated), turn.errors(turn.drifted)
        low, high = turn.spread()
        return [
            str(number),
            turn.policy,
            f"{seen['ttft_met']:.1f}",
            f"{told['ttft_met']:.1f} ({low:.0f}–{high:.0f})",
            f"{errors['ttft_met']:+.1f}",
            f"{turn.drift:.2f}",
            f"{drifted['ttft_met']:+.1f}",
            f"{seen['tpot_met']:.1f}",
            f"{told['tpot_met']:.1f}",
            f"{errors['tpot_met']:+.1f}",
            *(quantiles(values, "ttft", 1e-3, 2) for values in (seen, told)),
            *(quantiles(values, "tpot", 1.0, 0) for values in (seen, told)),
        ]

    about = (
        f"*{setup['platform']}*; judged: {setup['judged']}; TTFT target {setup['ttft_ms']:g} ms, "
        f"TPOT target {setup['tpot_ms']:g} ms; simulated: mean of {setup['sim_seeds']} seeds. "
        f"Largest error of an attainment: {worst(turns):.1f} points."
    )
    rows = [cells(number, turn) for number, turn in enumerate(turns, start=1)]
    return f"{about}\n\n{page.table(HEAD.split(' | '), rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison. 0: every error is within the goal; 1: not, or something failed."""
    return run_experiment(ValidateSim, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
