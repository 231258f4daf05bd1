"""Where the time to the first token goes, on real SGLang servers behind the router.

    python -m benchmark.ttft_split --json out/ttft_split.json          # about 2 minutes

Each policy gets a fresh prefill/decode pair (the demo's) and the same long-tailed trace, at `--load`
of the prefill capacity that the first pair is measured to have; with `--repeat` the order of policies
is reversed from round to round. Client and servers must run on one machine: they share its clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark import demo, stamp_recorder
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.loads import traces
from sglang_kairos.reports import report, stages
from sglang_kairos.reports.stages import Joined


@dataclass(frozen=True)
class Measured:
    """One run: the client's metrics, and the split of every request."""

    run: report.Run
    joined: Joined

    @property
    def moved_ms(self) -> float:
        return max((one.moved_ms for one in self.joined.splits), default=0.0)

    def row(self) -> dict[str, Any]:
        """The run's JSON object."""
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        with demo.start_method(given) as zygote:
            done, plan = run_all(given, zygote)
    except (ClusterError, traces.TraceError, stages.StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything stopped", file=sys.stderr)
        return 130
    print(f"\n{demo.platform()}; {plan.describe()}\n")
    print(tables(done))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, filled up with what the demo's functions want to know."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.ttft_split", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", default="fcfs,kairos", help=f"of {', '.join(demo.POLICIES)}")
    parser.add_argument("--load", type=float, default=0.87, help="share of the prefill capacity")
    parser.add_argument("--load-s", type=float, default=55.0, help="seconds of arrivals per run")
    parser.add_argument("--repeat", type=int, default=1, help="rounds")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("out/ttft_split.json"))
    parser.add_argument("--out", type=Path, default=Path("out/ttft_split"), help="logs, requests")
    given = parser.parse_args(argv)
    given.policies = given.policies.split(",")
    unknown = [name for name in given.policies if name not in demo.POLICIES]
    if unknown:
        parser.error(f"--policies: {', '.join(map(repr, unknown))}: none of {demo.POLICIES}")
    if not 0 < given.load <= 5:
        parser.error(f"--load: must be above 0 and at most 5, got {given.load:g}")
    for name in ("load_s", "repeat", "ttft_ms"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: must be positive")
    given.utilisation = given.load
    for name, value in vars(demo.parse(["--launcher=benchmark.stamp_recorder"])).items():
        if not hasattr(given, name):
            setattr(given, name, value)
    return given


def run_all(given: argparse.Namespace, zygote: Any) -> tuple[list[Measured], demo.Plan]:
    """Every policy, `repeat` times; the JSON is rewritten after each run."""
    order = [
        policy
        for turn in range(given.repeat)
        for policy in given.policies[:: -1 if turn % 2 else 1]
    ]
    rows = demo.base_trace(given)
    plan: demo.Plan | None = None
    done: list[Measured] = []
    for number, policy in enumerate(order, start=1):
        say = demo.narrator(f"[{number}/{len(order)} {policy}]")
        folder = given.out / "stamps" / f"{number}-{policy}"
        folder.mkdir(parents=True, exist_ok=True)
        spec = recorded(demo.spec_for(policy, given, zygote, say, number), folder)
        with Cluster(spec) as cluster:
            demo.separate(cluster)
            demo.warm_up(cluster)
            if plan is None:
                seconds = demo.measure_prefill(cluster, rows, given.utilisation, say)
                plan = demo.paced(rows, given, seconds)
            say(plan.describe())
            before = demo.prefill_busy_s(cluster)
            result = demo.drive(cluster, plan, say)
            busy = (demo.prefill_busy_s(cluster) - before) / plan.rows[-1].arrival_s
        result.dump(given.out / f"{number}-{policy}.jsonl")
        run = report.Run(policy, result, {"prefill_utilisation": round(busy, 3)})
        done.append(Measured(run, stages.join(result.outcomes, result.started_s, noted(folder))))
        say(f"{demo.summary(result)}; prefill busy {100 * busy:.0f} % of the trace's span")
        save(given.json, done, plan)
    assert plan is not None
    return done, plan


def recorded(spec: ClusterSpec, folder: Path) -> ClusterSpec:
    """The same cluster, its servers writing their stamps to an empty `folder`."""
    for old in folder.glob("*.jsonl"):
        old.unlink()
    return replace(
        spec,
        server_args=[*spec.server_args, stamp_recorder.FLAG],
        env={**spec.env, stamp_recorder.FOLDER_VARIABLE: str(folder.absolute())},
    )


def noted(folder: Path) -> stages.Records:
    """What all servers of a run wrote."""
    files = sorted(folder.glob("*.jsonl"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return stages.read_records(text.splitlines())


def save(path: Path, done: Sequence[Measured], plan: demo.Plan) -> None:
    """Writes the runs so far, and what was run."""
    setup = {
        "platform": demo.platform(),
        "requests": len(plan.rows),
        "rate_rps": round(plan.rate, 3),
        "prefill_capacity_rps": plan.capacity_rps and round(plan.capacity_rps, 3),
        "ttft_ms": plan.ttft_ms,
        "chunk_tokens": demo.CHUNK_TOKENS,
        "seed": plan.seed,
        "input_tokens": demo.quantiles([row.input_tokens for row in plan.rows]),
        "output_tokens": demo.quantiles([row.output_tokens for row in plan.rows]),
    }
    text = json.dumps({"runs": [one.row() for one in done], "setup": setup}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def tables(done: Sequence[Measured]) -> str:
    """The split by policy, all rounds together, and what it leaves out."""
    policies = dict.fromkeys(one.run.policy for one in done)
    together = {
        policy: [s for one in done if one.run.policy == policy for s in one.joined.splits]
        for policy in policies
    }
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
    sys.exit(main())
