"""How long a prefill step takes.

    seconds = a + b sum(n) + c sum(n (prefix + n / 2))

over the requests of the step, each with n new tokens after `prefix` cached ones: a fixed cost, the
matrix products, and attention (new tokens times what they look at). Fits the measured table of
MiniMax-M2.5 on H200, TP4, within 2.3 % on average. Coefficients follow executed steps (`rls`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglang_kairos.predict.rls import PredictError, Rls, least_squares

Tokens = float | Sequence[float] | NDArray[Any]


class PrefillTimeModel:
    """Predicts, and corrects itself from what steps took. Seconds and tokens throughout."""

    def __init__(self, a_s: float, b_s: float, c_s: float) -> None:
        self._rls = Rls((a_s, b_s, c_s), (1.0, 1e3, 1e7))

    @classmethod
    def generic(cls) -> PrefillTimeModel:
        """A first guess for unknown hardware: replaced by about ten observed steps."""
        return cls(10e-3, 50e-6, 1e-9)

    @classmethod
    def fit(cls, rows: Iterable[tuple[float, float, float]]) -> PrefillTimeModel:
        """From a profile: rows of (prefix tokens, new tokens, seconds), one request each."""
        table = np.asarray(list(rows), float)
        prefix, new, seconds = table.T
        features = np.column_stack([np.ones_like(new), new, new * (prefix + new / 2)])
        return cls(*least_squares(features, seconds).tolist())

    def step_s(self, new_tokens: Tokens, prefix_tokens: Tokens) -> float:
        """Seconds of one step over these requests."""
        features = _features(new_tokens, prefix_tokens)
        return sum(k * x for k, x in zip(self._rls.theta, features, strict=True))

    def remaining_s(
        self, tokens: ArrayLike, prefix: ArrayLike, chunk_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to prefill `tokens` more after `prefix`, each request on its own, (n,) or ().

        Closed form: attention over consecutive chunks adds up to that of the whole, so that only
        the fixed cost depends on the chunk. `chunk_tokens` <= 0: not chunked.
        """
        a, b, c = self._rls.theta
        n, before = np.asarray(tokens, float), np.asarray(prefix, float)
        steps = np.ceil(n / chunk_tokens) if chunk_tokens > 0 else np.sign(n)
        return np.asarray(a * steps + b * n + c * n * (before + n / 2), float)

    def observe(self, new_tokens: Tokens, prefix_tokens: Tokens, seconds: float) -> None:
        """An executed step took `seconds`."""
        self._rls.observe(_features(new_tokens, prefix_tokens), seconds)

    @property
    def error(self) -> PredictError:
        """How wrong the latest predictions were."""
        return self._rls.error

    def snapshot(self) -> dict[str, Any]:
        """What was learnt, ready for JSON."""
        return self._rls.snapshot()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `snapshot`; ValueError if it does not fit."""
        self._rls.restore(state)


def _features(new_tokens: Tokens, prefix_tokens: Tokens) -> tuple[float, float, float]:
    n, prefix = np.asarray(new_tokens, float), np.asarray(prefix_tokens, float)
    return 1.0, float(n.sum()), float((n * (prefix + n / 2)).sum())
