"""Makes a process slower by a known factor: it is stopped for a share of the time (as cpulimit)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

PERIOD_S = 0.03


@contextlib.contextmanager
def slowed(pids: Sequence[int], share: float) -> Iterator[None]:
    """Let these processes run `share` of the time (1: always) until the end of the block."""
    if share >= 1.0 or not pids:
        yield
        return
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            _tell(pids, signal.SIGSTOP)
            time.sleep(PERIOD_S * (1.0 - share))
            _tell(pids, signal.SIGCONT)
            time.sleep(PERIOD_S * share)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _tell(pids, signal.SIGCONT)


def _tell(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
