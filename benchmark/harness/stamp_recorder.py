"""``python -m benchmark.harness.stamp_recorder``: `launch_server` that writes down time stamps.

SGLang stamps every request at each queue. With ``--enable-request-time-stats-logging`` it logs the
durations once the request is done. Computing and sending of KV are one duration there, and nothing
says when the request came. So the stamps themselves are written, at that very call: no decision
changes. One JSON line per request, as `sglang_kairos.reports.stages` reads them, goes to
``<mode>-<pid>.jsonl`` in the folder that `FOLDER_VARIABLE` names. Times are seconds of
CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

FOLDER_VARIABLE = "KAIROS_STAMP_RECORD"
FLAG = "--enable-request-time-stats-logging"


def install(folder: Path) -> None:
    """Wraps `Req.log_time_stats` in this process and those forked from it."""
    from sglang.srt.managers.schedule_batch import Req

    original = Req.log_time_stats
    log: TextIO | None = None

    def log_time_stats(req: Any) -> None:
        nonlocal log
        if not req.has_log_time_stats and (record := describe(req)):
            if log is None:
                log = (folder / f"{record['mode']}-{os.getpid()}.jsonl").open("w", buffering=1)
            log.write(json.dumps(record) + "\n")
        original(req)

    Req.log_time_stats = log_time_stats


def describe(req: Any) -> dict[str, Any] | None:
    """Returns what the server knows of a request it is done with; None for unified serving."""
    stats = req.time_stats
    mode = stats.disagg_mode_str()
    if mode == "prefill":
        promise = getattr(req, "_kairos", None)
        return {
            "mode": mode,
            "rid": req.rid,
            "received_s": stats.prefill_bootstrap_queue_entry_time,
            "queued_s": stats.wait_queue_entry_time,
            "started_s": stats.forward_entry_time,
            "computed_s": stats.prefill_finished_time,
            "paused_s": promise.paused_s if promise is not None else 0.0,
        }
    if mode == "decode":
        return {
            "mode": mode,
            "rid": req.rid,
            "received_s": stats.decode_prealloc_queue_entry_time,
            "arrived_s": stats.wait_queue_entry_time,
            "admitted_s": stats.decode_prebuilt_finish_time,
            "retractions": req.retraction_count,
        }
    return None


if FOLDER_VARIABLE in os.environ:
    from sglang_kairos.cpu import runtime

    runtime.activate_if_wanted()
    install(Path(os.environ[FOLDER_VARIABLE]))

if __name__ == "__main__":
    from sglang_kairos.launch_server import main

    sys.exit(main(sys.argv[1:]))
