"""A decode server's table of its running requests: one column each, in the batch's order.

While the batch's members stay the same a step costs two vector operations, and visits no request
object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.engine import compat
from sglang_kairos.engine.state.scheduler_state import KairosState
from sglang_kairos.engine.state.subset_view import SubsetView
from sglang_kairos.policy.decode_planner import DecodePlanner, RunningView
from sglang_kairos.policy.random_decode import ChaosDecodePlanner
from sglang_kairos.predict.prediction_error import LEARNT_STEPS, PredictError

FIRST_S, TPOT_S, EMITTED, LAST_S, SERVED, RAN = range(6)
Entry = tuple[float, float, float, float, bool]


class RunningTable:
    """One column per running request. Times are seconds of the process' clock.

    Rows: first token, TPOT target, output tokens launched, last token, and two flags. They tell
    whether it is on pace by the last choice (`policy.decode_step`), and whether it takes part in the
    step in flight. `enter(req)` gives the first five of a request that joins.
    """

    def __init__(self, enter: Callable[[Any], Entry]) -> None:
        self._enter = enter
        self._reqs: list[Any] = []
        self.columns: NDArray[np.float64] = np.zeros((6, 0))
        self.tightest_s = 0.0

    def follow(self, reqs: Sequence[Any]) -> list[Any]:
        """Makes the columns those of `reqs`. Returns the requests that left since the last call."""
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
        """Counts the tokens of the step in flight as out: its time is already spent."""
        last = self.columns[LAST_S]
        last[self.columns[RAN] > 0.0] = now_s

    def ran(self, keep: list[int] | None) -> None:
        """Notes which requests (None: all) take part in the step that starts now."""
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
        config, counters = state.config, state.counters
        self.planner = (
            DecodePlanner(config, counters, compat.give_up_s())
            if config.chaos_seed < 0
            else ChaosDecodePlanner(config, counters)
        )
        self.table = RunningTable(lambda req: _entry(state, req))
        self.subset: SubsetView | None = None

    def follow(self, reqs: Sequence[Any]) -> None:
        """Makes the table that of `reqs`. Requests that finished since tell how long requests stay."""
        for gone in self.table.follow(reqs):
            if gone.finished():
                self.planner.statistics.ended(len(gone.output_ids))

    def view(self, batch: Any, now_s: float) -> RunningView:
        """Returns the view of the requests in `batch`, which must be those followed last."""
        table, columns = self.table, self.table.columns
        return RunningView(
            now_s,
            columns[FIRST_S],
            columns[EMITTED],
            columns[TPOT_S],
            columns[LAST_S],
            columns[SERVED] > 0.0,
            batch.seq_lens_cpu.numpy() if batch.reqs else _NOBODY,
            table.tightest_s,
        )


_NOBODY = np.zeros(0)
_MEMORIES: weakref.WeakKeyDictionary[KairosState, DecodeMemory] = weakref.WeakKeyDictionary()


def memory_of(state: KairosState) -> DecodeMemory:
    """Returns the decode side of this scheduler, made when first asked for."""
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


def tell_breaker(state: KairosState, error: PredictError | None) -> None:
    """Logs once that the planner's breaker is open, and why, unless the server is only starting."""
    if error is not None and error.samples >= LEARNT_STEPS:
        state.log_once(
            "breaker",
            f"decode packing pauses while steps are predicted {100 * error.mape:.0f} % wrong "
            f"(--kairos-max-step-error {state.config.max_step_error:g}) and do not follow the "
            f"predictions (response {error.response:.2f})",
        )
