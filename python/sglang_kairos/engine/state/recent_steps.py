"""Remembers the latest executed steps as the predictors saw them, for `calibrate.cli`."""

from __future__ import annotations

from collections import deque
from typing import Any

LATEST = 64


class LatestSteps:
    """A short memory of one kind of step. Appending takes well under a microsecond."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=LATEST)
        self._seen = 0

    def add(self, first: float, second: float, seconds: float) -> None:
        """Adds a step. Prefill: new and prefix tokens of its one request. Decode: batch and KV tokens."""
        self._steps.append((first, second, seconds))
        self._seen += 1

    def report(self) -> dict[str, Any]:
        """Returns `seen`: steps ever; `latest`: at most LATEST rows [first, second, seconds].

        The oldest row comes first.
        """
        rows = [[int(a), int(b), round(seconds, 7)] for a, b, seconds in self._steps]
        return {"seen": self._seen, "latest": rows}
