"""How many requests per second a decode server can keep on pace, by the step-time law it reports."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sglang_kairos.loads import traces
from sglang_kairos.predict.latency_model import DecodeLatency


def capacity_of(report: Mapping[str, Any], rows: Sequence[traces.Request], tpot_ms: float) -> float:
    """Requests per second whose steps, all of them in each, last just `tpot_ms`.

    `report`: a `predict.latency_model.DecodeLatency` as a server reports it.
    As good as the law at that batch: it should have been learnt with about as many abreast.
    """
    outputs = np.array([row.output_tokens for row in rows], float)
    contexts = np.array([row.input_tokens for row in rows], float) + outputs / 2
    context = float((contexts * outputs).sum() / outputs.sum())
    law, target = DecodeLatency.from_json(report), tpot_ms / 1e3
    sizes = range(1, 4096)
    abreast = max(1, bisect_right(sizes, target, key=lambda size: law.step_s(size, size * context)))
    return abreast / (target * float(outputs.mean()))
