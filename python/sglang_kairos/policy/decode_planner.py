"""Plans the next action of a decode server. SGLang's scheduler and the simulator call the same code.

The caller (*host*) describes the moment in columns (the views), carries the answer out, and reports
which requests were admitted, started and ended. The planner answers three questions:
    admit     which requests get KV, and in which order (`policy.admission`)
    choose    which running requests take part in the next step (`policy.decode_step`)
    retract   which requests give KV up when the next step does not fit (`policy.retraction`)

Rules that need more than one moment live here:
    starvation        A request older than ``--kairos-max-wait`` TTFT targets goes first, within the
                      token budget of ``--kairos-late-share``.
    time-outs         What is left of SGLang's own time-out decides who is pressed.
    reserve, horizon  The lead (in tokens) to aim at, and in how many tokens to reach it.
    statistics        How long requests take to start and how many tokens they make.
    circuit breaker   While predicted step times are wrong by more than ``--kairos-max-step-error``,
                      nobody is parked or held back: stock behaviour.
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
from sglang_kairos.policy.decode_step import (
    MOST_RESERVE,
    StepChoice,
    choose_step,
    horizon_of,
    longest_full_step_s,
    pace_s,
    reserve_of,
)
from sglang_kairos.policy.retraction import keep_order
from sglang_kairos.policy.urgency import LateShare
from sglang_kairos.predict.prediction_error import PredictError
from sglang_kairos.predict.request_statistics import RequestStatistics

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

GIVE_UP_S = 300.0  # SGLang's default of its time-outs


class StepPredictor(Protocol):
    """Predicts how long decode steps take, and knows how wrong its latest predictions were."""

    def step_s(self, batch: Any, kv_tokens: Any, /) -> Any: ...

    @property
    def error(self) -> PredictError: ...


@dataclass(slots=True)  # one a step: freezing it would cost a microsecond
class RunningView:
    """The running requests. Columns have shape (n,). Times are seconds of any one clock.

    `emitted`: output tokens that are out or in flight. `served`: mask of the requests that are on pace,
    by admission or by the latest choice. `context_tokens`: KV tokens. `tightest_s`: the least of
    `tpot_s`, 0 for n = 0. `weight`: weight of the SLO class; None: all are equal.
    """

    now_s: float
    first_token_s: Floats
    emitted: Floats
    tpot_s: Floats
    last_token_s: Floats
    served: Mask
    context_tokens: NDArray[Any]
    tightest_s: float
    weight: Floats | None = None

    @property
    def slack_s(self) -> Floats:
        """Returns the time until each next token is due, in seconds, (n,)."""
        return self.first_token_s + self.emitted * self.tpot_s - self.now_s

    @property
    def silent_s(self) -> Floats:
        """Returns the time since each last token, in seconds, (n,)."""
        return self.now_s - self.last_token_s

    @property
    def lead_s(self) -> Floats:
        """Returns how early each last token came, in seconds, (n,); negative: late."""
        return self.first_token_s + (self.emitted - 1.0) * self.tpot_s - self.now_s


class DecodePlanner:
    """The rules of one decode server; the module's text lists them.

    `counters` counts steps by decision, steps with an open breaker, and requests admitted because
    their time-out ran down. `give_up_s`: seconds that SGLang lets a request wait for its KV.
    """

    def __init__(
        self, config: KairosConfig, counters: Counter[str], give_up_s: float = GIVE_UP_S
    ) -> None:
        self.config, self.counters, self.give_up_s = config, counters, give_up_s
        self.late_share, self.statistics = LateShare(config.late_share), RequestStatistics()
        self.breaker: PredictError | None = None
        """The prediction error that opened the breaker; None while it is closed."""

    def admit(
        self, queue: QueueView, running: RunningView, server: Occupancy, times: StepPredictor
    ) -> AdmissionPlan:
        """Returns the order of the queue, how many get KV now, and which one starves. Needs n > 0.

        `server` counts the requests on pace that have KV and do not run yet; running ones are added here.
        While the breaker is open all requests are admitted, by deadline.
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
        """Returns all waiting indices by deadline, for use where nobody is held back."""
        return deadline_order(queue, self.clock_left(queue))

    def let_in(self, prompt_tokens: int, starving: bool) -> None:
        """Notes that a request got KV: the late share earns its tokens, or pays if it was `starving`."""
        self.late_share.ran(prompt_tokens, prompt_tokens if starving else 0)

    def clock_left(self, queue: QueueView) -> Floats | None:
        """Returns the share of SGLang's time-out that each has left, 1 to 0, (n,); None: no time-out."""
        if queue.clock_s is None:
            return None
        return np.clip(1.0 - (queue.now_s - queue.clock_s) / self.give_up_s, 0.0, 1.0)

    def choose(self, view: RunningView, times: StepPredictor) -> StepChoice | None:
        """Returns which requests take part in the next step; None: all, and no choice was needed."""
        count = len(view.tpot_s)
        if count < 2:
            return None
        full_s = float(times.step_s(count, float(view.context_tokens.sum())))
        horizon = self.horizon_tokens
        if full_s <= longest_full_step_s(view.tightest_s, MOST_RESERVE, horizon):
            return None  # holds for any error; looking the error up takes time
        error = times.error
        reserve = reserve_of(error.mape)
        if full_s <= longest_full_step_s(view.tightest_s, reserve, horizon):
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
            served=view.served,
            reserve_tokens=reserve,
            horizon_tokens=horizon,
            min_throughput=self.config.min_throughput,
            max_itl_s=self.config.max_itl_ms / 1e3,
        )
        self.counters[f"steps_{choice.reason}"] += 1
        return choice

    def retract(self, view: RunningView) -> list[int]:
        """Returns all running indices, the ones most worth keeping first."""
        return keep_order(view.lead_s, view.tpot_s, view.context_tokens, view.weight)

    def trusted(self, error: PredictError) -> bool:
        """Returns whether predictions with this `error` may decide; sets the circuit breaker."""
        self.breaker = None if error.trusted(self.config.max_step_error) else error
        return self.breaker is None

    @property
    def horizon_tokens(self) -> float:
        """Returns in how many tokens a lead is to be made up or used."""
        return horizon_of(self.statistics.output_tokens)

    def _starving(self, queue: QueueView, kv_tokens: float) -> int:
        """Returns the index that goes first as it waited too long; -1: none, or no late share left."""
        arrival = np.where(queue.never_fits(kv_tokens), np.inf, queue.arrival_s)
        if queue.ready is not None:
            arrival = np.where(queue.ready, arrival, np.inf)
        oldest = int(np.argmin(arrival))
        waited = queue.now_s - arrival[oldest] > self.config.max_wait * queue.ttft_s[oldest]
        return oldest if waited and self.late_share.may_spend() else -1

    def _occupancy(
        self, running: RunningView, server: Occupancy, reserve_tokens: float
    ) -> Occupancy:
        """Adds the running requests on pace, each with the pace it needs now, at most its TPOT target."""
        on_pace, tpot = running.served, running.tpot_s
        pace = np.minimum(pace_s(running.lead_s, tpot, reserve_tokens, self.horizon_tokens), tpot)
        return replace(
            server,
            context_tokens=np.append(running.context_tokens[on_pace], server.context_tokens),
            tpot_s=np.append(pace[on_pace], server.tpot_s),
        )
