"""How long a decode step takes.

    seconds = a + b batch + sum_j d_j min(batch, KNEES_j) + c kv_tokens

with `batch` padded up to the next captured CUDA-graph size and `kv_tokens` the context read in all.
The knees let the curve flatten: in a mixture of experts a small batch's every request wakes more
experts, a large one's wakes none. On the measured table of MiniMax-M2.5 on H200, TP4, the straight
law is 15.9 % off on average, this one 1.8 %. All coefficients are >= 0, so it is monotone in both.
They follow executed steps (`rls`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.rls import PredictError, Rls, least_squares

KNEES = (8.0, 64.0)
SCALE = (1.0, 100.0, *KNEES, 1e5)


class StepTimeModel:
    """Predicts, and corrects itself from what steps took. `knee_s`: d_j, seconds per request."""

    def __init__(
        self,
        a_s: float,
        b_s: float,
        c_s: float,
        captured_sizes: Sequence[int] | None = None,
        knee_s: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self._rls = Rls((a_s, b_s, *knee_s, c_s), SCALE)
        sizes = sorted(set(() if captured_sizes is None else captured_sizes))
        self._size_of = [
            sizes[bisect_left(sizes, batch)] for batch in range(sizes[-1] + 1 if sizes else 0)
        ]
        self._sizes = np.asarray(self._size_of, np.int64)

    @classmethod
    def generic(cls, captured_sizes: Sequence[int] | None = None) -> StepTimeModel:
        """A first guess for unknown hardware: replaced by the first few observed steps."""
        return cls(5e-3, 50e-6, 50e-9, captured_sizes)

    @classmethod
    def fit(
        cls, rows: Iterable[tuple[int, float, float]], captured_sizes: Sequence[int] | None = None
    ) -> StepTimeModel:
        """From a profile: rows of (batch, KV tokens in all, seconds)."""
        table = list(rows)
        shape = cls(0.0, 0.0, 0.0, captured_sizes)
        features = [shape._features(batch, kv_tokens) for batch, kv_tokens, _ in table]
        a, b, *knees, c = least_squares(features, [seconds for *_, seconds in table]).tolist()
        return cls(a, b, c, captured_sizes, knees)

    def padded(self, batch: Any) -> Any:
        """`batch` rounded up to a captured size; above the largest it runs as it is."""
        known = len(self._size_of)
        if not isinstance(batch, np.ndarray):
            return self._size_of[batch] if batch < known else batch
        if known == 0:
            return batch
        return np.where(batch < known, self._sizes[np.minimum(batch, known - 1)], batch)

    @overload
    def step_s(self, batch: int, kv_tokens: float) -> float: ...
    @overload
    def step_s(self, batch: int | NDArray[Any], kv_tokens: NDArray[Any]) -> NDArray[np.float64]: ...
    def step_s(self, batch: Any, kv_tokens: Any) -> Any:
        """Seconds of a step over `batch` requests that read `kv_tokens` in all."""
        a, b, *knees, c = self._rls.theta
        size = self.padded(batch)
        least = np.minimum if isinstance(size, np.ndarray) else min
        seconds = a + b * size
        for knee_s, knee in zip(knees, KNEES, strict=True):
            seconds = seconds + knee_s * least(size, knee)
        return seconds + c * kv_tokens

    def observe(self, batch: int, kv_tokens: float, seconds: float) -> None:
        """An executed step took `seconds`."""
        self._rls.observe(self._features(batch, kv_tokens), seconds)

    def _features(self, batch: int, kv_tokens: float) -> tuple[float, ...]:
        size = float(self.padded(batch))
        return 1.0, size, *(min(size, knee) for knee in KNEES), float(kv_tokens)

    @property
    def error(self) -> PredictError:
        """How wrong the latest predictions were."""
        return self._rls.error

    @property
    def coefficients(self) -> dict[str, float]:
        """The law for a small batch, in seconds per unit: a_s, b_s (knees included), c_s."""
        a, *slopes, c = self._rls.theta
        return {"a_s": a, "b_s": sum(slopes), "c_s": c}

    def snapshot(self) -> dict[str, Any]:
        """What was learnt, ready for JSON."""
        return self._rls.snapshot()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `snapshot`; ValueError if it does not fit."""
        self._rls.restore(state)
