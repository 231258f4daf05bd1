"""Decides what a decode server does next. SGLang's scheduler and the simulator both host it.

A host describes the moment in columns (the views) and carries the answer out. It reports which
requests were let in, started and ended. The planner answers three questions:
    admit     which requests to reserve KV for, in which order (`policy.admission`)
    choose    which running requests take part in the next step (`policy.packing`)
    retract   which request to drop when the next step's KV does not fit (`policy.retraction`)

Rules that need more than one moment live here:
- which request starves, and whether the late share pays for it;
- whose time-out runs down;
- the lead to aim at, and within how many tokens;
- how long requests usually stay;
- the circuit breaker: where steps do not follow the predictions, nobody is parked or held back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.admission import (
    PRESSED,
    AdmissionPlan,
    Occupancy,
    QueueView,
    deadline_order,
    plan_admission,
)
from sglang_kairos.policy.packing import (
    MOST_RESERVE,
    StepChoice,
    allowed_step_s,
    choose_step,
    horizon_of,
    reserve_of,
    safe_step_s,
)
from sglang_kairos.policy.retraction import keep_order
from sglang_kairos.policy.urgency import LateShare
from sglang_kairos.predict.prediction_error import PredictError
from sglang_kairos.predict.request_statistics import RequestStatistics

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

GIVE_UP_S = 300.0  # SGLang's default of its time-outs


class StepPredictor(Protocol):
    """Predicted durations of decode steps, and how wrong the latest predictions were."""

    def step_s(self, batch: Any, kv_tokens: Any, /) -> Any: ...

    @property
    def error(self) -> PredictError: ...


@dataclass(slots=True)  # one a step: freezing it would cost a microsecond
class RunningView:
    """The running requests: columns of shape (n,), in KV tokens and seconds of any one clock.

    `emitted`: output tokens that are out or in flight. `sustained`: whether the request was to be
    held to its TPOT target at admission, or at the latest choice since. `tightest_s`: the least of
    `tpot_s`, 0 for n = 0. `weight`: that of the SLO class, None when all are equal.
    """

    now_s: float
    first_token_s: Floats
    emitted: Floats
    tpot_s: Floats
    last_token_s: Floats
    sustained: Mask
    context_tokens: NDArray[Any]
    tightest_s: float
    weight: Floats | None = None

    @property
    def slack_s(self) -> Floats:
        """Seconds until the next token is due, (n,)."""
        return self.first_token_s + self.emitted * self.tpot_s - self.now_s

    @property
    def silent_s(self) -> Floats:
        """Seconds since the last token, (n,)."""
        return self.now_s - self.last_token_s

    @property
    def lead_s(self) -> Floats:
        """Seconds by which the last token came early, (n,); negative if the request is behind."""
        return self.first_token_s + (self.emitted - 1.0) * self.tpot_s - self.now_s


class DecodePlanner:
    """The rules of one decode server; see the module's docstring.

    `counters` counts steps by decision (``steps_…``), steps with the breaker open
    (``breaker_steps``), and requests let in because their time-out ran down (``pressed``).
    `give_up_s`: how many seconds SGLang lets a request wait for its KV.
    """

    def __init__(
        self, config: KairosConfig, counters: Counter[str], give_up_s: float = GIVE_UP_S
    ) -> None:
        self.config, self.counters, self.give_up_s = config, counters, give_up_s
        self.late_share, self.statistics = LateShare(config.late_share), RequestStatistics()
        self.breaker: PredictError | None = None
        """Why the breaker is open; None while it is closed."""

    def admit(
        self, queue: QueueView, running: RunningView, server: Occupancy, times: StepPredictor
    ) -> AdmissionPlan:
        """Returns the order of the queue, how many to admit, which one starves. Needs n > 0.

        `server` has the sustained requests that hold KV and do not run yet; those running are added
        here. While the breaker is open, all are admitted by deadline.
        """
        error = times.error
        if not self.trusted(error):
            order = self.order(queue)
            return AdmissionPlan(order, len(order), len(order))
        clock = self.clock_left(queue)
        if clock is not None and (pressed := int(np.count_nonzero(clock[queue.places] <= PRESSED))):
            self.counters["pressed"] += pressed
        return plan_admission(
            queue,
            self._occupancy(running, server, reserve_of(error.mape)),
            times.step_s,
            self.statistics,
            starving=self._starving(queue, server.kv_tokens),
            clock=clock,
            min_throughput=self.config.min_throughput,
        )

    def order(self, queue: QueueView) -> list[int]:
        """Returns all waiting requests by deadline, for when nobody is held back."""
        return deadline_order(queue, self.clock_left(queue))

    def let_in(self, prompt_tokens: int, starving: bool) -> None:
        """Records that KV was reserved; a `starving` request is paid from the late share."""
        self.late_share.ran(prompt_tokens, prompt_tokens if starving else 0)

    def clock_left(self, queue: QueueView) -> Floats | None:
        """Returns the part of SGLang's time-out left to each, 1 to 0, (n,); None: no time-out."""
        if queue.clock_s is None:
            return None
        return np.clip(1.0 - (queue.now_s - queue.clock_s) / self.give_up_s, 0.0, 1.0)

    def choose(self, view: RunningView, times: StepPredictor) -> StepChoice | None:
        """Returns who takes part in the next step; None: everybody, without a choice."""
        count = len(view.tpot_s)
        if count < 2:
            return None
        full_s = float(times.step_s(count, float(view.context_tokens.sum())))
        horizon = self.horizon_tokens
        if full_s <= safe_step_s(view.tightest_s, MOST_RESERVE, horizon):
            return None  # whatever the error is, which takes time to look up
        error = times.error
        reserve = reserve_of(error.mape)
        if full_s <= safe_step_s(view.tightest_s, reserve, horizon):
            return None
        if not self.trusted(error):
            self.counters["breaker_steps"] += 1
            return None
        choice = choose_step(
            view.slack_s,
            view.tpot_s,
            view.context_tokens,
            view.silent_s,
            times.step_s,
            sustained=view.sustained,
            reserve_tokens=reserve,
            horizon_tokens=horizon,
            min_throughput=self.config.min_throughput,
            max_itl_s=self.config.max_itl_ms / 1e3,
        )
        self.counters[f"steps_{choice.reason}"] += 1
        return choice

    def retract(self, view: RunningView) -> list[int]:
        """Returns all running requests, the one most worth keeping first."""
        return keep_order(view.lead_s, view.tpot_s, view.context_tokens, view.weight)

    def trusted(self, error: PredictError) -> bool:
        """Returns whether predictions with this error are good enough: the circuit breaker."""
        self.breaker = None if error.trusted(self.config.max_step_error) else error
        return self.breaker is None

    @property
    def horizon_tokens(self) -> float:
        """The number of tokens within which a lead is to be made up or used."""
        return horizon_of(self.statistics.output_tokens)

    def _starving(self, queue: QueueView, kv_tokens: float) -> int:
        """Index of the request that has waited too long and goes first; -1 for none."""
        arrival = np.where(queue.never_fits(kv_tokens), np.inf, queue.arrival_s)
        if queue.ready is not None:
            arrival = np.where(queue.ready, arrival, np.inf)
        oldest = int(np.argmin(arrival))
        waited = queue.now_s - arrival[oldest] > self.config.max_wait * queue.ttft_s[oldest]
        return oldest if waited and self.late_share.may_spend() else -1

    def _occupancy(
        self, running: RunningView, server: Occupancy, reserve_tokens: float
    ) -> Occupancy:
        """Adds the sustained running requests, each with the step that it needs now."""
        sustained, tpot = running.sustained, running.tpot_s
        step_s = allowed_step_s(running.lead_s, tpot, reserve_tokens, self.horizon_tokens)
        allowed = np.minimum(step_s, tpot)
        return replace(
            server,
            context_tokens=np.append(running.context_tokens[sustained], server.context_tokens),
            tpot_s=np.append(allowed[sustained], server.tpot_s),
        )
