"""The demo: one long-tailed trace, four schedulers, real SGLang servers, no GPU needed.

    python -m benchmark.experiments.demo   # fcfs, hrrn, shortest-prefill-first, kairos: 6 minutes

Each policy gets a fresh prefill/decode pair behind the same router, and the same trace. It is sent
open loop: a request leaves at its time whether or not the earlier ones are answered. How fast that
is depends on the machine, so the first cluster is measured before its run. The trace is sent at
`--utilisation` of the prefill capacity found, to all policies alike. Writes ``report.json``,
``report.png`` and one JSON line per request under ``--out``.

`--sglang 0.5.16` runs it on that version, with the stock policies that it has: hrrn came with
0.5.20, shortest-prefill-first with 0.5.21.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.harness import arguments, driver
from benchmark.harness.experiment import PairExperiment, Trial, run_experiment
from benchmark.harness.servers import KAIROS, kairos_reports, platform
from sglang_kairos.cluster.run import ROUTERS, Cluster
from sglang_kairos.loads import traces
from sglang_kairos.other_sglang import NoSuchSglang, use
from sglang_kairos.reports import report
from sglang_kairos.versions.patch import PatchError, find_tree

POLICIES = ("fcfs", "hrrn", "shortest-prefill-first", KAIROS)
DEFAULTS: dict[str, Any] = {
    "policies": None,
    "trace": None,
    "requests": None,
    "load_s": 55.0,
    "rate": None,
    "utilisation": 0.87,
    "ttft_ms": 1000.0,
    "tpot_ms": 75.0,
    "seed": 0,
    "repeat": 1,
    "out": Path("out/demo"),
    "model_path": "",
}
POSITIVE = ("rate", "utilisation", "ttft_ms", "tpot_ms", "load_s", "repeat", "requests")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line, with policies as a list."""
    parser = arguments.parser_for("benchmark.experiments.demo", __doc__, **DEFAULTS)
    traces.add_reading_options(parser)
    arguments.add_start(parser)
    parser.add_argument("--sglang", help="version (0.5.16) or folder of another SGLang than ours")
    routers = [name for name in ROUTERS if name != "none"]
    parser.add_argument("--router", choices=routers, default="kairos")
    parser.add_argument("--launcher", default="sglang_kairos.launch_server")
    given = parser.parse_args(argv)
    try:
        if given.sglang:
            use(given.sglang)
        known = known_policies()
    except (NoSuchSglang, PatchError) as error:
        parser.error(str(error))
    asked = ",".join(known) if given.policies is None else given.policies
    given.policies = arguments.chosen(parser, "policies", asked, known, "this SGLang has")
    arguments.positive(parser, given, POSITIVE)
    return given


def known_policies() -> list[str]:
    """Returns those of `POLICIES` that the SGLang found here can be started with."""
    source = find_tree().root / "srt" / "managers" / "schedule_policy.py"
    text = source.read_text(encoding="utf-8")
    return [name for name in POLICIES if name == KAIROS or f'"{name}"' in text]


class Demo(PairExperiment):
    """Every policy, `repeat` times. The report is rewritten after each run."""

    def measure_pair(self, cluster: Cluster, trial: Trial) -> None:
        trial.say(self.plan.describe())
        result, busy_s = driver.drive(cluster, self.plan, trial.say)
        busy = busy_s / self.plan.rows[-1].arrival_s
        facts = {} if math.isnan(busy) else {"prefill_utilisation": round(busy, 3)}
        self.runs.append(report.Run(trial.policy, result, facts | kairos_reports(cluster)))
        share = "" if math.isnan(busy) else f"; prefill busy {100 * busy:.0f} % of the trace's span"
        trial.say(driver.summary(result) + share)

    def save(self, trial: Trial) -> None:
        out = self.given.out
        self.runs[-1].result.dump(out / f"{trial.name}.jsonl")
        report.write_json(out / "report.json", self.runs, self.setup())
        title = f"{platform()}, one prefill and one decode server; {self.about()}"
        report.write_png(out / "report.png", self.runs, title)

    def about(self) -> str:
        plan = self.plan
        targets = f"targets TTFT {plan.ttft_ms:g} ms, TPOT {plan.tpot_ms:g} ms"
        return f"{plan.describe()}; {targets}"

    def text(self) -> str:
        files = " and ".join(str(self.given.out / f"report.{kind}") for kind in ("json", "png"))
        return f"{report.table(self.runs, f'{platform()}; {self.about()}')}\n\nwrote {files}"

    def finish(self) -> int:
        super().finish()
        sent = len(self.plan.rows)
        dead = [one.policy for one in self.runs if one.result.metrics.failed == sent]
        if dead:
            print(f"error: nothing was answered under {', '.join(dead)}", file=sys.stderr)
        return 1 if dead else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns the exit status."""
    return run_experiment(Demo, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
