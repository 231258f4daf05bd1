"""How long a prefill step takes: seconds = a + b sum(n) + c sum(n (prefix + n / 2))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglang_kairos.predict.rls import PredictError, Rls

Tokens = float | Sequence[float] | NDArray[Any]
SCALE = (1.0, 1e-3, 1e-7)


class PrefillTimeModel:
    def __init__(self, a_s: float, b_s: float, c_s: float) -> None:
        self._rls = Rls((a_s, b_s, c_s), (1.0, 1e3, 1e7))

    @classmethod
    def generic(cls) -> PrefillTimeModel:
        return cls(10e-3, 50e-6, 1e-9)

    def step_s(self, new_tokens: Tokens, prefix_tokens: Tokens) -> float:
        """Seconds of one step over these requests."""
        a, b, c = self._rls.theta.tolist()
        n, prefix = np.asarray(new_tokens, float), np.asarray(prefix_tokens, float)
        return float(a + b * n.sum() + c * (n * (prefix + n / 2)).sum())

    def remaining_s(
        self, tokens: ArrayLike, prefix: ArrayLike, chunk_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to prefill `tokens` more after `prefix`, for each request on its own."""
        a, b, c = self._rls.theta.tolist()
        n, before = np.asarray(tokens, float), np.asarray(prefix, float)
        steps = np.ceil(n / chunk_tokens)
        return np.asarray(a * steps + b * n + c * n * (before + n / 2), float)

    def observe(self, new_tokens: Tokens, prefix_tokens: Tokens, seconds: float) -> None:
        n, prefix = np.asarray(new_tokens, float), np.asarray(prefix_tokens, float)
        self._rls.observe((1.0, float(n.sum()), float((n * (prefix + n / 2)).sum())), seconds)

    @property
    def error(self) -> PredictError:
        return self._rls.error

    def snapshot(self) -> dict[str, Any]:
        return self._rls.snapshot()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._rls.restore(state)
