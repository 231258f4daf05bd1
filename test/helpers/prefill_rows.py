"""Replays decisions of prefill servers: puts the rows of a decision log to the planner again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.prefill_planner import PrefillPlanner, PrefillView
from sglang_kairos.policy.prefill_step import PrefillPlan
from sglang_kairos.predict.latency_model import PrefillLatency
from sglang_kairos.predict.online_prefill import PrefillTimeModel

WHOLE = ("tokens", "prefix")


def times_of(record: dict[str, Any]) -> PrefillTimeModel:
    """What the server believed of its steps."""
    law = record["law"]
    return PrefillTimeModel(
        *(PrefillLatency.from_json(law) if isinstance(law, dict) else PrefillLatency(*law))
    )


def slot_before(record: dict[str, Any]) -> int:
    """Index of who had the chunk slot when it was planned, -1: nobody."""
    if "view" not in record:
        return int(record["current"])
    return len(record["order"]) + len(record["hold"]) if record["view"]["in_slot"] else -1


def planned_again(record: dict[str, Any]) -> PrefillPlan:
    """The planner's plan for a row of the kind "prefill"; older rows have no `view`."""
    settings = record.get("settings") or {"margin": record["margin"], "handoff_ms": 0.0}
    planner = PrefillPlanner(replace(KairosConfig(), **settings))
    if "view" not in record:
        starving = record["starving"].index(True) if any(record["starving"]) else -1
        planner._starving = lambda view: starving  # type: ignore[method-assign]
        return planner.plan(_older_view(record), times_of(record))
    columns = {
        name: np.array(value, np.int64 if name in WHOLE else float)
        for name, value in record["view"].items()
        if isinstance(value, list) and name != "paused_s"
    }
    return planner.plan(PrefillView(**{**record["view"], **columns}), times_of(record))


def _older_view(record: dict[str, Any]) -> PrefillView:
    """Rows once held the columns made of the view, not the view: all are due now and came then."""
    count, begun = len(record["tokens"]), record["partial"].count(True)
    return PrefillView(
        now_s=0.0,
        arrival_s=np.array(record["deadline_s"]),
        ttft_s=np.zeros(count),
        tokens=np.array(record["tokens"], np.int64),
        prefix=np.array(record["prefix"], np.int64),
        chunk_tokens=record["chunk_tokens"],
        paused_s=[1e9 * (index == record["forced"]) for index in range(count - begun, count)],
        in_slot=record["current"] >= 0,
        free_tokens=record["free_tokens"],
        evictable_tokens=record.get("evictable_tokens", 0),
        max_paused=record["max_paused"],
    )
