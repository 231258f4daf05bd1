"""Where relegated requests wait until they are in nobody's way."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

_LOOK_EVERY_S = 0.02


class Later:
    """First come, first out: only the front one looks whether it may go. On one event loop."""

    def __init__(self) -> None:
        self._line: deque[asyncio.Event] = deque()

    def __len__(self) -> int:
        return len(self._line)

    async def wait(self, may_go: Callable[[], bool], until_s: float) -> None:
        """Return when it is this one's turn and `may_go()`, or at `until_s` (monotonic)."""
        front = asyncio.Event()
        self._line.append(front)
        self._line[0].set()
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await front.wait()
                while not may_go():
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            pass  # waited long enough: now it goes whoever is in its way
        finally:
            self._line.remove(front)
            if self._line:
                self._line[0].set()
