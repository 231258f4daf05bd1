"""The demo: one long-tailed trace, four schedulers, real SGLang servers, no GPU needed.

    python -m benchmark.experiments.demo    # fcfs, hrrn, shortest-prefill-first, kairos: 6 minutes

Each policy gets a fresh prefill/decode pair behind the same router, and the same trace. A request
leaves at its time whether or not the earlier ones are answered. The first cluster is measured before
its run, because its speed depends on the machine. All policies are then sent the trace at
`--utilisation` of the prefill capacity found. Writes ``report.json``, ``report.png`` and one JSON
line per request under ``--out``.

`--sglang 0.5.16` runs it on that version, with the stock policies that it has: hrrn came with 0.5.20,
shortest-prefill-first with 0.5.21.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.harness import arguments
from benchmark.harness.experiment import Experiment, Trial, run_experiment
from benchmark.harness.loads import PacedTrace, base_trace, paced
from benchmark.harness.servers import (
    CHUNK_TOKENS,
    KAIROS,
    driven,
    measure_prefill,
    pair_spec,
    platform,
    warm_cluster,
)
from sglang_kairos.cluster.run import ROUTERS
from sglang_kairos.loads import traces
from sglang_kairos.other_sglang import NoSuchSglang, use
from sglang_kairos.reports import report
from sglang_kairos.versions.patch import PatchError, find_tree

POLICIES = ("fcfs", "hrrn", "shortest-prefill-first", KAIROS)


class Demo(Experiment):
    """Every policy on a pair of its own; the rate is found on the first."""

    plan: PacedTrace | None = None

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = arguments.parser_for(
            "benchmark.experiments.demo",
            __doc__,
            policies=None,
            load_s=55.0,
            rate=None,
            utilisation=0.87,
            ttft_ms=1000.0,
            tpot_ms=75.0,
            seed=0,
            repeat=1,
            out=Path("out/demo"),
        )
        parser.add_argument("--sglang", help="version (0.5.16) or folder of another SGLang")
        parser.add_argument("--trace", type=Path, help="instead of our own (docs/simulator.md)")
        traces.add_reading_options(parser)
        parser.add_argument("--requests", type=int, help="how many (default: --load-s of them)")
        routers = [name for name in ROUTERS if name != "none"]
        parser.add_argument("--router", choices=routers, default="kairos")
        parser.add_argument("--launcher", default="sglang_kairos.launch_server")
        parser.add_argument("--model-path", default="", help="default: a tiny random model")
        text = "fork servers from one process that has imported SGLang, or start each anew"
        parser.add_argument("--start", choices=("fork", "spawn"), help=text)
        given = parser.parse_args(argv)
        try:
            if given.sglang:
                use(given.sglang)
            known = known_policies()
        except (NoSuchSglang, PatchError) as error:
            parser.error(str(error))
        asked = ",".join(known) if given.policies is None else given.policies
        given.policies = arguments.chosen(parser, "policies", asked, known, "this SGLang has")
        given.json = given.out / "report.json"
        names = ("rate", "utilisation", "ttft_ms", "tpot_ms", "load_s", "repeat", "requests")
        arguments.positive(parser, given, names)
        return given

    def measure(self, trial: Trial) -> None:
        spec = pair_spec(trial.policy, self.given, self.zygote, trial.say, trial.name)
        with warm_cluster(spec) as cluster:
            if self.plan is None:
                self.plan = self.find_rate(cluster, trial)
            result, facts = driven(cluster, self.plan, trial.say)
        self.runs.append(report.Run(trial.policy, result, facts))
        result.dump(self.given.out / f"{trial.name}.jsonl")

    def find_rate(self, cluster: Any, trial: Trial) -> PacedTrace:
        """Returns the trace at `--rate`, or at the wanted share of the capacity measured now."""
        given, rows = self.given, base_trace(self.given)
        if given.rate:
            return PacedTrace(rows, given.ttft_ms, given.tpot_ms, given.seed, None)
        return paced(rows, given, measure_prefill(cluster, rows, given.utilisation, trial.say))

    def setup(self) -> dict[str, Any]:
        assert self.plan is not None
        return {"platform": platform(), "chunk_tokens": CHUNK_TOKENS, **self.plan.setup()}

    def save(self) -> None:
        super().save()
        assert self.plan is not None
        title = f"{platform()}, one prefill and one decode server; {self.described()}"
        report.write_png(self.given.out / "report.png", self.runs, title)

    def described(self) -> str:
        """Returns the trace and its targets in words."""
        plan = self.plan
        assert plan is not None
        goals = f"targets TTFT {plan.ttft_ms:g} ms, TPOT {plan.tpot_ms:g} ms"
        return f"{plan.describe()}; {goals}"

    def text(self) -> str:
        table = report.table(self.runs, f"{platform()}; {self.described()}")
        out = self.given.out
        return f"{table}\n\nwrote {out / 'report.json'} and {out / 'report.png'}"

    def finish(self) -> int:
        super().finish()
        metrics = [(one.policy, one.result.metrics) for one in self.runs]
        unanswered = [policy for policy, found in metrics if found.failed == found.sent]
        if unanswered:
            print(f"error: nothing was answered under {', '.join(unanswered)}", file=sys.stderr)
        return 1 if unanswered else 0


def known_policies() -> list[str]:
    """Returns those of `POLICIES` that the SGLang found here can be started with."""
    source = find_tree().root / "srt" / "managers" / "schedule_policy.py"
    text = source.read_text(encoding="utf-8")
    return [name for name in POLICIES if name == KAIROS or f'"{name}"' in text]


if __name__ == "__main__":
    sys.exit(run_experiment(Demo))
