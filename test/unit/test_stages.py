"""TTFT by stage: the arithmetic, the join with the client's view, and the recorder's records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark.experiments import ttft_split
from benchmark.harness import stamp_recorder
from hypothesis import given
from hypothesis import strategies as st

from helpers.upstream import upstream_source
from sglang_kairos.cluster.run import ClusterSpec
from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.reports import stages
from sglang_kairos.reports.report import Run
from sglang_kairos.reports.stages import (
    STAGES,
    DecodeStamps,
    PrefillStamps,
    Records,
    Split,
    StageError,
    join,
    read_records,
    split,
    summarise,
    table,
)

PREFILL = PrefillStamps(
    received_s=10.010, queued_s=10.030, started_s=10.100, computed_s=10.500, paused_s=0.150
)
DECODE = DecodeStamps(received_s=10.004, arrived_s=10.520, admitted_s=10.560)


def named(found: Split) -> dict[str, float]:
    return dict(zip(STAGES, (round(ms, 6) for ms in found.stages_ms), strict=True))


def test_each_stage_ends_where_the_next_begins() -> None:
    found = split(10.0, 10.6, PREFILL, DECODE)
    assert named(found) == {
        "router and network, in": 4.0,
        "bootstrap and pre-allocation": 26.0,
        "queue": 70.0,
        "compute": 250.0,
        "paused": 150.0,
        "transfer": 20.0,
        "decode admission": 40.0,
        "router and network, out": 40.0,
    }
    assert found.ttft_ms == pytest.approx(600.0)
    assert found.moved_ms == 0.0


@pytest.mark.parametrize(
    ("prefill", "decode", "moved_ms", "stages_ms"),
    [
        pytest.param(
            replace(PREFILL, received_s=9.9),
            DECODE,
            100.0,
            {"router and network, in": 0.0, "bootstrap and pre-allocation": 30.0},
            id="a server whose clock is early takes nothing from before the sending",
        ),
        pytest.param(
            PREFILL,
            replace(DECODE, arrived_s=10.450),
            50.0,
            {"transfer": 0.0, "decode admission": 60.0},
            id="KV that arrives before it is computed took no time",
        ),
        pytest.param(
            PREFILL,
            replace(DECODE, admitted_s=10.7),
            100.0,
            {"decode admission": 80.0, "router and network, out": 0.0},
            id="a stamp behind the first token ends at the first token",
        ),
        pytest.param(
            replace(PREFILL, paused_s=7.0),
            DECODE,
            0.0,
            {"compute": 0.0, "paused": 400.0},
            id="a pause is never longer than the prefill around it",
        ),
    ],
)
def test_stamps_out_of_order(
    prefill: PrefillStamps, decode: DecodeStamps, moved_ms: float, stages_ms: dict[str, float]
) -> None:
    found = split(10.0, 10.6, prefill, decode)
    assert found.moved_ms == pytest.approx(moved_ms)
    assert {name: named(found)[name] for name in stages_ms} == stages_ms
    assert found.ttft_ms == pytest.approx(600.0)


TIMES = st.floats(0.0, 1e4, allow_nan=False)


@given(
    st.tuples(TIMES, TIMES).map(sorted),
    st.builds(PrefillStamps, *[TIMES] * 5),
    st.builds(DecodeStamps, *[TIMES] * 3),
)
def test_stages_are_never_negative_and_add_up_to_ttft(
    client_s: list[float], prefill: PrefillStamps, decode: DecodeStamps
) -> None:
    found = split(client_s[0], client_s[1], prefill, decode)
    assert len(found.stages_ms) == len(STAGES)
    assert min(found.stages_ms) >= 0.0
    assert sum(found.stages_ms) == pytest.approx((client_s[1] - client_s[0]) * 1e3, abs=1e-6)


@given(
    TIMES, st.lists(st.floats(0.0, 10.0), min_size=7, max_size=7), st.floats(0, 1), st.booleans()
)
def test_stamps_in_order_give_every_stage_back(
    sent_s: float, spans_s: list[float], paused: float, decode_first: bool
) -> None:
    edges = [sent_s]
    for span in spans_s:
        edges.append(edges[-1] + span)
    later = edges[1] + 1.0
    prefill = PrefillStamps(later if decode_first else edges[1], *edges[2:5], paused * spans_s[3])
    decode = DecodeStamps(edges[1] if decode_first else later, *edges[5:7])
    found = split(edges[0], edges[-1], prefill, decode)
    whole = [1e3 * span for span in spans_s]
    whole[3:4] = [(1 - paused) * whole[3], paused * whole[3]]
    assert found.stages_ms == pytest.approx(whole, abs=1e-6)
    assert found.moved_ms == 0.0


def outcome(rid: str = "a", **changes: Any) -> Outcome:
    one = Outcome(0, 0.0, 2.0, 100, 4, 1e3, 50.0, "ok", rid=rid)
    one.first_token_s, one.output_tokens = 2.6, 4
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def test_the_client_and_the_servers_are_joined_by_request_id() -> None:
    other = replace(PREFILL, started_s=10.2)
    records = Records({"b": other, "a": PREFILL}, {"a": DECODE, "b": DECODE})
    found = join([outcome("a"), outcome("b")], 8.0, records)
    assert [named(one)["queue"] for one in found.splits] == [70.0, 170.0]
    assert [round(one.ttft_ms, 6) for one in found.splits] == [600.0, 600.0]
    assert found.left_out == {}


@pytest.mark.parametrize(
    ("one", "prefill", "decode", "reason"),
    [
        (outcome(output_tokens=0), PREFILL, DECODE, "no first token"),
        (outcome("other"), PREFILL, DECODE, "no record"),
        (outcome(), replace(PREFILL, computed_s=0.0), DECODE, "incomplete record"),
        (outcome(), PREFILL, replace(DECODE, retractions=1), "retracted"),
    ],
)
def test_what_cannot_be_split_is_counted(
    one: Outcome, prefill: PrefillStamps, decode: DecodeStamps, reason: str
) -> None:
    found = join([one], 8.0, Records({"a": prefill}, {"a": decode}))
    assert (found.splits, found.left_out) == ([], {reason: 1})


def test_means_add_up_and_percentiles_are_each_stages_own() -> None:
    splits = [Split((0.0, 1.0, 10.0 * n, 100.0, 0.0, 5.0, 2.0, 3.0)) for n in range(101)]
    found = summarise(splits)
    assert list(found) == [*STAGES, "TTFT"]
    assert found["queue"] == stages.Summary(500.0, 500.0, 990.0)
    assert found["TTFT"].p99_ms == pytest.approx(1101.0)
    assert found["TTFT"].mean_ms == pytest.approx(sum(found[name].mean_ms for name in STAGES))
    with pytest.raises(StageError, match="no request has both"):
        summarise([])


def test_the_table_has_a_line_per_stage_and_three_columns_per_policy() -> None:
    splits = [Split((1.0, 2.0, 3.0, 4.0, 0.0, 5.0, 6.0, 7.0))]
    lines = table({"fcfs": splits, "kairos": splits}).splitlines()
    assert lines[0] == "| ms | fcfs: mean | p50 | p99 | kairos: mean | p50 | p99 |"
    assert lines[4] == "| queue | 3.0 | 3.0 | 3.0 | 3.0 | 3.0 | 3.0 |"
    assert lines[-1] == "| TTFT | 28.0 | 28.0 | 28.0 | 28.0 | 28.0 | 28.0 |"
    assert {line.count("|") for line in lines} == {8}
    assert len(lines) == 2 + len(STAGES) + 1


def request(mode: str, **changes: Any) -> SimpleNamespace:
    """The fields of SGLang's `Req` that the recorder reads."""
    stats = SimpleNamespace(
        disagg_mode_str=lambda: mode,
        prefill_bootstrap_queue_entry_time=PREFILL.received_s,
        decode_prealloc_queue_entry_time=DECODE.received_s,
        wait_queue_entry_time=PREFILL.queued_s if mode == "prefill" else DECODE.arrived_s,
        forward_entry_time=PREFILL.started_s,
        prefill_finished_time=PREFILL.computed_s,
        decode_prebuilt_finish_time=DECODE.admitted_s,
    )
    return SimpleNamespace(**{"rid": "a", "time_stats": stats, "retraction_count": 0} | changes)


