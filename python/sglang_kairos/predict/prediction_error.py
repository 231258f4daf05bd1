"""How far predictions are off: their error, an upper bound for the next, and which are outliers."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

WINDOW = 256  # the number of latest predictions that count
MOST = 10.0  # no single relative error counts more than this
SHORTEST_S = 1e-5  # no step is shorter; keeps the arithmetic in range

CLIP = 3.0  # bound on a residual, in running mean errors
CLIP_FLOOR = 0.1  # the least such bound, as a relative error
LONGEST_RUN = 16


# A model that has seen fewer steps is a guess for unknown hardware.
LEARNT_STEPS = 32

RESPONDS = 0.5  # least response of steps to what is predicted, if they scatter more than the limit
MEANS_STEPS = 128  # memory of the running means that a response is measured against
EVIDENCE = 64.0  # most of it, in units of its own noise: the response is known to 1 / sqrt of that
PRIOR_EVIDENCE = 4.0  # for a response of 1
FIRST_VARIANCE, LEAST_VARIANCE = 0.04, 1e-4


@dataclass(frozen=True, slots=True)
class PredictError:
    """Relative error of the latest predictions, each made before its step ran.

    Over the last WINDOW steps: `mape` is the mean of |predicted / measured - 1| and `p90` its 90 %
    quantile. `bias` is the mean of predicted / measured - 1, positive if predictions are too long.
    `samples`: all steps observed by this process. `response`: see `Response`.
    """

    mape: float
    p90: float
    samples: int
    bias: float = 0.0
    response: float = 1.0

    def trusted(self, limit: float) -> bool:
        """Returns whether enough steps were seen, and they are as predicted or at least follow it.

        As predicted means a mean error of at most `limit`. On a busy host steps scatter by more
        than that around predictions that are right on average. A smaller batch is still a shorter
        step there, and scatter costs only a lead to end with (`policy.decode_step.reserve_of`). Where a
        step's duration does not depend on who is in it, nobody gains from parking.
        """
        enough = self.samples >= LEARNT_STEPS
        return enough and (self.mape <= limit or self.response >= RESPONDS)


class ErrorWindow:
    """The last WINDOW predictions with what was measured, kept sorted so that reading is cheap."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque()
        self._errors: list[float] = []
        self._ratios: list[float] = []
        self._response = Response()
        self._samples = 0

    def add(self, predicted_s: float, measured_s: float) -> None:
        """Records a step that took `measured_s` (positive, finite)."""
        error = float(min(predicted_s / measured_s - 1.0, MOST))
        ratio = float(min(measured_s / max(predicted_s, SHORTEST_S), MOST))
        if len(self._latest) == WINDOW:
            old_error, old_ratio = self._latest.popleft()
            del self._errors[bisect_left(self._errors, abs(old_error))]
            del self._ratios[bisect_left(self._ratios, old_ratio)]
        self._latest.append((error, ratio))
        insort(self._errors, abs(error))
        insort(self._ratios, ratio)
        self._samples += 1
        if self._samples > LEARNT_STEPS:  # before, predictions change more than steps
            self._response.add(max(predicted_s, SHORTEST_S), measured_s)

    @property
    def error(self) -> PredictError:
        """The error of the window; all zero before the first step."""
        count = len(self._errors)
        if not count:
            return PredictError(0.0, 0.0, 0)
        mape = sum(self._errors) / count
        bias = sum(error for error, _ in self._latest) / count
        p90 = self._errors[_rank(0.9, count)]
        return PredictError(mape, p90, self._samples, bias, self._response.slope)

    def upper_ratio(self, quantile: float) -> float:
        """Returns the factor on a prediction that a step stays below with probability `quantile`.

        It is the split-conformal quantile of measured / predicted. It holds for any distribution,
        as long as the next step is like the last WINDOW. With too few steps it is the largest ratio
        seen; with none it is 1. Raises ValueError unless `quantile` is in (0, 1).
        """
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile must be between 0 and 1, got {quantile!r}")
        count = len(self._ratios)
        return self._ratios[_rank(quantile, count)] if count else 1.0


def _rank(quantile: float, count: int) -> int:
    return min(count, math.ceil((count + 1) * quantile)) - 1


class Response:
    """How much of a predicted difference between steps shows in what they take: `slope`.

    It is the slope of log measured over log predicted, both less their running means. It is 1 where
    a step predicted twice as long takes twice as long, and 0 where all steps take the same. Steps
    that are all predicted alike, as packed ones are, tell nothing. So evidence is forgotten only as
    fast as new evidence comes in. The slope is 1 until there is some.
    """

    def __init__(self) -> None:
        self.slope = 1.0
        self._means: tuple[float, float] | None = None
        self._variance = FIRST_VARIANCE
        self._known, self._found = 0.0, 0.0

    def add(self, predicted_s: float, measured_s: float) -> None:
        """Records a step; both times are positive and finite."""
        x, y = math.log(predicted_s), math.log(measured_s)
        if self._means is None:
            self._means = x, y
        mean_x, mean_y = self._means
        dx, dy = x - mean_x, y - mean_y
        self._means = mean_x + dx / MEANS_STEPS, mean_y + dy / MEANS_STEPS
        noise = dy - self.slope * dx
        self._variance += (noise * noise - self._variance) / MEANS_STEPS
        variance = max(self._variance, LEAST_VARIANCE)
        news = dx * dx / variance
        keep = 1.0 / (1.0 + news / EVIDENCE)
        self._known = keep * self._known + news
        self._found = keep * self._found + dx * dy / variance
        self.slope = (self._found + PRIOR_EVIDENCE) / (self._known + PRIOR_EVIDENCE)


class Outliers:
    """Bounds how far one measured time may pull, and tells a hiccup from a change.

    A time farther from its prediction than CLIP running mean errors is moved to that bound. Each
    further one in a row on the same side widens the bound by the same factor, and casts doubt on
    what was learnt before. So one outlier does little, and a lasting change gets through in a few
    steps.
    """

    def __init__(self) -> None:
        self.spread = 10.0
        self._run = 0

    def bounded(self, predicted_s: float, measured_s: float) -> tuple[float, bool]:
        """Returns the time to learn from, and whether earlier knowledge is in doubt."""
        ratio = max(measured_s / predicted_s, predicted_s / measured_s)
        bound = 1.0 + max(CLIP_FLOOR, CLIP * self.spread)
        self.spread += 0.1 * (min(ratio, bound) - 1.0 - self.spread)
        if ratio <= bound:
            self._run = 0
            return measured_s, False
        side = 1 if measured_s > predicted_s else -1
        self._run = self._run + side if self._run * side > 0 else side
        run = min(abs(self._run), LONGEST_RUN)
        reach = bound**run
        return min(max(measured_s, predicted_s / reach), predicted_s * reach), run > 1
