"""What a decode server's scheduler keeps of its running requests: columns, in the batch's order.

While membership is stable a step costs two vector operations; nobody's request object is visited.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.engine import compat
from sglang_kairos.engine.state import KairosState
from sglang_kairos.engine.subset import SubsetView
from sglang_kairos.predict.stay import Stay

FIRST_S, TPOT_S, EMITTED, LAST_S, SERVED, RAN = range(6)
Entry = tuple[float, float, float, float, bool]


class RunningTable:
    """One column per running request. Times in seconds of the process' clock.

    Rows: first token, TPOT target, output tokens launched, last token, whether it was served at the
    last choice (`policy.packing`), whether it takes part in the step in flight. `enter(req)` gives
    the first five of a request that joins.
    """

    def __init__(self, enter: Callable[[Any], Entry]) -> None:
        self._enter = enter
        self._reqs: list[Any] = []
        self.columns: NDArray[np.float64] = np.zeros((6, 0))
        self.tightest_s = 0.0

    def follow(self, reqs: Sequence[Any]) -> list[Any]:
        """Makes the columns those of `reqs`; returns who has left since the last call."""
        if self._reqs == reqs:
            return []
        known = {id(req): place for place, req in enumerate(self._reqs)}
        places = np.fromiter((known.pop(id(req), -1) for req in reqs), np.intp, len(reqs))
        columns = np.zeros((6, len(reqs)))
        old = places >= 0
        columns[:, old] = self.columns[:, places[old]]
        for place in np.flatnonzero(~old).tolist():
            columns[:RAN, place] = self._enter(reqs[place])
        left = [self._reqs[place] for place in known.values()]
        self.columns, self._reqs = columns, list(reqs)
        self.tightest_s = float(columns[TPOT_S].min()) if reqs else 0.0
        return left

    def now(self, now_s: float) -> None:
        """The step in flight is paid for: its tokens are as good as out."""
        last = self.columns[LAST_S]
        last[self.columns[RAN] > 0.0] = now_s

    def ran(self, keep: list[int] | None) -> None:
        """These (None: all) take part in the step that starts now."""
        columns = self.columns
        if keep is None:
            columns[EMITTED] += 1.0
            columns[RAN] = 1.0
        else:
            columns[EMITTED, keep] += 1.0
            columns[RAN] = 0.0
            columns[RAN, keep] = 1.0


class DecodeMemory:
    """The decode side of one scheduler's state."""

    def __init__(self, state: KairosState) -> None:
        self.stay = Stay()
        self.table = RunningTable(lambda req: _entry(state, req))
        self.view: SubsetView | None = None
        self.clock_s = compat.give_up_s()


_MEMORIES: weakref.WeakKeyDictionary[KairosState, DecodeMemory] = weakref.WeakKeyDictionary()


def memory_of(state: KairosState) -> DecodeMemory:
    """Of this scheduler; made when first asked for."""
    memory = _MEMORIES.get(state)
    if memory is None:
        memory = _MEMORIES[state] = DecodeMemory(state)
    return memory


def _entry(state: KairosState, req: Any) -> Entry:
    promise = state.promise(req)
    if promise.first_token_s is None:
        promise.first_token_s = req.time_stats.decode_prebuilt_finish_time or state.now()
    last = req.time_stats.last_decode_finish_time or promise.first_token_s
    emitted = float(len(req.output_ids))
    return promise.first_token_s, promise.slo.tpot_ms / 1e3, emitted, last, promise.kept
