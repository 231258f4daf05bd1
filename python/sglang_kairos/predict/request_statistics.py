"""How long requests take to start on a decode server, and how many tokens they usually make.

startup = a + b prompt_tokens       seconds from the reservation of KV to the first token
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.predict.least_squares import Rls

FIRST_STARTUP = (0.03, 2e-5)
FIRST_OUTPUT = 250.0
RATE = 0.02  # weight of the latest finished request in the mean output
USUAL, BEST = 0.9, 0.1  # quantiles


class RequestStatistics:
    """Startup times and output lengths of a decode server, learnt from its requests."""

    def __init__(self) -> None:
        self._startup = Rls(FIRST_STARTUP, (1.0, 1e3))
        self.output_tokens = FIRST_OUTPUT
        """Mean of the requests that ended lately."""

    def started(self, prompt_tokens: int, seconds: float) -> None:
        """Learns from a first token that came `seconds` after its KV was reserved."""
        self._startup.observe((1.0, float(prompt_tokens)), seconds)

    def ended(self, output_tokens: int) -> None:
        """Learns from a request that made this many tokens in all."""
        self.output_tokens += RATE * (output_tokens - self.output_tokens)

    def startup_s(
        self, prompt_tokens: NDArray[np.float64], quantile: float = USUAL
    ) -> NDArray[np.float64]:
        """Returns the seconds that `quantile` of the starts stay below, (n,)."""
        fixed, per_token = self._startup.theta
        return (fixed + per_token * prompt_tokens) * self._startup.upper_ratio(quantile)
