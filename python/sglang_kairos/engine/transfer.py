"""What SGLang's KV transfer must survive so that no request takes a prefill server with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_status(original: Callable[..., Any], manager: Any, bootstrap_room: int) -> Any:
    """Seam of the transfer managers' status look-up: a room that is not there has failed.

    Upstream asks ``room in request_status`` and then for its status, in a thread of its own; when
    the scheduler clears the room in between, a `KeyError` ends that thread, and with it every
    transfer of the server.
    """
    try:
        return original(manager, bootstrap_room)
    except KeyError:
        from sglang.srt.disaggregation.base.conn import KVPoll

        return KVPoll.Failed
