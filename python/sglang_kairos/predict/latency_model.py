"""The two latency models that server, router and simulator share: a prefill and a decode step.

A prefill step over requests with n new tokens each, after `prefix` cached ones:

    seconds = a + b sum(n) + c sum(n (prefix + n / 2)) + d sum((prefix + n)^2) + e min(sum(n), knee)

a is the fixed cost and b that of the matrix products. c is attention: new tokens times what they
look at. d is what a backend without a paged prefill kernel pays, whose queries are padded to the
whole context. That is SGLang's `torch_native` on a CPU; d is 0 for FlashInfer and its like. e is
that of a mixture of experts, where the first tokens of a step wake more and more experts, up to the
knee. It is 0 for a dense model.

A decode step over `requests` whose contexts are `tokens` long in all:

    seconds = a + b requests + c tokens + sum_j slope_j min(requests, knee_j)

The knees let the curve flatten. In a mixture of experts, each request of a small batch wakes more
experts; those of a large batch wake none.

Source: our own design, fitted to measured tables (`online_decode`, `online_prefill`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Tokens = float | Sequence[float] | NDArray[Any]

KNEE = 256.0
KNEES = (8.0, 64.0)
NO_SLOPES = tuple((knee, 0.0) for knee in KNEES)


class PrefillLatency(NamedTuple):
    """Coefficients of a prefill step, in seconds; `knee` in tokens. See the module's docstring.

    a per step, b per token, c per token and token of context, d per squared token of context, e per
    token up to `knee`.
    """

    a_s: float
    b_s: float
    c_s: float
    d_s: float = 0.0
    e_s: float = 0.0
    knee: float = KNEE

    def features(self, new_tokens: Tokens, prefix_tokens: Tokens) -> tuple[float, ...]:
        """Returns what a to e are multiplied with for one step over these requests, (n,) or ()."""
        n, prefix = np.asarray(new_tokens, float), np.asarray(prefix_tokens, float)
        attended = float((n * (prefix + n / 2)).sum())
        total = float(n.sum())
        return 1.0, total, attended, float(((prefix + n) ** 2).sum()), min(total, self.knee)

    def step_s(self, new_tokens: Tokens, prefix_tokens: Tokens) -> float:
        """Returns the seconds of one step over these requests, (n,) or scalars."""
        features = self.features(new_tokens, prefix_tokens)
        return sum(k * x for k, x in zip(self[:5], features, strict=True))

    @overload
    def work_s(self, tokens: float, prefix: float = 0.0, chunk_tokens: float = 0) -> float: ...
    @overload
    def work_s(self, tokens: Floats, prefix: Floats, chunk_tokens: float = 0) -> Floats: ...
    def work_s(self, tokens: Any, prefix: Any = 0.0, chunk_tokens: float = 0) -> Any:
        """Returns the seconds to prefill `tokens` more after `prefix`, alone.

        In an array each request is on its own; shapes broadcast, and `tokens` is an array whenever
        `prefix` is. `chunk_tokens` <= 0: not chunked.

        Closed form. Attention over consecutive chunks adds up to that of the whole. The fixed cost
        comes once a chunk. The padded cost comes with the context so far: a sum of squares over the
        full chunks, and the whole for the last.
        """
        do = _ARRAY if isinstance(tokens, np.ndarray) else _SCALAR
        steps = do.ceil(tokens / chunk_tokens) if chunk_tokens > 0 else do.minimum(tokens, 1)
        seconds = self.a_s * steps + self.b_s * tokens
        seconds = seconds + self.c_s * tokens * (prefix + tokens / 2)
        if not self.d_s and not self.e_s:
            return seconds
        full, size = do.maximum(steps - 1, 0), float(max(chunk_tokens, 0))
        if self.d_s:
            once, squared = full * (full + 1) / 2, full * (full + 1) * (2 * full + 1) / 6
            padded = full * prefix**2 + 2 * prefix * size * once + size**2 * squared
            padded = padded + do.minimum(steps, 1) * (prefix + tokens) ** 2
            seconds = seconds + self.d_s * padded
        if self.e_s:
            last = do.minimum(tokens - full * size, self.knee)
            seconds = seconds + self.e_s * (full * min(size, self.knee) + last)
        return seconds

    def prompt_s(self, tokens: float, cached: float, chunk_tokens: float) -> tuple[float, float]:
        """Returns the tokens to compute of a prompt, at least one, and the seconds that takes."""
        known = min(cached, max(0.0, tokens - 1.0))
        return tokens - known, self.work_s(tokens - known, known, chunk_tokens)

    @classmethod
    def of(cls, terms: Sequence[float], knee: float) -> PrefillLatency:
        """Returns the model with coefficients a to e."""
        a, b, c, d, e = terms
        return cls(a, b, c, d, e, knee)

    def scaled(self, factor: float) -> PrefillLatency:
        """Returns the model of a server that takes `factor` times as long."""
        return self.of([factor * value for value in self[:5]], self.knee)

    def to_json(self) -> dict[str, Any]:
        """Returns a_s to e_s in seconds, and the knee in tokens."""
        return self._asdict()

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> PrefillLatency:
        """Reads `to_json`; d_s, e_s and knee may be missing. Raises ValueError naming the field."""
        optional = {"d_s": 0.0, "e_s": 0.0}
        terms = [_seconds(raw.get(name, optional.get(name)), name) for name in cls._fields[:5]]
        return cls.of(terms, _size(raw.get("knee", KNEE), "knee"))


class DecodeLatency(NamedTuple):
    """Coefficients in seconds per step, request and context token; `knees`: (requests, seconds)."""

    a_s: float
    b_s: float
    c_s: float
    knees: tuple[tuple[float, float], ...] = NO_SLOPES

    @overload
    def step_s(self, requests: float, tokens: float) -> float: ...
    @overload
    def step_s(self, requests: Any, tokens: Any) -> Any: ...
    def step_s(self, requests: Any, tokens: Any) -> Any:
        """Seconds of a step; numbers or arrays, shapes broadcast."""
        least = np.minimum if isinstance(requests, np.ndarray) else min
        seconds = self.a_s + self.b_s * requests
        for knee, slope_s in self.knees:
            seconds = seconds + slope_s * least(requests, knee)
        return seconds + self.c_s * tokens

    def features(self, requests: float, tokens: float) -> tuple[float, ...]:
        """Returns what `terms` are multiplied with."""
        return 1.0, requests, *(min(requests, knee) for knee, _ in self.knees), float(tokens)

    @property
    def terms(self) -> tuple[float, ...]:
        """a, b, the slopes at the knees, c; in seconds."""
        return self.a_s, self.b_s, *(slope_s for _, slope_s in self.knees), self.c_s

    @classmethod
    def of(cls, terms: Sequence[float], knees: Sequence[float] = KNEES) -> DecodeLatency:
        """Returns the model of these `terms`.

        Raises ValueError unless `knees` match them in number.
        """
        a, b, *slopes, c = terms
        return cls(a, b, c, tuple(zip(knees, slopes, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Returns a_s, b_s, c_s and `knees`."""
        return {**self._asdict(), "knees": [list(pair) for pair in self.knees]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DecodeLatency:
        """Reads `to_json`. Raises ValueError naming the field.

        `knees` may be missing, or `knee_s` may stand in its place: the slopes at KNEES.
        """
        a, b, c = (_seconds(raw.get(name), name) for name in ("a_s", "b_s", "c_s"))
        slopes, knees = raw.get("knee_s", [0.0] * len(KNEES)), raw.get("knees")
        if knees is None:
            if not isinstance(slopes, list) or len(slopes) != len(KNEES):
                raise ValueError(f"knee_s: must be {len(KNEES)} numbers, got {slopes!r:.80}")
            return cls.of([a, b, *(_seconds(slope, "knee_s") for slope in slopes), c])
        fits = isinstance(knees, list) and all(isinstance(p, list) and len(p) == 2 for p in knees)
        if not fits:
            raise ValueError(f"knees: must be pairs of requests and seconds, got {knees!r:.80}")
        pairs = ((_size(knee, "knees"), _seconds(slope, "knees")) for knee, slope in knees)
        return cls(a, b, c, tuple(pairs))


# First guesses for unknown hardware.
GENERIC_PREFILL = PrefillLatency(10e-3, 50e-6, 1e-9)
GENERIC_DECODE = DecodeLatency(5e-3, 50e-6, 50e-9)


class _Operations(NamedTuple):
    """What `PrefillLatency.work_s` does, to numbers or to arrays."""

    ceil: Callable[[Any], Any]
    minimum: Callable[[Any, Any], Any]
    maximum: Callable[[Any, Any], Any]


_SCALAR = _Operations(math.ceil, min, max)
_ARRAY = _Operations(np.ceil, np.minimum, np.maximum)


def _seconds(value: Any, field: str) -> float:
    return _number(value, field, 0.0, 1e3, "seconds")


def _size(value: Any, field: str) -> float:
    return _number(value, field, 1.0, 1e9, "a number")


def _number(value: Any, field: str, low: float, high: float, what: str) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits:
        raise ValueError(f"{field}: must be {what} from {low:g} to {high:g}, got {value!r:.80}")
    return float(value)
