"""The planners decide on recorded queues as the real servers did that recorded them.

`data/decisions.jsonl.gz`: decisions of Kairos on real SGLang servers, one JSON object a line, made by
`python -m benchmark.experiments.record_decisions`.
Each holds the queue as the engine saw it and what it decided.
Here the planners get the same queue again, and have to decide the same.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.decode_rows import chosen_again
from helpers.prefill_rows import planned_again, slot_before, times_of

RECORDED = Path(__file__).parent / "data" / "decisions.jsonl.gz"
RECORDS: list[dict[str, Any]] = [
    json.loads(line) for line in gzip.decompress(RECORDED.read_bytes()).decode().splitlines()
]
PREFILL = [record for record in RECORDS if record["kind"] == "prefill"]
DECODE = [record for record in RECORDS if record["kind"] == "decode"]


def test_the_recording_is_worth_replaying() -> None:
    assert min(len(PREFILL), len(DECODE)) >= 40
    assert sum(record["order"] != sorted(record["order"]) for record in PREFILL) >= 10
    assert any(record["hold"] for record in PREFILL)
    moved = [record for record in PREFILL if record["slot"] != slot_before(record) >= 0]
    assert len(moved) >= 10
    assert any(len(record["run"]) < len(record["slack_s"]) for record in DECODE)
    assert any(len(record["run"]) == len(record["slack_s"]) for record in DECODE)


@pytest.mark.parametrize("record", PREFILL, ids=range(len(PREFILL)))
def test_prefill_is_planned_as_recorded(record: dict[str, Any]) -> None:
    plan = planned_again(record)
    names = ("order", "slot", "chunk_limit", "on_time", "hold")
    assert {name: getattr(plan, name) for name in names} == {name: record[name] for name in names}


OLDER = [record for record in PREFILL if "work_s" in record]


@pytest.mark.parametrize("record", OLDER, ids=range(len(OLDER)))
def test_remaining_work_is_predicted_as_recorded(record: dict[str, Any]) -> None:
    work = times_of(record).remaining_s(record["tokens"], record["prefix"], record["chunk_tokens"])
    assert (work * (1 + record["margin"])).tolist() == record["work_s"]


@pytest.mark.parametrize("record", DECODE, ids=range(len(DECODE)))
def test_decode_runs_whom_the_record_ran(record: dict[str, Any]) -> None:
    choice = chosen_again(record)
    assert choice is not None
    assert (choice.run, choice.reason) == (record["run"], record["reason"])
