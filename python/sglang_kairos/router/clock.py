"""The router's clock: one object, handed down from `Router`; nothing in here reads `time` itself.

Timers (sleeps, timeouts) are the event loop's. A test hands in the clock of its loop, so that both
run on one time, which need not be the world's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """`now_s`: seconds that never go back, of no known beginning. `wall_s`: seconds since 1970."""

    now_s: Callable[[], float] = time.monotonic
    wall_s: Callable[[], float] = time.time


SYSTEM_CLOCK = Clock()
