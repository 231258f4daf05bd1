"""Simulated time: runs actions in order of their time."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class EventClock:
    """Runs actions in order of their time (seconds); those of one time in the order of asking."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._asked = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Schedules `action` for `time_s`. Raises ValueError if that has passed."""
        if time_s < self.now_s:
            raise ValueError(f"{time_s} s is before now, {self.now_s} s")
        self._asked += 1
        heapq.heappush(self._heap, (time_s, self._asked, action))

    def run(self) -> None:
        """Runs until nothing is left to do."""
        heap = self._heap
        while heap:
            self.now_s, _, action = heapq.heappop(heap)
            action()
