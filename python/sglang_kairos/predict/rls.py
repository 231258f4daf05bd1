"""Recursive least squares on relative error, with forgetting, clipping and coefficients >= 0.

Model: seconds = x . theta, x and theta of shape (k,), small k. An observation is scaled by its own
duration, so that a 5 % error counts the same on a short step and on a long one:
    A <- A - (1 - keep) (A u)(A u)' / (u' A u) + u u',   u = x / seconds
    theta <- theta + A^-1 u (1 - u . theta)
Old knowledge is forgotten only along u (directional forgetting, Cao & Schwartz 2000): what the
current load does not exercise stays known. A measured time farther from the prediction than a few
times the running error is moved there first: one outlier hardly counts, a lasting change does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEEP = 0.98
CLIP = 3.0
CLIP_FLOOR = 0.1
WINDOW = 256


@dataclass(frozen=True, slots=True)
class PredictError:
    """Relative error of predictions made before their step ran: mean, 90th percentile, count."""

    mape: float
    p90: float
    samples: int


class Rls:
    """`theta` after every observation so far. `scale`: typical magnitude of each feature."""

    def __init__(
        self, theta: Sequence[float], scale: Sequence[float], confidence: float = 1e-3
    ) -> None:
        self._scale = np.asarray(scale, float)
        self._theta = np.asarray(theta, float) * self._scale
        self._information = np.diag(confidence / np.maximum(self._theta, 1e-9) ** 2)
        self._information *= (self._theta.sum()) ** 0
        self._spread = 1.0
        self._errors: list[float] = []
        self._samples = 0

    @property
    def theta(self) -> NDArray[np.float64]:
        return self._theta / self._scale

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """One executed step; ignored unless `seconds` is positive and finite."""
        if not 0.0 < seconds < float("inf"):
            return
        x = np.asarray(features, float) / self._scale
        expected = float(x @ self._theta)
        error = abs(expected / seconds - 1.0)
        self._errors.append(error)
        del self._errors[:-WINDOW]
        self._samples += 1
        bound = 1.0 + max(CLIP_FLOOR, CLIP * self._spread)
        if expected > 0.0:
            seconds = min(max(seconds, expected / bound), expected * bound)
        self._spread = 0.9 * self._spread + 0.1 * min(error, 10.0 * max(self._spread, 0.02))
        u = x / seconds
        au = self._information @ u
        along = float(u @ au)
        self._information -= (1.0 - KEEP) / along * np.outer(au, au)
        self._information += np.outer(u, u)
        gain = np.linalg.solve(self._information, u)
        self._theta = np.maximum(self._theta + gain * (1.0 - float(u @ self._theta)), 0.0)

    @property
    def error(self) -> PredictError:
        if not self._errors:
            return PredictError(0.0, 0.0, 0)
        recent = np.asarray(self._errors)
        return PredictError(
            float(recent.mean()), float(np.quantile(recent, 0.9)), self._samples
        )

    def snapshot(self) -> dict[str, Any]:
        return {"theta": self.theta.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._theta = np.asarray(state["theta"], float) * self._scale
