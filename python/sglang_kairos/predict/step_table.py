"""Step times learnt cell by cell over (batch, KV tokens), on top of a latency model.

A cell (i, j) sits at a batch size and a number of KV tokens, log-spaced. It holds the mean of what
was measured near it, and a weight. A step measured at y times the model counts in every cell as y
model_ij. Its weight is a Gaussian kernel in (log2 batch, log2 KV). So neighbours follow:

    log seconds_ij = (1 - t) log model_ij + t mean_ij,     t = weight / (weight + TRUST)

A cell that no step came near equals the model. Between cells the table is linear in both.

The result is made monotone in both. It is the mean of the running maximum from below and the
running minimum from above, each of which is monotone. A monotone table stays as it is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.least_squares import array_of
from sglang_kairos.predict.prediction_error import SHORTEST_S

Floats = NDArray[np.float64]

# Rows without captured sizes, and above the largest one. The model's knees must be among them.
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 4096)
KV_TOKENS = np.concatenate([[0.0], 2.0 ** np.arange(7, 28)])
BATCH_REACH, KV_REACH = 0.15, 2.0  # sigma of the kernel, in octaves
TRUST = 3.0  # weight at which a cell counts as much as the model
MEMORY = 30.0  # the most weight of a cell: what came before is forgotten
DOUBT = 0.4  # factor on the weights at a step of a new regime


class StepTable:
    """A correction table; tables have shape (batches, KV_TOKENS), in seconds.

    `captured_sizes`: a batch is padded up to the next of these; if empty, the axis is not stepped.
    """

    def __init__(self, captured_sizes: Sequence[int]) -> None:
        sizes = sorted(set(captured_sizes))
        above = [size for size in BATCHES if not sizes or size > sizes[-1]]
        self.batches = np.asarray([*sizes, *above], float)
        self._row, self._part = _positions(sizes, self.batches)
        self._place = list(zip(self._row.tolist(), self._part.tolist(), strict=True))
        self._interpolated = bool(self._part.any())
        self._log_batch = np.log2(self.batches)
        self._log_kv = np.log2(np.maximum(KV_TOKENS, KV_TOKENS[1] / 2))
        self._mean = np.zeros((len(self.batches), len(KV_TOKENS)))
        self._weight = np.zeros_like(self._mean)

    def learn(self, size: float, kv_tokens: float, ratio: float, law: Floats, doubt: bool) -> None:
        """Learns from a step of padded batch `size` that took `ratio` times what `law` says."""
        if doubt:
            self._weight *= DOUBT
        across = np.exp(-0.5 * ((self._log_batch - np.log2(size)) / BATCH_REACH) ** 2)
        seen = np.log2(max(kv_tokens, KV_TOKENS[1] / 2))
        along = np.exp(-0.5 * ((self._log_kv - seen) / KV_REACH) ** 2)
        near = across[:, None] * along
        self._weight += near
        np.minimum(self._weight, MEMORY, out=self._weight)
        near /= np.maximum(self._weight, 1e-12)
        self._mean += near * (np.log(law) + np.log(ratio) - self._mean)

    def seconds(self, law: Floats) -> Floats:
        """Returns what the cells predict, given the model's table; monotone in both directions."""
        expected = np.log(law)
        trust = self._weight / (self._weight + TRUST)
        return _monotone(np.exp(expected + trust * (self._mean - expected)))

    def at(self, table: Floats, batch: int, kv_tokens: float) -> float:
        """Returns `table` at one point. Beyond its last cells it stays flat."""
        last = len(self._place) - 1
        row, part = self._place[int(batch) if 0 <= batch <= last else last if batch > 0 else 0]
        kv = min(max(float(kv_tokens), 0.0), _MOST_KV)
        column = min(bisect_right(_KV_LIST, kv), _LAST_COLUMN) - 1
        share = (kv - _KV_LIST[column]) * _PER_GAP[column]
        place, item = row * (_LAST_COLUMN + 1) + column, table.item
        low: float = item(place)
        low += share * (item(place + 1) - low)
        if not part:
            return low
        place += _LAST_COLUMN + 1
        above: float = item(place)
        low += part * (above + share * (item(place + 1) - above) - low)
        return low

    def along(self, table: Floats, batch: int, kv_tokens: NDArray[Any]) -> Floats:
        """Returns `table` at one batch size and many KV tokens."""
        row, part = self._place[min(max(int(batch), 0), len(self._place) - 1)]
        line = table[row] + part * (table[row + 1] - table[row]) if part else table[row]
        result: Floats = np.interp(kv_tokens, KV_TOKENS, line)
        return result

    def many(self, table: Floats, batch: NDArray[Any], kv_tokens: Any) -> Floats:
        """Returns `table` at many points of whole batch sizes; shapes broadcast."""
        index = np.minimum(batch.astype(np.intp), len(self._row) - 1)
        kv = np.minimum(np.asarray(kv_tokens, float), KV_TOKENS[-1])
        column = np.minimum(np.searchsorted(KV_TOKENS, kv, side="right"), len(_KV_LIST) - 1) - 1
        share = (kv - KV_TOKENS[column]) * _PER_GAP_ARRAY[column]
        cell = self._row[index] * len(_KV_LIST) + column
        result = _mix(table.take(cell), table.take(cell + 1), share)
        if self._interpolated:
            part = self._part[index]
            cell = cell + len(_KV_LIST) * (part > 0)
            result = _mix(result, _mix(table.take(cell), table.take(cell + 1), share), part)
        return result

    def snapshot(self) -> dict[str, Any]:
        """Returns the cells, ready for JSON."""
        return {
            "batches": self.batches.tolist(),
            "mean": self._mean.tolist(),
            "weight": self._weight.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over a `snapshot`. Raises ValueError if it is of other batch sizes or damaged."""
        self._mean, self._weight = self.check(state)

    def check(self, state: Mapping[str, Any]) -> tuple[Floats, Floats]:
        """Returns mean and weight of a `snapshot` that fits. Raises ValueError otherwise."""
        if state.get("batches") != self.batches.tolist():
            raise ValueError("batches: not the captured sizes of this server")
        mean = array_of(state, "mean", self._mean.shape)
        weight = array_of(state, "weight", self._weight.shape)
        if (weight < 0).any() or (weight > MEMORY).any():
            raise ValueError(f"weight: must be between 0 and {MEMORY:g}")
        if (np.abs(mean) > 100).any():
            raise ValueError("mean: holds a step time out of range")
        return mean, weight


_KV_LIST: list[float] = KV_TOKENS.tolist()
_LAST_COLUMN, _MOST_KV = len(_KV_LIST) - 1, _KV_LIST[-1]
_PER_GAP_ARRAY = 1.0 / np.diff(KV_TOKENS)
_PER_GAP: list[float] = _PER_GAP_ARRAY.tolist()


def _positions(sizes: list[int], batches: Floats) -> tuple[NDArray[np.intp], Floats]:
    """Returns for every batch from 0 on its row, and how far it is on the way to the next row."""
    row = np.zeros(int(batches[-1]) + 1, np.intp)
    part = np.zeros(len(row))
    for batch in range(len(row)):
        at = bisect_left(batches, batch)
        row[batch] = at
        if batches[at] != batch and at > 0 and (not sizes or batch > sizes[-1]):
            row[batch] = at - 1
            part[batch] = (batch - batches[at - 1]) / (batches[at] - batches[at - 1])
    return row, part


def _mix(low: Floats, high: Floats, share: Floats) -> Floats:
    return low + share * (high - low)


def _monotone(table: Floats) -> Floats:
    least, most = np.minimum.accumulate, np.maximum.accumulate
    below = most(most(table, axis=0), axis=1)
    above = least(least(table[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    result: Floats = 0.5 * (below + above)
    return result


def floor(law: Floats) -> Floats:
    """Returns a model's table with no time below SHORTEST_S, so that it has a logarithm."""
    return np.maximum(law, SHORTEST_S)
