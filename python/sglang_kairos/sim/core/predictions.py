"""What the simulated servers predict about step times: the shipped predictors, made wrong at will."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.predict.prediction_error import LEARNT_STEPS, PredictError
from sglang_kairos.sim.hardware.times import StepTimes

# Mean absolute value of a normal variable, divided by its sigma.
MEAN_OF_SIGMA = 0.8


@dataclass(frozen=True)
class PredictionError:
    """How wrong predictions are.

    `factor` scales every prediction. `noise`: sigma of a lognormal factor, one per request's
    prefill and one per decode step. `learn`: predictors start from the generic latency models and
    observe executed steps, as on a server without a profile; otherwise they start calibrated.
    """

    factor: float = 1.0
    noise: float = 0.0
    learn: bool = False

    def draw(self, rng: Random) -> float:
        """Returns one prediction divided by its honest value."""
        return self.factor if self.noise == 0 else self.factor * math.exp(rng.gauss(0, self.noise))


class Predictor:
    """The predictors of one server."""

    def __init__(self, times: StepTimes, error: PredictionError, seed: str) -> None:
        self._error, self._rng = error, Random(seed)
        if error.learn:
            self.prefill = PrefillTimeModel.generic()
            self.decode = StepTimeModel.generic(times.captured_sizes)
        else:
            self.prefill, self.decode = times.prefill_model(), times.decode_model()

    def saw_prefill(self, new_tokens: list[int], prefix_tokens: list[int], seconds: float) -> None:
        """Notes an executed prefill step."""
        if self._error.learn:
            self.prefill.observe(new_tokens, prefix_tokens, seconds)

    def saw_decode(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """Notes an executed decode step."""
        if self._error.learn:
            self.decode.observe(batch, kv_tokens, seconds)

    def decode_times(self) -> BelievedTimes:
        """Returns what a decode server predicts about its steps at one decision."""
        seen = PredictError(MEAN_OF_SIGMA * self._error.noise, 0.0, LEARNT_STEPS)
        return BelievedTimes(
            self.decode, self._error.draw(self._rng), None if self._error.learn else seen
        )


@dataclass(frozen=True, slots=True)
class BelievedTimes:
    """A model with all its predictions times `factor`.

    `seen`: the error that a server would have seen; None: the model has learnt, and knows it
    itself.
    """

    model: StepTimeModel
    factor: float
    seen: PredictError | None

    def step_s(self, batch: Any, kv_tokens: Any, /) -> Any:
        """Returns `StepTimeModel.step_s` times `factor`."""
        return self.model.step_s(batch, kv_tokens) * self.factor

    @property
    def error(self) -> PredictError:
        return self.model.error if self.seen is None else self.seen
