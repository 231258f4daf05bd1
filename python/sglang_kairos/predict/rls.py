"""Recursive least squares on relative error: forgets, shrugs off outliers, never goes negative.

Model: seconds = x . theta with theta >= 0; x, theta of shape (k,), small k. An observation is
scaled by its own duration, so that 5 % counts the same on a short step as on a long one:
    A     <- A - (1 - KEEP) (A u)(A u)' / (u' A u) + u u',     u = x / seconds
    theta <- theta + A^-1 u (1 - u . theta)
Forgetting acts along u only (directional forgetting, Cao & Schwartz, Automatica 2000): what the
current load does not exercise stays known. A time farther from its prediction than a few times the
running error is first moved to that bound, and what was learnt before counts less from then on:
one outlier does little, a lasting change gets through in a few steps.
A negative coefficient is set to 0 and the others move to the optimum on that face.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

KEEP = 0.98
CLIP = 3.0  # bound on a residual, in running mean errors ...
CLIP_FLOOR = 0.1  # ... but never tighter than this
DOUBT = 0.4  # what an observation beyond the bound leaves of earlier knowledge
PRIOR = 0.001  # weight of the first guess, in observations
SHORTEST_S = 1e-5  # no step is shorter; keeps the arithmetic in range
WINDOW = 256


@dataclass(frozen=True, slots=True)
class PredictError:
    """Relative error of the latest predictions, made before their step ran; all observed so far."""

    mape: float
    p90: float
    samples: int


class Rls:
    """Coefficients `theta`, first guess included. `scale`: typical size of each feature."""

    def __init__(self, theta: Sequence[float], scale: Sequence[float]) -> None:
        self._scale = np.asarray(scale, float)
        self._theta = np.asarray(theta, float) * self._scale
        weight = PRIOR / max(float(self._theta.sum()), 1e-9) ** 2
        self._prior = weight * np.eye(len(self._theta))
        self._information = self._prior.copy()
        self._spread = 10.0
        self._errors: deque[float] = deque(maxlen=WINDOW)
        self._samples = 0

    @property
    def theta(self) -> list[float]:
        """The coefficients, per unit of each feature."""
        theta: list[float] = (self._theta / self._scale).tolist()
        return theta

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """One executed step. A time that is not positive and finite is ignored."""
        if not 0.0 < seconds < math.inf:
            return
        x = np.asarray(features, float) / self._scale
        expected = max(float(x @ self._theta), SHORTEST_S)
        self._errors.append(abs(expected / seconds - 1.0))
        self._samples += 1
        ratio = max(seconds / expected, expected / seconds)
        bound = 1.0 + max(CLIP_FLOOR, CLIP * self._spread)
        if ratio > bound:
            seconds = min(max(seconds, expected / bound), expected * bound)
            self._information += (1.0 - DOUBT) * (self._prior - self._information)
        self._spread += 0.1 * (min(ratio - 1.0, 10.0 * max(self._spread, 0.02)) - self._spread)
        u = x / max(seconds, SHORTEST_S)
        seen = self._information @ u
        forgotten = (1.0 - KEEP) / float(u @ seen) * np.outer(seen, seen)
        information = self._information - forgotten + np.outer(u, u)
        gain = np.linalg.solve(information, u)
        theta = self._theta + gain * (1.0 - float(u @ self._theta))
        if np.isfinite(theta).all():
            self._information, self._theta = information, _nonnegative(information, theta)

    @property
    def error(self) -> PredictError:
        """Over the last WINDOW observations; zeros before the first."""
        if not self._errors:
            return PredictError(0.0, 0.0, 0)
        recent = np.asarray(self._errors)
        return PredictError(float(recent.mean()), float(np.quantile(recent, 0.9)), self._samples)

    def snapshot(self) -> dict[str, Any]:
        """All state but the error window, as JSON scalars and lists."""
        return {
            "theta": self.theta,
            "information": self._information.tolist(),
            "spread": self._spread,
            "samples": self._samples,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `snapshot`; ValueError when it is of another model or damaged."""
        theta = np.asarray(state["theta"], float)
        information = np.asarray(state["information"], float)
        if theta.shape != self._theta.shape or information.shape != self._information.shape:
            raise ValueError(f"snapshot of {theta.size} coefficients, expected {self._theta.size}")
        if not (np.isfinite(theta).all() and np.isfinite(information).all() and (theta >= 0).all()):
            raise ValueError("snapshot holds a coefficient that is negative or not finite")
        self._theta, self._information = theta * self._scale, information
        self._spread, self._samples = float(state["spread"]), int(state["samples"])
        self._errors.clear()


def least_squares(
    features: Sequence[Sequence[float]] | Vector, seconds: Sequence[float] | Vector
) -> Vector:
    """Coefficients >= 0 of least relative squared error. `features` (m, k), `seconds` (m,)."""
    u = np.asarray(features, float) / np.asarray(seconds, float)[:, None]
    scale = np.maximum(np.abs(u).max(axis=0), 1e-300)
    u = u / scale
    information = u.T @ u + 1e-12 * np.eye(u.shape[1])
    best = np.linalg.solve(information, u.sum(axis=0))
    theta: Vector = _nonnegative(information, best) / scale
    return theta


def _nonnegative(information: Vector, theta: Vector) -> Vector:
    """The point >= 0 nearest to `theta` in the metric `information` (active set, no release)."""
    if theta.min() >= 0.0:
        return theta
    zero = theta < 0.0
    while not zero.all():
        free = ~zero
        result = np.zeros_like(theta)
        pull = information[np.ix_(free, zero)] @ theta[zero]
        result[free] = theta[free] + np.linalg.solve(information[np.ix_(free, free)], pull)
        if not (result < 0.0).any():
            return result
        zero |= result < 0.0
    return np.zeros_like(theta)
