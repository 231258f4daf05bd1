"""Records decisions of real Kairos servers, for the planners to take again.

    python -m benchmark.record_decisions --out test/sim/data/decisions.jsonl.gz

One prefill and one decode server on this CPU take a trace with tight, mixed targets; what their
decision logs say is thinned to the decisions with a choice in them, evenly over the run.
`test/sim/test_recorded_queues.py` puts the same queues to the planners.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark import demo
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.engine.state.decision_log import files_of
from sglang_kairos.loads.replay import make_jobs, replay, run
from sglang_kairos.loads.traces import Request

LOG_VARIABLE = "KAIROS_DECISION_LOG"
TTFT_MS = (300.0, 1000.0, 4000.0)
TPOT_MS = (8.0, 15.0, 40.0)
# Soon starving, and parking even where a shared core makes steps hard to predict.
SETTINGS = {"KAIROS_MAX_WAIT": "3", "KAIROS_MAX_STEP_ERROR": "100"}
SHORTEST_QUEUE = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Records, thins and writes; prints what is in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.record_decisions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("out/decisions"))
    parser.add_argument("--load-s", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=6.0)
    parser.add_argument("--keep", type=int, default=40, help="decisions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    own = parser.parse_args(argv)
    given = demo.parse(
        [f"--load-s={own.load_s}", f"--rate={own.rate}", f"--seed={own.seed}", f"--out={own.logs}"]
    )
    own.logs.mkdir(parents=True, exist_ok=True)
    log = (own.logs / "decisions.jsonl").resolve()
    for old in files_of(log):
        old.unlink()
    say = demo.narrator("[record]")
    rows = demo.base_trace(given)

    def tier(choices: Sequence[float]) -> Any:
        def choose(row: Request) -> float:
            return choices[(row.input_tokens + row.output_tokens) % len(choices)]

        return choose

    with demo.start_method(given) as zygote:
        spec = demo.spec_for(demo.KAIROS, given, zygote, say, 1)
        spec = replace(
            spec,
            env={**spec.env, **SETTINGS, LOG_VARIABLE: str(log)},
        )
        with Cluster(spec) as cluster:
            demo.separate(cluster)
            demo.warm_up(cluster)
            jobs = make_jobs(rows, tier(TTFT_MS), tier(TPOT_MS), seed=own.seed)
            run(replay(cluster.url, jobs, timeout_s=demo.TIMEOUT_S, check=cluster.check))
    files = [file for role in ("prefill", "decode") for file in files_of(log, role)]
    kept = [record for file in files for record in thinned(file, own.keep)]
    own.out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in kept)
    # No name and no time in the header: the same decisions make the same file.
    own.out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    kinds = [record["kind"] for record in kept]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    print(f"{own.out}: {counts}, {own.out.stat().st_size:,} bytes")
    return 0


def thinned(log: Path, keep: int) -> list[dict[str, Any]]:
    """At most `keep` decisions that had a choice, evenly spread over the log."""
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


if __name__ == "__main__":
    sys.exit(main())
