"""A table of what never changes about waiting requests, so that a decision gathers columns.

A request gets a row when it is first seen and keeps it until it is gone. Planning over 10,000 of
them is then a handful of vector operations. Not even the request objects are touched: to visit
10,000 of them costs more than the whole plan.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.policy.prefill_planner import NEVER

Rows = NDArray[np.intp]


class Roster:
    """One row per living request. Times are seconds of this process' clock.

    `promise(req)` gives its SLO and arrival. `tokens`: prompt and output at the time it was first
    seen. `matched_tokens`: the last prefix-cache hit known. `matched_at`: the plan that looked it
    up.
    """

    def __init__(self, promise: Callable[[Any], Any], rows: int = 1024) -> None:
        self._promise = promise
        self._row_of: dict[int, int] = {}  # by id(); entries go before their id can come again
        self._guards: dict[int, weakref.ref[Any]] = {}
        self._free: list[int] = []
        self.arrival_s, self.ttft_s, self.weight = (np.zeros(0) for _ in range(3))
        self.tokens, self.matched_tokens, self.matched_at = (np.zeros(0, np.int64),) * 3
        self._grow(rows)

    def __len__(self) -> int:
        return len(self._row_of)

    def _grow(self, rows: int) -> None:
        self._free += range(len(self.tokens) + rows - 1, len(self.tokens) - 1, -1)
        for name in ("arrival_s", "ttft_s", "weight"):
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(rows)]))
        for name in ("tokens", "matched_tokens", "matched_at"):
            column = np.concatenate([getattr(self, name), np.zeros(rows, np.int64)])
            setattr(self, name, column)

    def rows(self, reqs: Sequence[Any]) -> Rows:
        """Returns the row of each request, (n,); unknown ones are entered."""
        row_of = self._row_of
        try:
            return np.fromiter(map(row_of.__getitem__, map(id, reqs)), np.intp, len(reqs))
        except KeyError:  # somebody is new
            for req in [req for req in reqs if id(req) not in row_of]:
                self._enter(req)
        return np.fromiter(map(row_of.__getitem__, map(id, reqs)), np.intp, len(reqs))

    def _enter(self, req: Any) -> None:
        if not self._free:
            self._grow(len(self.tokens))
        promise, row, key = self._promise(req), self._free.pop(), id(req)
        self.arrival_s[row], self.ttft_s[row] = promise.arrival_s, promise.slo.ttft_ms / 1e3
        self.weight[row] = promise.slo.weight
        self.tokens[row] = len(req.origin_input_ids) + len(req.output_ids)
        self.matched_tokens[row], self.matched_at[row] = 0, NEVER
        self._row_of[key] = row
        self._guards[key] = weakref.ref(req, functools.partial(self._forget, key))

    def _forget(self, key: int, _: Any) -> None:
        self._free.append(self._row_of.pop(key))
        del self._guards[key]
