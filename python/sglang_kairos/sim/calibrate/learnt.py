"""A cluster whose servers have run for a while, for comparison with real ones on a CPU.

It adds two things that a measurement has in it and `sim.core.cluster` leaves out. Predictors start
calibrated and go on learning from noisy steps. And a prefill step's result is looked at, and its KV
sent, only after the next step. SGLang's overlap loop does that where the forward runs inside the
launch, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_kairos.loads.traces import Request
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.core.cluster import Setup, SimCluster
from sglang_kairos.sim.core.predictions import PredictionError, Predictor
from sglang_kairos.sim.core.prefill import SimPrefillServer
from sglang_kairos.sim.core.request import SimRequest


class LearntCluster(SimCluster):
    """A cluster whose servers learn. `late_results`: prefill results wait for the next step."""

    def __init__(
        self, setup: Setup, policy: Policy, rows: Sequence[Request], late_results: bool
    ) -> None:
        if late_results:
            self.prefill_kind = LatePrefillServer
        super().__init__(setup, policy, rows)

    def predictor(self, server: str) -> Predictor:
        """Returns a predictor that starts from the hardware's latency models and observes every step."""
        times = self.setup.system.times
        predictor = Predictor(times, PredictionError(learn=True), f"{self.setup.seed}/{server}")
        predictor.prefill, predictor.decode = times.prefill_model(), times.decode_model()
        return predictor


class LatePrefillServer(SimPrefillServer):
    """Sends a step's KV after the next step, or at once if there is none."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._results: list[tuple[SimRequest, int]] = []

    def _send(self, req: SimRequest, tokens: int) -> None:
        self._results.append((req, tokens))

    def _ended(self, *step: Any) -> None:
        self._look_at_results()
        super()._ended(*step)

    def _step(self) -> None:
        super()._step()
        if not self._busy:
            self._look_at_results()

    def _look_at_results(self) -> None:
        results, self._results = self._results, []
        for req, tokens in results:
            super()._send(req, tokens)
