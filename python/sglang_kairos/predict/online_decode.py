"""Predicts the duration of a decode step: `latency_model.DecodeLatency` and corrections to it.

The model is evaluated at `batch` padded up to the next captured CUDA-graph size. On the measured
table of MiniMax-M2.5 on H200, TP4, a straight line is 15.9 % off on average; with knees it is 1.8
%. All coefficients are >= 0, so predictions never fall with more requests or tokens. They follow
executed steps (`least_squares`).

What the model leaves over is learnt cell by cell (`step_table`). Predictions stay monotone. Cells
never seen come to 1.3 % after one look at the others.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.latency_model import GENERIC_DECODE, KNEES, DecodeLatency
from sglang_kairos.predict.least_squares import Rls, check_kind, least_squares, mapping_of
from sglang_kairos.predict.prediction_error import SHORTEST_S, PredictError
from sglang_kairos.predict.step_table import KV_TOKENS, StepTable, floor

KIND = "step_time"


class StepTimeModel:
    """Predicts decode steps and corrects itself from executed ones.

    `law`: the latency model as of now, without what the cells add. `knee_s`: its slopes at `knees`.
    `of` starts from a latency model.
    """

    def __init__(
        self,
        a_s: float,
        b_s: float,
        c_s: float,
        captured_sizes: Sequence[int] | None = None,
        knee_s: Sequence[float] = (0.0, 0.0),
        knees: Sequence[float] = KNEES,
    ) -> None:
        self.law = DecodeLatency.of((a_s, b_s, *knee_s, c_s), knees)
        self._rls = Rls(self.law.terms, (1.0, 100.0, *knees, 1e5))
        sizes = sorted(set(() if captured_sizes is None else captured_sizes))
        self._size_of = [
            sizes[bisect_left(sizes, batch)] for batch in range(sizes[-1] + 1 if sizes else 0)
        ]
        self._sizes = np.asarray(self._size_of, np.int64)
        self._cells = StepTable(sizes)
        self._baseline = self._law_table()
        self._learnt = False
        self._table: NDArray[np.float64] | None = None

    @classmethod
    def generic(cls, captured_sizes: Sequence[int] | None = None) -> StepTimeModel:
        """Returns a first guess for unknown hardware; the first few observed steps replace it."""
        return cls.of(GENERIC_DECODE, captured_sizes)

    @classmethod
    def of(cls, law: DecodeLatency, captured_sizes: Sequence[int] | None = None) -> StepTimeModel:
        """Returns a predictor that starts from this latency model."""
        a, b, *slopes, c = law.terms
        return cls(a, b, c, captured_sizes, slopes, [knee for knee, _ in law.knees])

    @classmethod
    def fit(
        cls, rows: Iterable[tuple[int, float, float]], captured_sizes: Sequence[int] | None = None
    ) -> StepTimeModel:
        """Returns a predictor fitted to a profile: rows of (batch, KV tokens in all, seconds)."""
        table = list(rows)
        shape = cls(0.0, 0.0, 0.0, captured_sizes)
        features = [shape._features(batch, kv_tokens) for batch, kv_tokens, _ in table]
        terms = least_squares(features, [seconds for *_, seconds in table]).tolist()
        return cls.of(DecodeLatency.of(terms), captured_sizes)

    def padded(self, batch: Any) -> Any:
        """Returns `batch` rounded up to a captured size, or as it is above the largest one."""
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
        """Returns the seconds of a step of `batch` requests over `kv_tokens` in all.

        Shapes broadcast. Monotone in both. An array of 256 takes about 30 us on a CPU core.
        """
        if not self._learnt:
            return self.law.step_s(self.padded(batch), kv_tokens)
        if self._table is None:
            self._table = self._cells.seconds(self._baseline)
        if isinstance(batch, np.ndarray):
            return self._cells.many(self._table, batch, kv_tokens)
        if isinstance(kv_tokens, np.ndarray):
            return self._cells.along(self._table, batch, kv_tokens)
        return self._cells.at(self._table, batch, kv_tokens)

    def marginal_s(self, batch: int, kv_tokens: float, context: Any) -> Any:
        """Returns the seconds that one more request of `context` tokens adds to a step.

        `context` is a scalar or an array. Where the padded batch has a free place, only its KV
        adds.
        """
        more = self.step_s(batch + 1, kv_tokens + context)
        return more - (self.step_s(batch, kv_tokens) if batch else 0.0)

    def observe(self, batch: int, kv_tokens: float, seconds: float) -> None:
        """Learns from an executed step. A time that is not positive and finite is ignored."""
        if batch < 1 or not 0.0 < seconds < math.inf:
            return
        expected = float(self.step_s(batch, kv_tokens))
        features = self._features(batch, kv_tokens)
        bounded, doubt = self._rls.observe(features, seconds, expected)
        self._follow()
        law = max(float(self.law.step_s(self.padded(batch), kv_tokens)), SHORTEST_S)
        size = features[1]
        ratio = max(bounded, SHORTEST_S) / law
        self._cells.learn(size, kv_tokens, ratio, self._baseline, doubt)
        self._learnt, self._table = True, None

    def _features(self, batch: int, kv_tokens: float) -> tuple[float, ...]:
        return self.law.features(float(self.padded(batch)), kv_tokens)

    def _law_table(self) -> NDArray[np.float64]:
        return floor(self.law.step_s(self._cells.batches[:, None], KV_TOKENS))

    def _follow(self) -> None:
        self.law = DecodeLatency.of(self._rls.theta, [knee for knee, _ in self.law.knees])
        self._baseline = self._law_table()

    @property
    def error(self) -> PredictError:
        """The error of the latest predictions."""
        return self._rls.error

    def snapshot(self) -> dict[str, Any]:
        """Returns what was learnt, ready for JSON."""
        return {
            "kind": KIND,
            "law": self._rls.snapshot(),
            "cells": self._cells.snapshot(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a `snapshot`.

        Raises ValueError if it does not fit, and changes nothing then.
        """
        check_kind(state, KIND)
        law, cells = mapping_of(state, "law"), mapping_of(state, "cells")
        self._cells.check(cells)
        self._rls.restore(law)
        self._cells.restore(cells)
        self._follow()
        self._learnt, self._table = True, None
