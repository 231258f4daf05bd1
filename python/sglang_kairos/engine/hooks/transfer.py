"""Keeps SGLang's KV transfer from losing a request, or ending a server, over one error.

The scheduler, the thread that hears from decode servers and the threads that send KV share one
table of statuses. SGLang reads and then writes it, without a lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from sglang_kairos.engine import compat

logger = logging.getLogger(__name__)


def update_status(
    original: Callable[..., Any], manager: Any, bootstrap_room: int, status: Any
) -> Any:
    """Seam of the transfer managers' status change: one thread at a time.

    The scheduler opens a bootstrap room as Bootstrapping, and decode's hand-shake makes it
    WaitingForInput, in either order. The hand-shake may come after the scheduler has looked for the
    room, and before it has opened one. Then it is overwritten, and the request waits for it until
    its time-out.
    """
    with _lock_of(manager):
        return original(manager, bootstrap_room, status)


def check_status(original: Callable[..., Any], manager: Any, bootstrap_room: int) -> Any:
    """Seam of the transfer managers' status look-up: a room that is not there has failed.

    SGLang asks ``room in request_status`` and then for its status, in a thread of its own. When the
    scheduler clears the room in between, a `KeyError` ends that thread, and with it every transfer
    of the server.
    """
    try:
        return original(manager, bootstrap_room)
    except KeyError:
        from sglang.srt.disaggregation.base.conn import KVPoll

        return KVPoll.Failed


def transfer_worker(
    original: Callable[..., Any], manager: Any, queue: Any, *args: Any, **kwargs: Any
) -> Any:
    """Seam of Mooncake's transfer thread: after any error it goes on with the next chunk.

    The chunk's request fails, unless its transfer is over. An error of the queue itself, with no
    chunk in hand, is raised as SGLang does.
    """
    while True:
        watched = _Watched(queue)
        try:
            return original(manager, watched, *args, **kwargs)
        except Exception:
            if watched.chunk is None:
                raise
            room = watched.chunk.room
            logger.exception("KV transfer of room %s: the error ends this request only", room)
            _fail(manager, room)


class _Watched:
    """A queue of chunks that knows which one was taken last."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.chunk: Any = None

    def get(self) -> Any:
        self.chunk = None
        self.chunk = self._queue.get()
        return self.chunk

    def put(self, chunk: Any) -> None:
        self._queue.put(chunk)


def _fail(manager: Any, room: int) -> None:
    """Fails a room whose transfer is not over, and tells decode where this version can."""
    from sglang.srt.disaggregation.base.conn import KVPoll

    # Parts still to be sent hold the request back, and this one will never be counted down.
    compat.outstanding_parts(manager).pop(room, None)
    if manager.request_status.get(room) in (None, KVPoll.Success, KVPoll.Failed):
        return
    reason = "The transfer of its KV raised an error: see the prefill server's log"
    compat.fail_transfer(manager, room, reason)


def _lock_of(manager: Any) -> Any:
    # Re-entrant: a failure may be told to others from within. `setdefault` is atomic.
    return manager.__dict__.setdefault("_kairos_status_lock", threading.RLock())
