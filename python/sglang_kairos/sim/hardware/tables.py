"""Step times read off a table.

Prefill, over the k requests of a step, each with n_i new tokens after P_i:

    seconds = shared(sum n) + sum_i attention(n_i, P_i) - (k - 1) attention(1, 0)

`shared` depends on the tokens in all: matrix products, experts, all-reduce. Attention is added up
per request; its fixed cost comes once a step. aiconfigurator-core composes a batch in the same way,
except that it prices the attention of k *equal* requests as one kernel. `estimator` says how far
the two differ.

Decode takes the row of the captured size that the batch is padded up to, at the KV tokens read in
all. Padding costs what the size costs, but reads no KV. Contexts of different lengths count as if
they were equal, so one that takes longer in attention than all others is not seen.

Between knots both are straight lines (bilinear in new tokens and prefix), and beyond the last knot
they go on. So a table that is monotone stays monotone.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.sim.hardware.times import LawTimes

Array = NDArray[np.float64]
# A piecewise straight line: where each piece begins, its value at 0 and its slope.
Line = tuple[list[float], list[float], list[float]]


@dataclass(frozen=True)
class MeasuredSteps:
    """Seconds at knots. All knots ascend.

    `new` (n,): new tokens, from 1. `prefix` (p,): tokens already there, from 0.
    `shared_s` (n,): what a prefill step of that many tokens costs beside attention.
    `attention_s` (p, n): one request's attention.
    `sizes` (s,): captured decode batches. `context` (c,): context of each request. `decode_s` (s,
    c).
    """

    new: Array
    prefix: Array
    shared_s: Array
    attention_s: Array
    sizes: tuple[int, ...]
    context: Array
    decode_s: Array

    def __post_init__(self) -> None:
        new, prefix, context = len(self.new), len(self.prefix), len(self.context)
        for name, shape in (
            ("shared_s", (new,)),
            ("attention_s", (prefix, new)),
            ("decode_s", (len(self.sizes), context)),
        ):
            table = getattr(self, name)
            if table.shape != shape:
                raise ValueError(f"{name}: shape {table.shape}, expected {shape}")
            if not (np.isfinite(table).all() and (table > 0).all()):
                raise ValueError(f"{name}: holds a time that is not positive and finite")
        for name in ("new", "prefix", "sizes", "context"):
            if (np.diff(getattr(self, name)) <= 0).any():
                raise ValueError(f"{name}: knots must ascend")
        if self.new[0] != 1 or self.prefix[0] != 0 or min(new, prefix, context) < 2:
            raise ValueError("needs two knots per axis, new tokens from 1, prefix from 0")


def monotone(table: Array) -> Array:
    """Makes the table nondecreasing along every axis, with the least largest relative change.

    The result is the geometric mean of the running maximum from below and the running minimum from
    above. No nondecreasing table is nearer to all points.
    """
    low, high = table, table
    for axis in range(table.ndim):
        low = np.maximum.accumulate(low, axis=axis)
        high = np.flip(np.minimum.accumulate(np.flip(high, axis), axis=axis), axis)
    return np.asarray(np.sqrt(low * high), float)


class TableTimes:
    """Step times interpolated from `table`, made monotone. `law`: the model that predictors start from.

    `prefill_knots`: new tokens (n,) and prefixes (p,) between which prefill times are straight.
    """

    def __init__(self, table: MeasuredSteps, law: LawTimes) -> None:
        self.captured_sizes: Sequence[int] | None = table.sizes
        self.prefill_knots = table.new, table.prefix
        self._law = law
        attention_s = monotone(table.attention_s)
        self._attention_once_s = float(attention_s[0, 0])
        self._shared = _line(table.new, monotone(table.shared_s))
        self._new: list[float] = table.new.tolist()
        self._prefix: list[float] = table.prefix.tolist()
        self._cells = _cells(table.new, table.prefix, attention_s)
        # Without a knot at 0, a short context would run down the first piece's slope.
        context = np.concatenate([[0.0], table.context])
        seconds = monotone(table.decode_s)
        lines = [
            _line(size * context, np.concatenate([row[:1], row]))
            for size, row in zip(table.sizes, seconds, strict=True)
        ]
        self._largest = table.sizes[-1]
        self._decode = [lines[bisect_left(table.sizes, b)] for b in range(self._largest + 1)]

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        seconds = _at(self._shared, sum(new_tokens))
        seconds -= (len(new_tokens) - 1) * self._attention_once_s
        new_knots, prefix_knots, cells = self._new, self._prefix, self._cells
        last_new, last_prefix = len(new_knots) - 1, len(prefix_knots) - 1
        for new, prefix in zip(new_tokens, prefix_tokens, strict=True):
            row = cells[bisect_right(prefix_knots, prefix, 1, last_prefix) - 1]
            a, b, c, d = row[bisect_right(new_knots, new, 1, last_new) - 1]
            seconds += a + b * new + (c + d * new) * prefix
        return seconds

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        if batch <= self._largest:
            return _at(self._decode[batch], kv_tokens)
        # Above the table: as many times the largest step as it takes.
        times = batch / self._largest
        return times * _at(self._decode[-1], kv_tokens / times)

    def prefill_model(self) -> PrefillTimeModel:
        return self._law.prefill_model()

    def decode_model(self) -> StepTimeModel:
        return self._law.decode_model()


def _line(x: Array, y: Array) -> Line:
    slope = np.diff(y) / np.diff(x)
    return x.tolist(), (y[:-1] - slope * x[:-1]).tolist(), slope.tolist()


def _at(line: Line, x: float) -> float:
    knots, intercepts, slopes = line
    piece = bisect_right(knots, x, 1, len(slopes)) - 1
    return intercepts[piece] + slopes[piece] * x


def _cells(
    new: Array, prefix: Array, seconds: Array
) -> list[list[tuple[float, float, float, float]]]:
    """Returns, per cell, the a, b, c, d of a + b new + c prefix + d new prefix; (p - 1, n - 1)."""
    x, y = new[None, :-1], prefix[:-1, None]
    dx, dy = np.diff(new)[None, :], np.diff(prefix)[:, None]
    corner = seconds[:-1, :-1]
    along_new = (seconds[:-1, 1:] - corner) / dx
    along_prefix = (seconds[1:, :-1] - corner) / dy
    twist = (seconds[1:, 1:] - seconds[1:, :-1] - seconds[:-1, 1:] + corner) / (dx * dy)
    a = corner - along_new * x - along_prefix * y + twist * x * y
    b, c = along_new - twist * y, along_prefix - twist * x
    return [[tuple(cell) for cell in row] for row in np.stack([a, b, c, twist], axis=-1).tolist()]
