"""Where relegated requests wait until they are in nobody's way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from sglang_kairos.router.clock import SYSTEM_CLOCK, Clock

_LOOK_EVERY_S = 0.02


class DeferredQueue:
    """First come, first out: only the front one looks whether it may go. On one event loop."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._line: deque[asyncio.Event] = deque()

    def __len__(self) -> int:
        return len(self._line)

    async def wait(self, may_go: Callable[[], bool], until_s: float) -> None:
        """Returns when it is this one's turn and `may_go()`, or at `until_s` of the clock."""
        front, clock = asyncio.Event(), self._clock
        self._line.append(front)
        self._line[0].set()
        try:
            async with asyncio.timeout(max(0.0, until_s - clock.now_s())):
                await front.wait()
                while not may_go():
                    await asyncio.sleep(_LOOK_EVERY_S)
        except TimeoutError:
            pass  # waited long enough: now it goes whoever is in its way
        finally:
            self._line.remove(front)
            if self._line:
                self._line[0].set()
