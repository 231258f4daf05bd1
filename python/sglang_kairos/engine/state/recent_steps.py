"""The latest executed steps as the predictors saw them: what `calibrate.cli` reads over HTTP."""

from __future__ import annotations

from collections import deque
from typing import Any

LATEST = 64


class LatestSteps:
    """A short memory of one kind of step; appending costs well under a microsecond."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=LATEST)
        self._seen = 0

    def add(self, first: float, second: float, seconds: float) -> None:
        """Prefill: new and prefix tokens of a step over one request; decode: batch, KV tokens."""
        self._steps.append((first, second, seconds))
        self._seen += 1

    def report(self) -> dict[str, Any]:
        """`seen`: steps ever; `latest`: at most LATEST rows [first, second, seconds], oldest first."""
        rows = [[int(a), int(b), round(seconds, 7)] for a, b, seconds in self._steps]
        return {"seen": self._seen, "latest": rows}
