"""Recursive least squares on relative error, robust to outliers, with coefficients >= 0.

Model: seconds = x . theta with theta >= 0; x and theta have shape (k,), small k. An observation is
scaled by its own duration u = x / seconds. So 5 % counts the same on short and long steps.

    A     <- A - (1 - KEEP) (A u)(A u)' / (u' A u) + u u'
    theta <- theta + A^-1 u (1 - u . theta)

Forgetting acts along u only (directional forgetting, Cao & Schwartz, Automatica 2000). What the
current load does not exercise stays known. Outliers are bounded (`prediction_error.Outliers`). When
several come in a row the regime has changed, and what was learnt before counts less. A negative
coefficient is set to 0, and the others move to the optimum on that face.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.prediction_error import SHORTEST_S, ErrorWindow, Outliers, PredictError

Vector = NDArray[np.float64]

KEEP = 0.98
DOUBT = 0.4  # what a step of a new regime leaves of earlier knowledge
PRIOR = 0.001  # weight of the first guess, in observations


class Rls:
    """Recursive least squares from a first guess `theta`, (k,).

    `scale`: typical size of each feature.
    """

    def __init__(self, theta: Sequence[float], scale: Sequence[float]) -> None:
        self._scale = np.asarray(scale, float)
        self._theta = np.asarray(theta, float) * self._scale
        weight = PRIOR / max(float(self._theta.sum()), 1e-9) ** 2
        self._prior = weight * np.eye(len(self._theta))
        self._information = self._prior.copy()
        self._outliers = Outliers()
        self._window = ErrorWindow()
        self._listed: list[float] | None = None

    @property
    def theta(self) -> list[float]:
        """The coefficients, per unit of each feature, (k,)."""
        if self._listed is None:
            self._listed = (self._theta / self._scale).tolist()
        return list(self._listed)

    def observe(
        self, features: Sequence[float], seconds: float, predicted_s: float | None = None
    ) -> tuple[float, bool]:
        """Learns from an executed step.

        Returns the time learnt from, and whether to doubt the past. A time that is not positive and
        finite is ignored. `predicted_s`: the prediction where it is more than x . theta; error and
        outliers are judged by it.
        """
        if not 0.0 < seconds < math.inf:
            return seconds, False
        x = np.asarray(features, float) / self._scale
        expected = max(float(x @ self._theta) if predicted_s is None else predicted_s, SHORTEST_S)
        self._window.add(expected, seconds)
        seconds, doubt = self._outliers.bounded(expected, seconds)
        if doubt:
            self._information += (1.0 - DOUBT) * (self._prior - self._information)
        u = x / max(seconds, SHORTEST_S)
        seen = self._information @ u
        forgotten = (1.0 - KEEP) / float(u @ seen) * (seen[:, None] * seen)
        information = self._information - forgotten + u[:, None] * u
        gain = np.linalg.solve(information, u)
        theta = self._theta + gain * (1.0 - float(u @ self._theta))
        if np.isfinite(theta).all():
            self._information, self._theta = information, _nonnegative(information, theta)
            self._listed = None
        return seconds, doubt

    @property
    def error(self) -> PredictError:
        """The error of the latest predictions."""
        return self._window.error

    def upper_ratio(self, quantile: float) -> float:
        """Returns an upper bound of measured over predicted; see `ErrorWindow.upper_ratio`."""
        return self._window.upper_ratio(quantile)

    def snapshot(self) -> dict[str, Any]:
        """Returns what was learnt, as JSON scalars and lists, without this process' errors."""
        return {
            "theta": self.theta,
            "information": self._information.tolist(),
            "spread": self._outliers.spread,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a `snapshot`. Raises ValueError if it is of another model or damaged."""
        theta = array_of(state, "theta", self._theta.shape)
        information = array_of(state, "information", self._information.shape)
        spread = float(array_of(state, "spread", ()))
        if (theta < 0).any():
            raise ValueError("theta: holds a coefficient that is negative")
        if spread < 0 or not np.allclose(information, information.T):
            raise ValueError("information or spread: damaged")
        eigenvalues = np.linalg.eigvalsh(information)
        if eigenvalues[0] < -1e-9 * eigenvalues[-1] or eigenvalues[-1] <= 0:
            raise ValueError("information: must be positive definite")
        self._theta, self._information = theta * self._scale, information
        self._outliers = Outliers()
        self._outliers.spread = spread
        self._listed = None


def check_kind(state: Mapping[str, Any], kind: str) -> None:
    """Raises ValueError unless `state` is a snapshot of that kind of model."""
    if state.get("kind") != kind:
        raise ValueError(f"kind: {state.get('kind')!r}, expected {kind!r}")


def mapping_of(state: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """Returns a nested object of a snapshot. Raises ValueError naming the field."""
    found = state.get(field)
    if not isinstance(found, Mapping):
        raise ValueError(f"{field}: missing or not an object")
    return found


def array_of(state: Mapping[str, Any], field: str, shape: tuple[int, ...]) -> Vector:
    """Returns a finite array of this shape from a snapshot. Raises ValueError naming the field."""
    try:
        found = np.asarray(state[field], float)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{field}: missing or not made of numbers") from None
    if found.shape != shape:
        raise ValueError(f"{field}: shape {found.shape}, expected {shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{field}: holds a number that is not finite")
    return found


def least_squares(
    features: Sequence[Sequence[float]] | Vector, seconds: Sequence[float] | Vector
) -> Vector:
    """Returns coefficients >= 0 of least relative squared error, (k,).

    `features`: (m, k). `seconds`: (m,).
    """
    u = np.asarray(features, float) / np.asarray(seconds, float)[:, None]
    scale = np.maximum(np.abs(u).max(axis=0), 1e-300)
    u = u / scale
    information = u.T @ u + 1e-12 * np.eye(u.shape[1])
    best = np.linalg.solve(information, u.sum(axis=0))
    theta: Vector = _nonnegative(information, best) / scale
    return theta


def _nonnegative(information: Vector, theta: Vector) -> Vector:
    """Returns the point >= 0 nearest to `theta` in the metric `information`.

    By an active set without release.
    """
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
