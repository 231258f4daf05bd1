"""``python -m benchmark.harness.step_recorder``: `launch_server` that notes what each step took.

For calibrating the simulator. It reads two clocks and changes no decision. It stops once the file
`GATE` in the folder of `FOLDER_VARIABLE` is gone and one more step has run. SGLang's own function
is then back in place. Writes ``<mode>.jsonl`` there: one step a line (`sim.calibrate.recording`),
times in seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

FOLDER_VARIABLE = "KAIROS_STEP_RECORD"
GATE = "recording"


def install(folder: Path) -> None:
    """Wraps `Scheduler.run_batch` in this process and those forked from it."""
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.run_batch
    gate = os.fspath(folder / GATE)
    log: TextIO | None = None

    def run_batch(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal log
        if log is None:
            log = (folder / f"{scheduler.disaggregation_mode.value}.jsonl").open("w")
        if not os.path.exists(gate):
            log.close()
            Scheduler.run_batch = original
            return original(scheduler, batch, *args, **kwargs)
        record = describe(batch)
        start_s = time.perf_counter()
        result = original(scheduler, batch, *args, **kwargs)
        record |= {"start_s": start_s, "end_s": time.perf_counter(), "idle": batch.after_idle_gap}
        log.write(json.dumps(record) + "\n")
        return result

    Scheduler.run_batch = run_batch


def describe(batch: Any) -> dict[str, Any]:
    """Returns what the step is about to compute, before SGLang moves on."""
    mode = batch.forward_mode
    rooms = [req.bootstrap_room for req in batch.reqs]
    if mode.is_decode():
        return {"kind": "decode", "rooms": rooms, "kv": int(batch.seq_lens_cpu.sum())}
    return {
        "kind": "prefill",
        "rooms": rooms,
        "new": list(batch.extend_lens or ()),
        "prefix": list(batch.prefix_lens or ()),
        "prompt": [len(req.origin_input_ids) for req in batch.reqs],
        "queued_s": [req.time_stats.wait_queue_entry_time for req in batch.reqs],
    }


if FOLDER_VARIABLE in os.environ:
    from sglang_kairos.cpu import runtime

    runtime.activate_if_wanted()
    install(Path(os.environ[FOLDER_VARIABLE]))

if __name__ == "__main__":
    from sglang_kairos.launch_server import main

    sys.exit(main(sys.argv[1:]))
