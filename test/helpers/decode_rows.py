"""Replays decisions of decode servers: puts the rows of a decision log to the planner again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.decode_planner import DecodePlanner, RunningView
from sglang_kairos.policy.decode_step import HORIZON, RESERVE_PER_ERROR, StepChoice
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.prediction_error import PredictError


class Recorded:
    """What the server believed of its steps. Older records say what lead that came down to."""

    def __init__(self, record: dict[str, Any]) -> None:
        model = StepTimeModel.generic()
        model.restore(record["model"])
        self.step_s = model.step_s
        mean_error = record.get("reserve_tokens", 0.0) / RESERVE_PER_ERROR
        older = {"mape": mean_error, "p90": 0.0, "samples": 99}
        self.error = PredictError(**record.get("error", older))


def chosen_again(record: dict[str, Any]) -> StepChoice | None:
    """The planner's choice for a row of the kind "decode"."""
    slack, tpot, context, silent = (
        np.array(record[name], float)
        for name in ("slack_s", "tpot_s", "context_tokens", "silent_s")
    )
    # At time 0 with nothing emitted, the slack is the time of the first token.
    view = RunningView(
        now_s=0.0,
        first_token_s=slack,
        emitted=np.zeros(slack.size),
        tpot_s=tpot,
        last_token_s=-silent,
        served=np.array(record["served"], bool),
        context_tokens=context,
        tightest_s=float(tpot.min()),
    )
    config = KairosConfig(
        max_itl_ms=1e3 * record["max_itl_s"], min_throughput=record.get("min_throughput", 0.0)
    )
    planner = DecodePlanner(config, Counter())
    older = 2.0 * record.get("horizon_tokens", HORIZON)
    planner.statistics.output_tokens = record.get("expected_output", older)
    return planner.choose(view, Recorded(record))
