"""An SGLang of which one function is unknown: ``--kairos-strict seam`` runs without what it gives.

Random legal decisions on a real pair, as in test_identity.py: no token changes and nothing dies, with
the seam that pausing (or parking) relies on left out.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from identity import JOBS, check_same, run_pair, spec_of
from pd_client import Counters, doomed_jobs, stock_outputs

from helpers.trees import NEWEST, changed_copy
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.engine.seams import losses
from sglang_kairos.other_sglang import first_on_path

# The file, another text for the same function, and which seams are left out.
UNKNOWN = {
    "pausing": (
        "srt/managers/scheduler.py",
        ("def process_pending_chunked_abort(self)", "def process_pending_chunked_abort( self)"),
        ["Scheduler.process_pending_chunked_abort"],
    ),
    "admitting": (
        "srt/managers/schedule_policy.py",
        ("def add_one_req(\n        self,", "def add_one_req(\n        self ,"),
        ["SchedulePolicy.shortest_prefill_chunk_limit", "PrefillAdder.add_one_req"],
    ),
    "parking": (
        "srt/managers/schedule_batch.py",
        ("def prepare_for_decode(self)", "def prepare_for_decode( self)"),
        [
            "SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
            "ScheduleBatch.prepare_for_decode",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", UNKNOWN)
def test_one_unknown_seam_costs_what_it_gives_and_no_token(
    what: str, tiny_model: str, out_dir: Path, tmp_path: Path
) -> None:
    file, change, out = UNKNOWN[what]
    tree = changed_copy(tmp_path, NEWEST, {file: change})
    env = first_on_path(tree)
    jobs, doomed = JOBS[:80], doomed_jobs(12, 16, seed=8, span_s=4.0)
    parks, pauses = what != "parking", what == "parking"

    def enough(prefill: Counters, decode: Counters) -> bool:
        paused = not pauses or prefill["pauses"] >= 10
        return paused and (not parks or decode["parked"] >= 100)

    with Zygote(env={**env, "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}) as zygote:
        logs = out_dir / f"missing-{what}"
        stock = stock_outputs(spec_of(zygote, tiny_model, logs / "stock", env=env), jobs)
        run = run_pair(
            zygote,
            tiny_model,
            logs,
            kairos={"chaos_seed": 11, "strict": "seam"},
            jobs=[*jobs, *doomed],
            enough=enough,
            env=env,
        )
    check_same(run, stock)
    prefill, decode = Counter(run.prefill["counters"]), Counter(run.decode["counters"])
    assert enough(prefill, decode), (prefill, decode)
    assert bool(prefill["pauses"]) == pauses and bool(decode["parked"]) == parks
    for report in (run.prefill, run.decode):
        assert report["lost"] == {name: losses.LOST[name] for name in out}
    assert ("is unknown" in run.prefill["cannot_pause"]) != pauses
