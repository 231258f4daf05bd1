"""Random but legal decisions of a decode server, to prove that no decision can change a token.

The identity tests use it in place of the planner: outputs must be those of stock SGLang, whatever
is decided. Only ``--kairos-chaos-seed`` switches it on.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.admission import AdmissionPlan, Occupancy, QueueView
from sglang_kairos.policy.decode_planner import (
    DecodePlanner,
    RunningView,
    StepPredictor,
)
from sglang_kairos.policy.packing import StepChoice


class ChaosDecodePlanner(DecodePlanner):
    """A decode planner that draws its answers from the seed in `config`."""

    def __init__(self, config: KairosConfig, counters: Counter[str]) -> None:
        super().__init__(config, counters)
        self._random = Random(config.chaos_seed)

    def admit(
        self, queue: QueueView, running: RunningView, server: Occupancy, times: StepPredictor
    ) -> AdmissionPlan:
        """Returns any order of the ready requests, the others behind, and any count from 1 on."""
        n = len(queue.prompt_tokens)
        here = np.ones(n, bool) if queue.ready is None else queue.ready
        order = sorted(self.order(queue), key=lambda index: not here[index])
        ready = int(np.count_nonzero(here))
        count = self._random.randint(min(1, ready), ready)
        return AdmissionPlan(order, self._random.randint(0, count), count)

    def order(self, queue: QueueView) -> list[int]:
        """Returns the requests in any order."""
        return self._shuffled(len(queue.prompt_tokens))

    def choose(self, view: RunningView, times: StepPredictor) -> StepChoice | None:
        """Returns a non-empty subset of the running requests, or None for all of them, often."""
        count = len(view.tpot_s)
        if count < 2 or self._random.random() < 0.4:
            return None
        run = [index for index in range(count) if self._random.random() < 0.6]
        run = run or [self._random.randrange(count)]
        return StepChoice(run, 0.0, "chaos", np.isin(np.arange(count), run))

    def retract(self, view: RunningView) -> list[int]:
        """Returns the running requests in any order."""
        return self._shuffled(len(view.tpot_s))

    def _shuffled(self, count: int) -> list[int]:
        order = list(range(count))
        self._random.shuffle(order)
        return order
