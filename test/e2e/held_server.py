"""A server whose KV transfers are held up until the file HELD_UNTIL is there."""

from __future__ import annotations

import os
import runpy
import time
from typing import Any

from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import (
    MooncakeTransferEngine,
)

_send = MooncakeTransferEngine.batch_transfer_sync


def _later(engine: Any, *args: Any, **options: Any) -> Any:
    while not os.path.exists(os.environ["HELD_UNTIL"]):
        time.sleep(0.02)
    return _send(engine, *args, **options)


if __name__ == "__main__":
    MooncakeTransferEngine.batch_transfer_sync = _later  # type: ignore
    runpy.run_module("sglang_kairos.launch_server", run_name="__main__")
