"""Records decisions of real Kairos servers, for the planners to take again.

    python -m benchmark.experiments.record_decisions --out test/sim/data/decisions.jsonl.gz

One prefill and one decode server on this CPU take a trace with tight, mixed targets. What their
decision logs say is thinned to the decisions with a choice in them, evenly over the run.
`test/sim/test_recorded_queues.py` puts the same queues to the planners.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.harness import arguments, driver
from benchmark.harness.experiment import PairExperiment, Trial, run_experiment
from benchmark.harness.servers import KAIROS, TIMEOUT_S
from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.engine.state.decision_log import files_of
from sglang_kairos.loads.traces import Request

LOG_VARIABLE = "KAIROS_DECISION_LOG"
TTFT_MS = (300.0, 1000.0, 4000.0)
TPOT_MS = (8.0, 15.0, 40.0)
# Soon starving, and parking even where a shared core makes steps hard to predict.
SETTINGS = {"KAIROS_MAX_WAIT": "3", "KAIROS_MAX_STEP_ERROR": "100"}
SHORTEST_QUEUE = 3


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line."""
    defaults = {"load_s": 20.0, "rate": 6.0, "seed": 0}
    parser = arguments.parser_for("benchmark.experiments.record_decisions", __doc__, **defaults)
    parser.add_argument("--out", type=Path, required=True, dest="file")
    parser.add_argument("--logs", type=Path, default=Path("out/decisions"), dest="out")
    parser.add_argument("--keep", type=int, default=40, help="decisions of each kind")
    given = parser.parse_args(argv)
    arguments.positive(parser, given, ("load_s", "rate", "keep"))
    given.policies, given.repeat, given.ttft_ms = [KAIROS], 1, TTFT_MS[0]
    return given


class RecordDecisions(PairExperiment):
    """One pair of Kairos whose decisions are written down."""

    @property
    def log(self) -> Path:
        return Path(self.given.out / "decisions.jsonl").resolve()

    def spec(self, trial: Trial) -> ClusterSpec:
        for old in files_of(self.log):
            old.unlink()
        pair = super().spec(trial)
        return replace(pair, env={**pair.env, **SETTINGS, LOG_VARIABLE: str(self.log)})

    def measure_pair(self, cluster: Cluster, trial: Trial) -> None:
        targets = tier(TTFT_MS), tier(TPOT_MS)
        seed = self.given.seed
        driver.send(cluster, self.rows, *targets, seed=seed, timeout_s=TIMEOUT_S)

    def text(self) -> str:
        """Thins and writes. Returns what is in the file."""
        given = self.given
        files = [file for role in ("prefill", "decode") for file in files_of(self.log, role)]
        kept = [record for file in files for record in thinned(file, given.keep)]
        text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept)
        given.file.parent.mkdir(parents=True, exist_ok=True)
        # No name and no time in the header: the same decisions make the same file.
        given.file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        kinds = [record["kind"] for record in kept]
        counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        return f"{given.file}: {counts}, {given.file.stat().st_size:,} bytes"


def tier(choices: Sequence[float]) -> Callable[[Request], float]:
    """Returns what gives each request one of the targets, by its lengths."""
    return lambda row: choices[(row.input_tokens + row.output_tokens) % len(choices)]


def thinned(log: Path, keep: int) -> list[dict[str, Any]]:
    """Returns at most `keep` decisions that had a choice, evenly spread over the log."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    chosen = [record for record in records if has_choice(record)]
    step = max(1.0, len(chosen) / keep)
    return [chosen[int(at * step)] for at in range(min(keep, len(chosen)))]


def has_choice(record: dict[str, Any]) -> bool:
    """Prefill: something was changed about the queue as it stood. Decode: there was a choice."""
    if record["kind"] == "prefill":
        waiting = len(record["order"]) + len(record["hold"])
        moved = record["order"] != list(range(len(record["order"])))
        in_slot = waiting if record["view"]["in_slot"] else -1
        return moved or bool(record["hold"]) or record["slot"] != in_slot
    return record["kind"] == "decode" and len(record["slack_s"]) >= SHORTEST_QUEUE


def main(argv: Sequence[str] | None = None) -> int:
    """Records, thins and writes. Returns the exit status."""
    return run_experiment(RecordDecisions, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
