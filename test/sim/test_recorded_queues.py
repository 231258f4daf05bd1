"""The planners decide on recorded queues as the real servers did that recorded them.

`data/decisions.jsonl.gz`: decisions of Kairos on real SGLang servers, one JSON object a line, made by
`python -m benchmark.record_decisions`. Each holds the queue as the engine saw it and what it decided.
Here the planners get the same queue again, and have to decide the same.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.decode_rows import chosen_again
from sglang_kairos.policy.prefill_planner import PrefillPlanner, PrefillView
from sglang_kairos.predict.laws import DecodeLaw, PrefillLaw
from sglang_kairos.predict.prefill_time import PrefillTimeModel
from sglang_kairos.sim.cluster import Cluster, Setup
from sglang_kairos.sim.policies import POLICIES
from sglang_kairos.sim.request import SimRequest
from sglang_kairos.sim.times import LawTimes, System
from sglang_kairos.tools.traces import Request

RECORDED = Path(__file__).parent / "data" / "decisions.jsonl.gz"
RECORDS: list[dict[str, Any]] = [
    json.loads(line) for line in gzip.decompress(RECORDED.read_bytes()).decode().splitlines()
]
PREFILL = [record for record in RECORDS if record["kind"] == "prefill"]
DECODE = [record for record in RECORDS if record["kind"] == "decode"]
KAIROS = POLICIES["kairos"]


def cluster_of(chunk_tokens: int, free_tokens: int, **settings: Any) -> Cluster:
    """An empty cluster at time 0 with these Kairos settings."""
    times = LawTimes(PrefillLaw(1.0, 0.0, 0.0), DecodeLaw(1.0, 0.0, 0.0), None)
    system = System(times, chunk_tokens=chunk_tokens, prefill_kv_tokens=free_tokens)
    config = replace(KAIROS.config, **settings)
    return Cluster(Setup(system), replace(KAIROS, config=config), [])


def job(index: int, prompt: int, deadline_s: float) -> SimRequest:
    """A request due at `deadline_s`, which is all that its arrival and target are good for here."""
    row = Request(deadline_s, max(1, prompt), 1)
    return SimRequest(index=index, row=row, ttft_s=0.0, tpot_s=1.0)


def view_of(record: dict[str, Any]) -> PrefillView:
    """What the planner was told, from a record of the columns made of it.

    All have a TTFT of nothing and came when they are due now, but who starves came before everybody.
    """
    count = len(record["tokens"])
    begun = record["partial"].count(True)
    arrival = np.array(record["deadline_s"])
    overdue = range(count - begun, count)
    in_slot = record["current"] >= 0
    return PrefillView(
        now_s=0.0,
        arrival_s=arrival,
        ttft_s=np.zeros(count),
        tokens=np.array(record["tokens"], np.int64),
        prefix=np.array(record["prefix"], np.int64),
        chunk_tokens=record["chunk_tokens"],
        paused_s=[1e9 * (index == record["forced"]) for index in overdue],
        in_slot=in_slot,
        free_tokens=record["free_tokens"],
        evictable_tokens=record.get("evictable_tokens", 0),
        max_paused=record["max_paused"],
    )


def test_the_recording_is_worth_replaying() -> None:
    assert min(len(PREFILL), len(DECODE)) >= 40
    assert sum(record["order"] != sorted(record["order"]) for record in PREFILL) >= 10
    assert any(record["hold"] for record in PREFILL)
    moved = [record for record in PREFILL if record["slot"] != record["current"] >= 0]
    assert len(moved) >= 10
    assert any(len(record["run"]) < len(record["slack_s"]) for record in DECODE)
    assert any(len(record["run"]) == len(record["slack_s"]) for record in DECODE)


def law_of(record: dict[str, Any]) -> PrefillLaw:
    law = record["law"]
    return PrefillLaw.from_json(law) if isinstance(law, dict) else PrefillLaw(*law)


def settings_of(record: dict[str, Any]) -> dict[str, float]:
    return record.get("settings") or {"margin": record["margin"], "handoff_ms": 0.0}


@pytest.mark.parametrize("record", PREFILL, ids=range(len(PREFILL)))
def test_prefill_is_planned_as_recorded(record: dict[str, Any]) -> None:
    planner = PrefillPlanner(replace(KAIROS.config, **settings_of(record)))
    times = PrefillTimeModel(*law_of(record))
    if "view" in record:
        columns = {
            name: np.array(value, np.int64 if name in ("tokens", "prefix") else float)
            for name, value in record["view"].items()
            if isinstance(value, list) and name != "paused_s"
        }
        view = PrefillView(**{**record["view"], **columns})
    else:
        view = view_of(record)
        starving = record["starving"].index(True) if any(record["starving"]) else -1
        planner._starving = lambda view: starving  # type: ignore[method-assign]
    plan = planner.plan(view, times)
    names = ("order", "slot", "chunk_limit", "on_time", "hold")
    assert {name: getattr(plan, name) for name in names} == {name: record[name] for name in names}


@pytest.mark.parametrize("record", PREFILL, ids=range(len(PREFILL)))
def test_remaining_work_is_predicted_as_recorded(record: dict[str, Any]) -> None:
    law = PrefillTimeModel(*law_of(record))
    work = law.remaining_s(record["tokens"], record["prefix"], record["chunk_tokens"])
    assert (work * (1 + record["margin"])).tolist() == record["work_s"]


@pytest.mark.parametrize("record", DECODE, ids=range(len(DECODE)))
def test_decode_runs_whom_the_record_ran(record: dict[str, Any]) -> None:
    choice = chosen_again(record)
    assert choice is not None
    assert (choice.run, choice.reason) == (record["run"], record["reason"])
