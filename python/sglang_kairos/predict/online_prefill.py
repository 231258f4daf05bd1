"""Predicts the duration of a prefill step: `latency_model.PrefillLatency`, learnt from steps.

On the table of MiniMax-M2.5 on H200, TP4, leaving one cell out: 1.2 % off on average, 2.4 % without
the knee. Any knee from 192 to 512 tokens does about as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglang_kairos.predict.latency_model import GENERIC_PREFILL, KNEE, PrefillLatency, Tokens
from sglang_kairos.predict.least_squares import Rls, check_kind, least_squares
from sglang_kairos.predict.prediction_error import PredictError

WASTE = 1.5
KIND = "prefill_time"


class PrefillTimeModel:
    """Predicts prefill steps and corrects itself from executed ones. Seconds and tokens throughout.

    `law`: the latency model as of now. `PrefillTimeModel(*law)` starts from one.
    """

    def __init__(
        self,
        a_s: float,
        b_s: float,
        c_s: float,
        d_s: float = 0.0,
        e_s: float = 0.0,
        knee: float = KNEE,
    ) -> None:
        self.law = PrefillLatency(a_s, b_s, c_s, d_s, e_s, knee)
        # In a large step, e cannot be told from the fixed cost. Its large scale makes it move last.
        self._rls = Rls(self.law[:5], (1.0, 1e3, 1e7, 1e7, 10 * knee))

    @classmethod
    def generic(cls) -> PrefillTimeModel:
        """Returns a first guess for unknown hardware; about ten observed steps replace it."""
        return cls(*GENERIC_PREFILL)

    @classmethod
    def fit(cls, rows: Iterable[tuple[float, float, float]]) -> PrefillTimeModel:
        """Returns a predictor fitted to a profile: rows of (prefix, new tokens, seconds).

        Each row is a step of a single request.
        """
        table = list(rows)
        features = [GENERIC_PREFILL.features(new, prefix) for prefix, new, _ in table]
        return cls(*least_squares(features, [seconds for *_, seconds in table]).tolist())

    def step_s(self, new_tokens: Tokens, prefix_tokens: Tokens) -> float:
        """Returns the seconds of one step over these requests, (n,) or scalars."""
        return self.law.step_s(new_tokens, prefix_tokens)

    def remaining_s(
        self, tokens: ArrayLike, prefix: ArrayLike, chunk_tokens: int
    ) -> NDArray[np.float64]:
        """Returns the seconds to prefill `tokens` more after `prefix`, each alone, (n,) or ()."""
        n, before = np.asarray(tokens, float), np.asarray(prefix, float)
        return np.asarray(self.law.work_s(n, before, chunk_tokens), float)

    def worthwhile_tokens(self, prefix: float, chunk_tokens: int) -> int:
        """Returns the smallest share of a chunk that costs at most WASTE times as much per token.

        A chunk of a long prompt rereads what came before. Below this size, waiting for a whole
        chunk is cheaper than a small one now. The fixed cost does not count, since the step pays it
        anyway.
        """
        fixed = self.law.a_s
        whole = (self.law.work_s(chunk_tokens, prefix) - fixed) / chunk_tokens
        for parts in (8, 4, 2):
            crumb = max(1, chunk_tokens // parts)
            if (self.law.work_s(crumb, prefix) - fixed) / crumb <= WASTE * whole:
                return crumb
        return chunk_tokens

    def observe(self, new_tokens: Tokens, prefix_tokens: Tokens, seconds: float) -> None:
        """Learns from an executed step that took `seconds`."""
        self._rls.observe(self.law.features(new_tokens, prefix_tokens), seconds)
        self._follow()

    def _follow(self) -> None:
        self.law = PrefillLatency.of(self._rls.theta, self.law.knee)

    @property
    def error(self) -> PredictError:
        """The error of the latest predictions."""
        return self._rls.error

    def snapshot(self) -> dict[str, Any]:
        """Returns what was learnt, ready for JSON."""
        return {"kind": KIND, **self._rls.snapshot()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a `snapshot`.

        Raises ValueError if it does not fit, and changes nothing then.
        """
        check_kind(state, KIND)
        self._rls.restore(state)
        self._follow()
