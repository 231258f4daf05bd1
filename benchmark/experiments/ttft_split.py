"""Where the time to the first token goes, on real SGLang servers behind the router.

    python -m benchmark.experiments.ttft_split --json out/ttft_split.json          # about 2 minutes

Each policy gets a fresh prefill/decode pair and the same long-tailed trace, at `--load` of the
prefill capacity that the first pair is measured to have. With `--repeat` the order of policies is
reversed from round to round. Client and servers must run on one machine: they share its clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.experiments import demo
from benchmark.harness import arguments, stamp_recorder
from benchmark.harness.experiment import Experiment, Trial, run_experiment
from benchmark.harness.servers import driven, pair_spec, platform, warm_cluster
from sglang_kairos.cluster.run import ClusterSpec
from sglang_kairos.reports import report, stages
from sglang_kairos.reports.stages import Joined


@dataclass(frozen=True)
class SplitRun:
    """One run: the client's metrics, and the split of every request."""

    run: report.Run
    joined: Joined

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


class TtftSplit(demo.Demo):
    """The demo's trials on servers that write down their stamps."""

    fails_with = (*Experiment.fails_with, stages.StageError)

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = arguments.parser_for(
            "benchmark.experiments.ttft_split",
            __doc__,
            policies="fcfs,kairos",
            load_s=55.0,
            repeat=1,
            ttft_ms=1000.0,
            seed=0,
            json=Path("out/ttft_split.json"),
            out=Path("out/ttft_split"),
        )
        parser.add_argument("--load", type=float, default=0.87, help="share of prefill capacity")
        parser.set_defaults(launcher="benchmark.harness.stamp_recorder")
        given = parser.parse_args(argv)
        given.policies = arguments.chosen(parser, "policies", given.policies, demo.POLICIES)
        if not 0 < given.load <= 5:
            parser.error(f"--load: must be above 0 and at most 5, got {given.load:g}")
        arguments.positive(parser, given, ("load_s", "repeat", "ttft_ms"))
        given.utilisation = given.load
        return given

    def measure(self, trial: Trial) -> None:
        folder = self.given.out / "stamps" / trial.name
        folder.mkdir(parents=True, exist_ok=True)
        spec = pair_spec(trial.policy, self.given, self.zygote, trial.say, trial.name)
        with warm_cluster(recorded(spec, folder)) as cluster:
            if self.plan is None:
                self.plan = self.find_rate(cluster, trial)
            result, facts = driven(cluster, self.plan, trial.say)
        facts = {key: value for key, value in facts.items() if not key.startswith("kairos_")}
        result.dump(self.given.out / f"{trial.name}.jsonl")
        joined = stages.join(result.outcomes, result.started_s, noted(folder))
        self.runs.append(SplitRun(report.Run(trial.policy, result, facts), joined))

    def save(self) -> None:
        Experiment.save(self)

    def text(self) -> str:
        assert self.plan is not None
        return f"{platform()}; {self.plan.describe()}\n\n{tables(self.runs)}"

    def finish(self) -> int:
        return Experiment.finish(self)


def recorded(spec: ClusterSpec, folder: Path) -> ClusterSpec:
    """Returns the same cluster, its servers writing their stamps to an empty `folder`."""
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
    return stages.read_records("".join(file.read_text("utf-8") for file in files).splitlines())


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


if __name__ == "__main__":
    sys.exit(run_experiment(TtftSplit))