def test_what_the_recorder_writes_is_what_the_reader_reads() -> None:
    paused = SimpleNamespace(paused_s=PREFILL.paused_s)
    requests = [request("prefill", _kairos=paused), request("decode")]
    lines = [json.dumps(stamp_recorder.describe(req)) for req in requests]
    assert read_records(lines) == Records({"a": PREFILL}, {"a": DECODE})
    stock = json.dumps(stamp_recorder.describe(request("prefill")))
    assert read_records([stock]).prefill["a"].paused_s == 0.0
    assert stamp_recorder.describe(request("unified")) is None


def test_of_two_attempts_the_last_one_counts() -> None:
    again = request("decode", retraction_count=3)
    lines = [json.dumps(stamp_recorder.describe(req)) for req in (request("decode"), again)]
    assert read_records(lines).decode["a"].retractions == 3


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"rid": "a"}', '{"rid": "a", "mode": "decode"}', '{"rid": "a", "mode": "x"}'],
)
def test_a_bad_record_is_named(line: str) -> None:
    good = json.dumps(stamp_recorder.describe(request("decode")))
    with pytest.raises(StageError, match="record 2"):
        read_records([good, line])


def test_sglang_still_has_what_the_recorder_reads() -> None:
    stats = upstream_source("srt/observability/req_time_stats.py")
    for name in vars(request("prefill").time_stats):
        assert f"{name}:" in stats or f"def {name}(" in stats
    req = upstream_source("srt/managers/schedule_batch.py")
    for text in ("def log_time_stats(self)", "self.has_log_time_stats:", "self.retraction_count:"):
        assert text in req or text.replace(":", " =") in req


