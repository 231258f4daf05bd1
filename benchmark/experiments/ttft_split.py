"""Where the time to the first token goes, on real SGLang servers behind the router.

    python -m benchmark.experiments.ttft_split --json out/ttft_split.json          # about 2 minutes

Each policy gets a fresh prefill/decode pair (the demo's) and the same long-tailed trace. It is sent
at `--load` of the prefill capacity that the first pair is measured to have. Client and servers must
run on one machine: they share its clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.experiments.demo import POLICIES
from benchmark.harness import arguments, driver, stamp_recorder
from benchmark.harness.experiment import PairExperiment, Trial, run_experiment
from benchmark.harness.servers import platform
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.reports import report, stages

DEFAULTS: dict[str, Any] = {
    "policies": "fcfs,kairos",
    "load_s": 55.0,
    "repeat": 1,
    "ttft_ms": 1000.0,
    "seed": 0,
    "json": Path("out/ttft_split.json"),
    "out": Path("out/ttft_split"),
}


@dataclass(frozen=True)
class SplitRun:
    """One run: the client's metrics, and the split of every request."""

    run: report.Run
    joined: stages.Joined

    @property
    def moved_ms(self) -> float:
        return max((one.moved_ms for one in self.joined.splits), default=0.0)

    def row(self) -> dict[str, Any]:
        """Returns the run's JSON object."""
        summaries = stages.summarise(self.joined.splits)
        return {
            **self.run.row(),
            "split": len(self.joined.splits),
            "left_out": dict(self.joined.left_out),
            "moved_ms": round(self.moved_ms, 3),
            "stages": {
                name: {key: round(value, 3) for key, value in asdict(found).items()}
                for name, found in summaries.items()
            },
        }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line."""
    parser = arguments.parser_for("benchmark.experiments.ttft_split", __doc__, **DEFAULTS)
    parser.add_argument("--load", type=float, default=0.87, help="share of the prefill capacity")
    given = parser.parse_args(argv)
    given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
    if not 0 < given.load <= 5:
        parser.error(f"--load: must be above 0 and at most 5, got {given.load:g}")
    arguments.positive(parser, given, ("load_s", "repeat", "ttft_ms"))
    given.utilisation, given.launcher = given.load, stamp_recorder.__name__
    return given


class TtftSplit(PairExperiment):
    """Runs the demo's pairs with servers that write down their time stamps."""

    fails_with = (*PairExperiment.fails_with, stages.StageError)

    def spec(self, trial: Trial) -> ClusterSpec:
        return recorded(super().spec(trial), self.folder(trial))

    def folder(self, trial: Trial) -> Path:
        return Path(self.given.out) / "stamps" / trial.name

    def measure_pair(self, cluster: Cluster, trial: Trial) -> None:
        trial.say(self.plan.describe())
        result, busy_s = driver.drive(cluster, self.plan, trial.say)
        busy = busy_s / self.plan.rows[-1].arrival_s
        result.dump(self.given.out / f"{trial.name}.jsonl")
        run = report.Run(trial.policy, result, {"prefill_utilisation": round(busy, 3)})
        records = noted(self.folder(trial))
        self.runs.append(SplitRun(run, stages.join(result.outcomes, result.started_s, records)))
        busy_text = f"prefill busy {100 * busy:.0f} % of the trace's span"
        trial.say(f"{driver.summary(result)}; {busy_text}")

    def text(self) -> str:
        return f"{platform()}; {self.plan.describe()}\n\n{tables(self.runs)}"


def recorded(spec: ClusterSpec, folder: Path) -> ClusterSpec:
    """Returns the same cluster, its servers writing their stamps to `folder`, which is emptied."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    return replace(
        spec,
        server_args=[*spec.server_args, stamp_recorder.FLAG],
        env={**spec.env, stamp_recorder.FOLDER_VARIABLE: str(folder.absolute())},
    )


def noted(folder: Path) -> stages.Records:
    """Returns what all servers of a run wrote."""
    files = sorted(folder.glob("*.jsonl"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return stages.read_records(text.splitlines())


def tables(done: Sequence[SplitRun]) -> str:
    """Returns the split by policy, all rounds together, and what it leaves out."""
    together: dict[str, list[stages.Split]] = {}
    for one in done:
        together.setdefault(one.run.policy, []).extend(one.joined.splits)
    lines = [stages.table(together), ""]
    for one in done:
        left_out = ", ".join(f"{count} {why}" for why, count in one.joined.left_out.items())
        lines.append(
            f"{one.run.policy}: {len(one.joined.splits)} requests split, left out: "
            f"{left_out or 'none'}; stamps moved by at most {one.moved_ms:.2f} ms; "
            f"TTFT met {100 * one.run.result.metrics.ttft_attainment:.1f} %"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment. Returns the exit status."""
    return run_experiment(TtftSplit, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
