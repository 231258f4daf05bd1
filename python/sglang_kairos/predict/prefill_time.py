"""How long a prefill step takes.

    seconds = a + b sum(n) + c sum(n (prefix + n / 2)) + d sum((prefix + n)^2)
              + e min(sum(n), KNEE)

over the requests of the step, each with n new tokens after `prefix` cached ones: a fixed cost, the
matrix products, attention (new tokens times what they look at), and what a backend without a paged
prefill kernel pays, whose queries are padded to the whole context (SGLang's `torch_native` on a
CPU; d is 0 for FlashInfer and its like). The knee is that of a mixture of experts, where the first
tokens of a step wake more and more experts; e is 0 for a dense model. On the table of
MiniMax-M2.5 on H200, TP4, leaving one cell out: 1.2 % off on average, 2.4 % without the knee; any
knee from 192 to 512 does about as well. Coefficients follow executed steps (`rls`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sglang_kairos.predict.error import PredictError
from sglang_kairos.predict.rls import Rls, check_kind, least_squares

WASTE = 1.5
KNEE = 256.0
# The knee's share of a large step cannot be told from the fixed cost: its scale leaves it there.
SCALE = (1.0, 1e3, 1e7, 1e7, 10 * KNEE)
NAMES = ("a_s", "b_s", "c_s", "d_s", "e_s")
KIND = "prefill_time"

Tokens = float | Sequence[float] | NDArray[Any]


class PrefillTimeModel:
    """Predicts, and corrects itself from what steps took. Seconds and tokens throughout."""

    def __init__(
        self, a_s: float, b_s: float, c_s: float, d_s: float = 0.0, e_s: float = 0.0
    ) -> None:
        self._rls = Rls((a_s, b_s, c_s, d_s, e_s), SCALE)

    @classmethod
    def generic(cls) -> PrefillTimeModel:
        """A first guess for unknown hardware: replaced by about ten observed steps."""
        return cls(10e-3, 50e-6, 1e-9)

    @classmethod
    def fit(cls, rows: Iterable[tuple[float, float, float]]) -> PrefillTimeModel:
        """From a profile: rows of (prefix tokens, new tokens, seconds), one request each."""
        table = np.asarray(list(rows), float)
        prefix, new, seconds = table.T
        attended = new * (prefix + new / 2)
        columns = [np.ones_like(new), new, attended, (prefix + new) ** 2, np.minimum(new, KNEE)]
        features = np.column_stack(columns)
        return cls(*least_squares(features, seconds).tolist())

    def step_s(self, new_tokens: Tokens, prefix_tokens: Tokens) -> float:
        """Seconds of one step over these requests."""
        features = _features(new_tokens, prefix_tokens)
        return sum(k * x for k, x in zip(self._rls.theta, features, strict=True))

    def upper_s(self, new_tokens: Tokens, prefix_tokens: Tokens, quantile: float = 0.9) -> float:
        """Seconds that the step stays below with this probability: `step_s` times `upper_ratio`."""
        return self.step_s(new_tokens, prefix_tokens) * self.upper_ratio(quantile)

    def upper_ratio(self, quantile: float = 0.9) -> float:
        """By how much the latest steps exceeded their predictions, see `error.ErrorWindow`."""
        return self._rls.upper_ratio(quantile)

    def remaining_s(
        self, tokens: ArrayLike, prefix: ArrayLike, chunk_tokens: int
    ) -> NDArray[np.float64]:
        """Seconds to prefill `tokens` more after `prefix`, each request on its own, (n,) or ().

        Closed form: attention over consecutive chunks adds up to that of the whole; the fixed cost
        comes once a chunk, and the padded one with the context so far: a sum of squares over the
        full chunks and the whole for the last. `chunk_tokens` <= 0: not chunked.
        """
        a, b, c, d, e = self._rls.theta
        n, before = np.asarray(tokens, float), np.asarray(prefix, float)
        steps = np.ceil(n / chunk_tokens) if chunk_tokens > 0 else np.sign(n)
        full, size = np.maximum(steps - 1, 0), max(chunk_tokens, 0)
        once, squared = full * (full + 1) / 2, full * (full + 1) * (2 * full + 1) / 6
        padded = full * before**2 + 2 * before * size * once + size**2 * squared
        padded = padded + np.sign(n) * (before + n) ** 2
        result = a * steps + b * n + c * n * (before + n / 2) + d * padded
        if e:
            result = result + e * (full * min(size, KNEE) + np.minimum(n - full * size, KNEE))
        return np.asarray(result, float)

    def worthwhile_tokens(self, prefix: float, chunk_tokens: int) -> int:
        """The smallest share of a chunk that costs at most WASTE times the chunk's price a token.

        A chunk of a long prompt rereads what came before: below this, waiting for a whole chunk is
        cheaper than taking a crumb now. The fixed cost does not count, the step pays it anyway.
        """
        fixed = self.step_s((), ())
        whole = (self.step_s(chunk_tokens, prefix) - fixed) / chunk_tokens
        for parts in (8, 4, 2):
            crumb = max(1, chunk_tokens // parts)
            if (self.step_s(crumb, prefix) - fixed) / crumb <= WASTE * whole:
                return crumb
        return chunk_tokens

    def observe(self, new_tokens: Tokens, prefix_tokens: Tokens, seconds: float) -> None:
        """An executed step took `seconds`."""
        self._rls.observe(_features(new_tokens, prefix_tokens), seconds)

    @property
    def error(self) -> PredictError:
        """How wrong the latest predictions were."""
        return self._rls.error

    @property
    def coefficients(self) -> dict[str, float]:
        """The law's a to e, in seconds per unit: a_s, b_s, c_s, d_s, e_s."""
        return dict(zip(NAMES, self._rls.theta, strict=True))

    def snapshot(self) -> dict[str, Any]:
        """What was learnt, ready for JSON."""
        return {"kind": KIND, **self._rls.snapshot()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a `snapshot`; ValueError if it does not fit, and then nothing has changed."""
        check_kind(state, KIND)
        self._rls.restore(state)


def _features(new_tokens: Tokens, prefix_tokens: Tokens) -> tuple[float, ...]:
    n, prefix = np.asarray(new_tokens, float), np.asarray(prefix_tokens, float)
    attended = float((n * (prefix + n / 2)).sum())
    total = float(n.sum())
    return 1.0, total, attended, float(((prefix + n) ** 2).sum()), min(total, KNEE)
