"""How long a decode step takes: seconds = a + b batch + c kv_tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.rls import PredictError, Rls


class StepTimeModel:
    def __init__(
        self, a_s: float, b_s: float, c_s: float, captured_sizes: Sequence[int] | None = None
    ) -> None:
        self._rls = Rls((a_s, b_s, c_s), (1.0, 1e2, 1e5))
        self._sizes = np.unique(np.asarray(captured_sizes or [], np.int64))

    @classmethod
    def generic(cls, captured_sizes: Sequence[int] | None = None) -> StepTimeModel:
        return cls(5e-3, 50e-6, 50e-9, captured_sizes)

    def padded(self, batch: Any) -> Any:
        """`batch` rounded up to the next captured size; above the largest it runs as it is."""
        if self._sizes.size == 0:
            return batch
        at = np.searchsorted(self._sizes, batch)
        found = self._sizes[np.minimum(at, self._sizes.size - 1)]
        return np.where(at < self._sizes.size, found, batch)

    @overload
    def step_s(self, batch: int, kv_tokens: float) -> float: ...
    @overload
    def step_s(self, batch: NDArray[Any], kv_tokens: NDArray[Any]) -> NDArray[np.float64]: ...
    def step_s(self, batch: Any, kv_tokens: Any) -> Any:
        """Seconds of a step over `batch` requests that read `kv_tokens` in all."""
        a, b, c = self._rls.theta.tolist()
        return a + b * self.padded(batch) + c * kv_tokens

    def observe(self, batch: int, kv_tokens: float, seconds: float) -> None:
        self._rls.observe((1.0, float(self.padded(batch)), float(kv_tokens)), seconds)

    @property
    def error(self) -> PredictError:
        return self._rls.error

    def snapshot(self) -> dict[str, Any]:
        return self._rls.snapshot()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._rls.restore(state)
