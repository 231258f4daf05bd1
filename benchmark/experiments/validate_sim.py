"""Does the simulator predict what real servers do? Real PD clusters on this CPU against it.

    python -m benchmark.validate_sim --load-s 45 --json out/validation.json

Each turn starts a fresh cluster with one policy and replays two traces of the same kind and load,
open loop. The first is recorded step by step (`benchmark.step_recorder`) and calibrates the
simulator: `sglang_kairos.sim.calibrate.calibrate`. Then the recorder takes itself out, and the
second trace, of another seed, is judged: its measured attainment against that of the simulator,
which has seen nothing of it but the trace. Policies take turns forwards and backwards.

*Drift* is how much longer prefill took in the judged replay than in the one calibrated on, by
SGLang's own busy counter and for the work in each trace: what the machine changed in between is
not the simulator's error, so the table also tells what it predicts with prefill steps scaled by
that one number.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmark import demo
from benchmark.step_recorder import FOLDER_VARIABLE, GATE
from sglang_kairos.cluster.run import Cluster, ClusterError
from sglang_kairos.loads.replay import Result
from sglang_kairos.loads.traces import Request
from sglang_kairos.local_http import open_url
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.calibrate import recording
from sglang_kairos.sim.calibrate.calibrate import Calibration, CalibrationError, calibrate

ORDER = ("fcfs", demo.KAIROS)
OTHER_SEED = 1000  # the calibration trace's, counted from the judged one's
PERCENTILES = (50, 90, 99)
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
GOAL_POINTS = 5.0


@dataclass(frozen=True)
class Turn:
    """One cluster: what it was calibrated to, and the judged replay, measured and simulated.

    `simulated` and `drifted` (with prefill steps times `drift`) hold one run per seed; `servers` is
    what Kairos tells of itself afterwards."""

    policy: str
    calibration: Calibration
    drift: float
    measured: Result
    simulated: list[Result]
    drifted: list[Result]
    servers: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """The JSON object of this turn: attainments in percent, errors in points."""
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
        """Lowest and highest simulated TTFT attainment, in percent."""
        met = [100 * one.metrics.ttft_attainment for one in self.simulated]
        return round(min(met), 2), round(max(met), 2)

    def errors(self, simulated: list[Result]) -> dict[str, float]:
        """Simulated less measured attainment, in points."""
        told, seen = figures(simulated), figures([self.measured])
        return {name: round(told[name] - seen[name], 2) for name in ("ttft_met", "tpot_met")}


def figures(runs: Sequence[Result]) -> dict[str, float]:
    """Mean over runs: attainments in percent, percentiles of TTFT and TPOT in ms."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison. 0: every error is within the goal; 1: not, or something failed."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with demo.start_method(given) as zygote:
            turns, setup = run_all(given, zygote)
    except (ClusterError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything stopped", file=sys.stderr)
        return 130
    text = markdown(turns, setup)
    print("\n" + text)
    if given.markdown:
        drop_in(given.markdown, text)
    return int(worst(turns) > GOAL_POINTS)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what is not named there is as in the demo."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.validate_sim", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", default=",".join(ORDER), help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=2, help="rounds, order reversed in between")
    parser.add_argument("--load-s", type=float, default=45.0, help="seconds of arrivals per trace")
    parser.add_argument(
        "--rate",
        type=float,
        help="requests/s; a measured rate loads both traces alike, a given one need not",
    )
    parser.add_argument("--utilisation", type=float, default=0.87, help="of the prefill capacity")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--tpot-ms", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0, help="of the judged trace")
    parser.add_argument("--sim-seeds", type=int, default=10, help="simulated runs per turn")
    parser.add_argument("--out", type=Path, default=Path("out/validation"))
    parser.add_argument("--json", type=Path, help="write the turns there, rewritten after each")
    parser.add_argument("--markdown", type=Path, help=f"drop the table into it, after {BEGIN}")
    own = parser.parse_args(argv)
    names = ("policies", "repeat", "load_s", "utilisation", "ttft_ms", "tpot_ms", "seed", "out")
    flags = [f"--{name.replace('_', '-')}={getattr(own, name)}" for name in names]
    flags += [] if own.rate is None else [f"--rate={own.rate}"]
    given = demo.parse([*flags, "--launcher=benchmark.step_recorder"])
    if own.sim_seeds < 1:
        parser.error(f"--sim-seeds: must be positive, got {own.sim_seeds}")
    if own.markdown:
        try:
            parts_of(own.markdown)
        except (OSError, ValueError) as error:
            parser.error(f"--markdown: {error}")
    given.sim_seeds, given.json, given.markdown = own.sim_seeds, own.json, own.markdown
    return given


def run_all(given: argparse.Namespace, zygote: Any) -> tuple[list[Turn], dict[str, Any]]:
    """All turns; the JSON is rewritten after each."""
    rounds = [given.policies[:: -1 if turn % 2 else 1] for turn in range(given.repeat)]
    order = list(itertools.chain.from_iterable(rounds))
    judged = demo.base_trace(given)
    rehearsed = demo.base_trace(
        argparse.Namespace(**{**vars(given), "seed": given.seed + OTHER_SEED})
    )
    plans: tuple[demo.Plan, demo.Plan] | None = None
    turns: list[Turn] = []
    setup: dict[str, Any] = {}
    for number, policy in enumerate(order, start=1):
        say = demo.narrator(f"[{number}/{len(order)} {policy}]")
        folder = given.out / f"{number}-{policy}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GATE).touch()
        spec = demo.spec_for(policy, given, zygote, say, number)
        spec = replace(spec, env={**spec.env, FOLDER_VARIABLE: str(folder.resolve())})
        with Cluster(spec) as cluster:
            demo.separate(cluster)
            demo.warm_up(cluster)
            if plans is None:
                plans = paced(cluster, judged, rehearsed, given, say)
                setup = describe(given, plans[1])
            turns.append(one_turn(cluster, policy, plans, folder, given.sim_seeds, say))
        say(summary(turns[-1]))
        if given.json:
            report = {"setup": setup, "turns": [turn.row() for turn in turns]}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return turns, setup


def paced(
    cluster: Cluster,
    judged: list[Request],
    rehearsed: list[Request],
    given: argparse.Namespace,
    say: Callable[[str], None],
) -> tuple[demo.Plan, demo.Plan]:
    """The calibration trace and the judged one, at the wanted share of the measured capacity."""
    if given.rate:
        plan = demo.Plan(judged, given.ttft_ms, given.tpot_ms, given.seed, None)
        return replace(plan, rows=rehearsed, seed=given.seed + OTHER_SEED), plan
    seconds = demo.measure_prefill(cluster, [*judged, *rehearsed], given.utilisation, say)
    plan = demo.paced(judged, given, seconds[: len(judged)])
    other = demo.paced(rehearsed, given, seconds[len(judged) :])
    say(f"calibration: {other.describe()}")
    say(f"judged: {plan.describe()}")
    return replace(other, seed=given.seed + OTHER_SEED), plan


def one_turn(
    cluster: Cluster,
    policy: str,
    plans: tuple[demo.Plan, demo.Plan],
    folder: Path,
    seeds: int,
    say: Callable[[str], None],
) -> Turn:
    """Calibration replay, judged replay, simulation of the judged one."""
    other, plan = plans
    before = demo.prefill_busy_s(cluster)
    begun = time.perf_counter()
    rehearsal = demo.drive(cluster, other, say)
    counted = demo.prefill_busy_s(cluster) - before
    (folder / GATE).unlink()
    demo.warm_up(cluster)  # the steps that make the recorder leave; empties the caches
    (folder / "begun.json").write_text(json.dumps(begun))
    seen = recording.read(folder, rehearsal.outcomes, begun)
    calibration = calibrate(seen, sizes(cluster), late_results=True)
    before = demo.prefill_busy_s(cluster)
    measured = demo.drive(cluster, plan, say)
    judged_counted = demo.prefill_busy_s(cluster) - before
    rehearsal.dump(folder / "calibration.jsonl")
    measured.dump(folder / "judged.jsonl")

    def simulate(with_: Calibration) -> tuple[list[Result], float]:
        runs = [
            with_.simulate(POLICIES[policy], plan.rows, plan.ttft_ms, plan.tpot_ms, seed)
            for seed in range(seeds)
        ]
        return [one.result for one in runs], mean(one.prefill_busy_s for one in runs)

    simulated, busy_s = simulate(calibration)
    # The counter and the recording measure slightly different things: compare like with like.
    drift = (judged_counted / counted) / (busy_s / sum(recording.cycles(seen.prefill)))
    drifted, _ = simulate(calibration.scaled(prefill=drift))
    servers = demo.kairos_reports(cluster)
    return Turn(policy, calibration, drift, measured, simulated, drifted, servers)


def sizes(cluster: Cluster) -> dict[str, int]:
    """What `System` wants to know of the servers, from themselves."""
    prefill, decode = (
        server_info(url) for url in (cluster.prefill_urls[0], cluster.decode_urls[0])
    )
    return {
        "chunk_tokens": prefill["chunked_prefill_size"],
        "prefill_kv_tokens": prefill["max_total_num_tokens"],
        "decode_kv_tokens": decode["max_total_num_tokens"],
        "max_running": decode["max_running_requests"],
        "reserved_tokens": decode["num_reserved_decode_tokens"],
    }


def server_info(url: str) -> dict[str, Any]:
    """A server's arguments and state."""
    with open_url(url + "/server_info", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return {**found, **found["internal_states"][0]}


def describe(given: argparse.Namespace, plan: demo.Plan) -> dict[str, Any]:
    """What was run, for the JSON."""
    return {
        "platform": demo.platform(),
        "judged": plan.describe(),
        "rate_rps": round(plan.rate, 3),
        "prompts": demo.quantiles([row.input_tokens for row in plan.rows]),
        "outputs": demo.quantiles([row.output_tokens for row in plan.rows]),
        "ttft_ms": plan.ttft_ms,
        "tpot_ms": plan.tpot_ms,
        "seed": plan.seed,
        "calibration_seed": plan.seed + OTHER_SEED,
        "load_s": given.load_s,
        "sim_seeds": given.sim_seeds,
        "goal_points": GOAL_POINTS,
    }


def summary(turn: Turn) -> str:
    """One turn in a line."""
    measured, told = figures([turn.measured]), figures(turn.simulated)
    errors, drifted = turn.errors(turn.simulated), turn.errors(turn.drifted)
    return (
        f"TTFT met {measured['ttft_met']:.1f} %, simulated {told['ttft_met']:.1f} "
        f"({errors['ttft_met']:+.1f}; with drift {turn.drift:.2f}: {drifted['ttft_met']:+.1f}); "
        f"TPOT met {measured['tpot_met']:.1f} %, simulated {told['tpot_met']:.1f}"
    )


def worst(turns: Sequence[Turn]) -> float:
    """The largest error of an attainment in any turn, in points."""
    return max(abs(error) for turn in turns for error in turn.errors(turn.simulated).values())


def markdown(turns: Sequence[Turn], setup: dict[str, Any]) -> str:
    """The figures as a document shows them."""
    head = (
        "turn | policy | TTFT met %: measured | simulated (seeds) | error | drift | error with drift | "
        "TPOT met %: measured | simulated | error | TTFT p50/p90/p99 s: measured | simulated | "
        "TPOT p50/p90/p99 ms: measured | simulated"
    )
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | "))]

    def quantiles(values: dict[str, float], kind: str, unit: float, digits: int) -> str:
        return "/".join(f"{values[f'{kind}_p{p}_ms'] * unit:.{digits}f}" for p in PERCENTILES)

    for number, turn in enumerate(turns, start=1):
        seen, told = figures([turn.measured]), figures(turn.simulated)
        errors, drifted = turn.errors(turn.simulated), turn.errors(turn.drifted)
        low, high = turn.spread()
        cells = [
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
            quantiles(seen, "ttft", 1e-3, 2),
            quantiles(told, "ttft", 1e-3, 2),
            quantiles(seen, "tpot", 1.0, 0),
            quantiles(told, "tpot", 1.0, 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = (
        f"*{setup['platform']}*; judged: {setup['judged']}; TTFT target {setup['ttft_ms']:g} ms, "
        f"TPOT target {setup['tpot_ms']:g} ms; simulated: mean of {setup['sim_seeds']} seeds. "
        f"Largest error of an attainment: {worst(turns):.1f} points."
    )
    return "\n".join([about, "", *lines])


def parts_of(path: Path) -> tuple[str, str]:
    """What stands before and behind the figures of a document. ValueError without the marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: needs a line {BEGIN} and, below it, {END}")
    return before, after


def drop_in(path: Path, text: str) -> None:
    """Puts `text` between the marks of a document. ValueError without them."""
    before, after = parts_of(path)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