def test_servers_are_told_where_to_write_and_old_records_go(tmp_path: Path) -> None:
    old = tmp_path / "decode-1.jsonl"
    old.write_text("stale")
    spec = ttft_split.recorded(ClusterSpec(server_args=["--x"], env={"A": "1"}), tmp_path)
    assert list(spec.server_args) == ["--x", stamp_recorder.FLAG]
    assert spec.env == {"A": "1", stamp_recorder.FOLDER_VARIABLE: str(tmp_path)}
    assert not old.exists()
    for mode in ("prefill", "decode"):
        record = json.dumps(stamp_recorder.describe(request(mode)))
        (tmp_path / f"{mode}-7.jsonl").write_text(record + "\n")
    found = ttft_split.noted(tmp_path)
    assert (set(found.prefill), set(found.decode)) == ({"a"}, {"a"})


def test_the_report_has_metrics_stages_and_what_was_left_out() -> None:
    records = Records({"a": PREFILL}, {"a": DECODE})
    outcomes = [outcome("a"), outcome("lost")]
    run = Run("kairos", Result(outcomes, 5.0), {"prefill_utilisation": 0.9})
    one = ttft_split.SplitRun(run, join(outcomes, 8.0, records))
    row = one.row()
    assert (row["policy"], row["sent"], row["split"]) == ("kairos", 2, 1)
    assert row["left_out"] == {"no record": 1}
    assert row["stages"]["compute"] == {"mean_ms": 250.0, "p50_ms": 250.0, "p99_ms": 250.0}
    last = ttft_split.tables([one]).splitlines()[-1]
    assert "1 requests split, left out: 1 no record; stamps moved by at most 0.00 ms" in last


@pytest.mark.parametrize(
    ("argv", "named_in_error"),
    [
        (["--policies", "fcfs,nope"], "'nope'"),
        (["--load", "0"], "--load: must be above 0"),
        (["--load-s", "-1"], "--load-s: must be positive"),
    ],
)
def test_bad_flags_are_named(
    argv: list[str], named_in_error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ttft_split.parse(argv)
    assert named_in_error in capsys.readouterr().err


def test_the_load_is_the_share_of_capacity_that_the_demo_sends() -> None:
    given = ttft_split.parse(["--load", "0.7"])
    assert given.utilisation == 0.7
    assert given.policies == ["fcfs", "kairos"]
    assert given.launcher == "benchmark.harness.stamp_recorder"
