"""Random but legal decisions of a decode server, to prove that no decision can change a token.

The identity tests use it in place of the planner: whatever Kairos decides, the outputs must be
those of stock SGLang. Only ``--kairos-chaos-seed`` switches it on.
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
from sglang_kairos.policy.decode_step import StepChoice


class ChaosDecodePlanner(DecodePlanner):
    """Answers the planner's questions at random, from the seed in `config`."""

    def __init__(self, config: KairosConfig, counters: Counter[str]) -> None:
        super().__init__(config, counters)
        self._random = Random(config.chaos_seed)

    def admit(
        self, queue: QueueView, running: RunningView, server: Occupancy, times: StepPredictor
    ) -> AdmissionPlan:
        """Returns any order of the ready requests, the others behind, and any count from one up."""
        n = len(queue.prompt_tokens)
        here = np.ones(n, bool) if queue.ready is None else queue.ready
        order = sorted(self.order(queue), key=lambda index: not here[index])
        ready = int(np.count_nonzero(here))
        count = self._random.randint(min(1, ready), ready)
        return AdmissionPlan(order, self._random.randint(0, count), count)

    def order(self, queue: QueueView) -> list[int]:
        """Returns any order of the queue."""
        return self._shuffled(len(queue.prompt_tokens))

    def choose(self, view: RunningView, times: StepPredictor) -> StepChoice | None:
        """Returns a non-empty subset of the running requests; often None, which means all."""
        count = len(view.tpot_s)
        if count < 2 or self._random.random() < 0.4:
            return None
        run = [index for index in range(count) if self._random.random() < 0.6]
        run = run or [self._random.randrange(count)]
        return StepChoice(run, 0.0, "chaos", np.isin(np.arange(count), run))

    def retract(self, view: RunningView) -> list[int]:
        """Returns any order of the running requests."""
        return self._shuffled(len(view.tpot_s))

    def _shuffled(self, count: int) -> list[int]:
        order = list(range(count))
        self._random.shuffle(order)
        return order
