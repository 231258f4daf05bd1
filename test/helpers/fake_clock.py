"""An event loop whose time is made up: it stands still while anything can run, and runs when not.

What waits for a timer alone waits (almost) no real time. How busy the machine is shows nowhere:
a test may say to the millisecond when something is to happen. Sockets work as ever, as long as both
ends live on the loop. Threads and other processes do not: they would be left behind.

    pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]       # or of one test
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

from sglang_kairos.router.clock import Clock

# Made-up seconds a real second, at most, while nothing can run. What one end of a socket has sent
# has reached the other end long before a made-up second is over, even on a busy machine.
FASTER = 50.0
_WALL_S = 1_700_000_000.0


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Waits for sockets, and has time pass where none has anything to say."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """As its base class's, with a `timeout` in made-up seconds."""
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(timeout / FASTER)
        if not ready:
            self.passed_s += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its `time` is the made-up one; so are all of its timers."""

    def __init__(self) -> None:
        self._made_up = _Selector()
        super().__init__(self._made_up)
        # A timer is due although its time, added up, is off by a rounding.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._made_up.passed_s


def clock_of(loop: asyncio.AbstractEventLoop) -> Clock:
    """The clock that goes with a loop."""
    return Clock(loop.time, lambda: _WALL_S + loop.time())


def now_s() -> float:
    """Returns the time of the loop that runs."""
    return asyncio.get_running_loop().time()
