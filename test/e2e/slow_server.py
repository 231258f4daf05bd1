"""A server whose KV transfers take their time, as over a slow network: SLOW_TRANSFER_MS each."""

from __future__ import annotations

import os
import runpy
import time
from typing import Any

from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import (
    MooncakeTransferEngine,
)

_send = MooncakeTransferEngine.batch_transfer_sync
_DELAY_S = float(os.environ.get("SLOW_TRANSFER_MS", "0")) / 1e3


def _slowly(engine: Any, *args: Any, **options: Any) -> Any:
    time.sleep(_DELAY_S)
    return _send(engine, *args, **options)


if __name__ == "__main__":
    MooncakeTransferEngine.batch_transfer_sync = _slowly  # type: ignore
    runpy.run_module("sglang_kairos.launch_server", run_name="__main__")
