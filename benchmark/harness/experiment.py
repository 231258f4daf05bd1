"""An experiment: policies × loads × rounds, the order of policies reversed from round to round."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from benchmark.harness import driver, loads, servers
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.loads.traces import TraceError


@dataclass(frozen=True)
class Trial:
    """One policy at one load in one round (from 0). `number` counts trials from 1."""

    policy: str
    load: Any
    turn: int
    number: int
    say: servers.Say

    @property
    def name(self) -> str:
        return f"{self.number}-{self.policy}"


class Experiment:
    """Runs all trials, keeps their rows in JSON, and reports. Subclasses say what a trial is.

    A trial appends to `runs` whatever has a `row()`. The JSON is rewritten after each trial, so a
    run that is cut off leaves what it had.
    """

    fails_with: ClassVar[tuple[type[Exception], ...]] = (ClusterError, TraceError)

    def __init__(self, given: argparse.Namespace, zygote: Any = None) -> None:
        self.given, self.zygote = given, zygote
        self.runs: list[Any] = []

    def loads(self) -> Sequence[Any]:
        """Returns the loads, outermost first."""
        return (None,)

    def trials(self) -> Iterator[Trial]:
        """Yields every policy of every round of every load, in order."""
        cells = [
            (policy, load, turn)
            for load in self.loads()
            for turn, policies in enumerate(alternated(self.given.policies, self.given.repeat))
            for policy in policies
        ]
        for number, (policy, load, turn) in enumerate(cells, start=1):
            at = "" if load is None else f" load {load}"
            say = servers.narrator(f"[{number}/{len(cells)} {policy}{at}]")
            yield Trial(policy, load, turn, number, say)

    def run(self) -> None:
        """Measures every trial."""
        for trial in self.trials():
            self.measure(trial)
            self.save(trial)

    def measure(self, trial: Trial) -> None:
        """Runs one trial and appends what it found to `runs`."""
        raise NotImplementedError

    def setup(self) -> dict[str, Any]:
        """Returns what was run, for the JSON."""
        return {}

    def report(self) -> dict[str, Any] | list[Any]:
        """Returns what the JSON holds."""
        return {"runs": [one.row() for one in self.runs], "setup": self.setup()}

    def save(self, trial: Trial) -> None:
        """Writes what was found so far to `--json`."""
        if self.given.json:
            write_json(self.given.json, self.report())

    def text(self) -> str:
        """Returns what is printed at the end, and written to `--markdown`."""
        raise NotImplementedError

    def finish(self) -> int:
        """Prints the report. Returns the exit status."""
        print("\n" + self.text())
        if getattr(self.given, "markdown", None):
            self.given.markdown.write_text(self.text() + "\n", encoding="utf-8")
        return 0


class PairExperiment(Experiment):
    """A fresh prefill/decode pair per trial, all sent the same trace.

    How fast that is depends on the machine: the first pair is measured, and the trace then sent at
    `--utilisation` of its prefill capacity.
    """

    plan: loads.PacedTrace

    def __init__(self, given: argparse.Namespace, zygote: Any = None) -> None:
        super().__init__(given, zygote)
        self.rows = loads.base_trace(given)

    def spec(self, trial: Trial) -> ClusterSpec:
        """Returns the cluster of a trial."""
        return servers.pair_spec(trial.policy, self.given, self.zygote, trial.say, trial.name)

    def prepare(self, cluster: Cluster) -> None:
        """Gives schedulers their cores and warms the servers."""
        servers.separate(cluster)
        driver.warm_up(cluster)

    def paced(self, cluster: Cluster, say: servers.Say) -> None:
        """Sets `plan`: how fast the trace goes to all policies."""
        given, rows = self.given, self.rows
        if given.rate:
            self.plan = loads.PacedTrace(rows, given.ttft_ms, given.tpot_ms, given.seed, None)
        else:
            seconds = driver.measure_prefill(cluster, rows, given.utilisation, say)
            self.plan = loads.paced(rows, given, seconds)

    def measure(self, trial: Trial) -> None:
        with Cluster(self.spec(trial)) as cluster:
            trial.say(f"servers ready after {cluster.started_in_s:.1f} s; warming up")
            self.prepare(cluster)
            if not hasattr(self, "plan"):
                self.paced(cluster, trial.say)
            self.measure_pair(cluster, trial)

    def measure_pair(self, cluster: Cluster, trial: Trial) -> None:
        """Sends the plan to a pair that is warm, and appends to `runs`."""
        raise NotImplementedError

    def setup(self) -> dict[str, Any]:
        facts = {"platform": servers.platform(), "chunk_tokens": servers.CHUNK_TOKENS}
        return {**facts, **self.plan.setup()}


def alternated(policies: Sequence[str], rounds: int) -> list[list[str]]:
    """Returns the policies of each round: forwards, backwards, forwards …"""
    return [list(policies[:: -1 if turn % 2 else 1]) for turn in range(rounds)]


def write_json(path: Path, data: Any, indent: int = 2) -> None:
    """Writes `data` to `path`, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")


def run_experiment(kind: type[Experiment], given: argparse.Namespace) -> int:
    """Runs an experiment on real servers. Returns the exit status."""
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with servers.start_method(given) as zygote:
            experiment = kind(given, zygote)
            experiment.run()
    except kind.fails_with as error:
        first, _, rest = str(error).partition("\n")
        if rest:
            print(rest, file=sys.stderr)
        print(f"error: {first}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything stopped", file=sys.stderr)
        return 130
    return experiment.finish()
