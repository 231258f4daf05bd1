"""Traces of other makers: block size and unit follow from the rows, or the reader asks."""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.loads import traces
from sglang_kairos.loads.traces import TraceError


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(at: float, tokens: int, size: int, **more: Any) -> dict[str, Any]:
    blocks = -(-tokens // size)
    return {
        "timestamp": at,
        "input_length": tokens,
        "output_length": 5,
        "hash_ids": list(range(blocks)),
        **more,
    }


def bailian(count: int = 30) -> list[dict[str, Any]]:
    return [row(0.6 * i, 80 + 33 * i, 16, chat_id=i, parent_chat_id=-1) for i in range(count)]


def test_a_bailian_trace_counts_seconds_and_blocks_of_16_tokens(tmp_path: Path) -> None:
    rows = traces.read_trace(jsonl(tmp_path / "b", bailian()))
    assert {each.block_tokens for each in rows} == {16}
    assert traces.rate_of(rows) == pytest.approx(1 / 0.6)
    first, longer = list(traces.prompts(rows))[:2]
    assert first == longer[:80]  # five blocks of 16


@pytest.mark.parametrize("size", [16, 64, 128, 512])
def test_the_block_size_follows_from_the_rows(size: int, tmp_path: Path) -> None:
    rows = [row(1000 * i, 900 + 1111 * i, size) for i in range(8)]
    found = traces.read_trace(jsonl(tmp_path / "m", rows))
    assert {each.block_tokens for each in found} == {size}


@given(st.integers(1, 600), st.lists(st.integers(1, 20_000), min_size=1, max_size=8))
def test_a_block_size_that_is_read_fits_every_row(size: int, lengths: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = jsonl(Path(folder) / "t", [row(0, length, size) for length in lengths])
        try:
            found = traces.read_trace(path)
        except TraceError:  # several would do
            found = traces.read_trace(path, block_tokens=size)
    for each in found:
        blocks = len(each.hash_ids or ())
        assert (blocks - 1) * each.block_tokens < each.input_tokens <= blocks * each.block_tokens


def test_rows_that_no_block_size_fits_are_refused_with_their_line(tmp_path: Path) -> None:
    rows = [row(0, 6400, 64), row(1, 6400, 16)]
    with pytest.raises(TraceError, match=r":2: column 'hash_ids' has 400 blocks for 6400 tokens"):
        traces.read_trace(jsonl(tmp_path / "t", rows))
    with pytest.raises(TraceError, match=r":1: .*not --block-tokens 512"):
        traces.read_trace(jsonl(tmp_path / "t", rows[:1]), block_tokens=512)


def test_a_block_size_that_stays_open_is_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t", [row(0, 40, 20)])  # two blocks of 20 to 39 tokens
    assert traces.read_trace(path)[0].block_tokens == 32
    path = jsonl(tmp_path / "t", [{**row(0, 100, 20), "hash_ids": [1, 2, 3]}])  # 34 to 49
    with pytest.raises(TraceError, match=r"34 to 49 tokens per block.*--block-tokens"):
        traces.read_trace(path)
    assert traces.read_trace(path, block_tokens=40)[0].block_tokens == 40


def plain(times: Sequence[float]) -> list[dict[str, Any]]:
    return [{"timestamp": at, "input_length": 9, "output_length": 9} for at in times]


def test_a_rate_that_cannot_be_right_is_refused_or_read_in_seconds(tmp_path: Path) -> None:
    fractions = jsonl(tmp_path / "f", plain([0.7 * i for i in range(40)]))
    assert traces.rate_of(traces.read_trace(fractions)) == pytest.approx(1 / 0.7)
    whole = jsonl(tmp_path / "w", plain([i // 2 for i in range(40)]))
    with pytest.raises(
        TraceError, match=r"2053 requests per second.*2.053 if seconds.*--time-unit"
    ):
        traces.read_trace(whole)
    assert traces.rate_of(traces.read_trace(whole, time_unit="s")) == pytest.approx(39 / 19)
    fast = traces.read_trace(whole, time_unit="ms")
    assert traces.rate_of(fast) == pytest.approx(39 / 0.019)


def test_mooncakes_milliseconds_stay_what_they_were(tmp_path: Path) -> None:
    rows = traces.read_trace(jsonl(tmp_path / "m", plain([3000 * (i // 10) for i in range(100)])))
    assert rows[-1].arrival_s == 27.0


BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_a_burstgpt_row_without_an_answer_failed_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "b.csv"
    path.write_text(BURST + "5,GPT-4,571,0,571,API log\n7.5,ChatGPT,93,32,125,Conversation log\n")
    with caplog.at_level(logging.WARNING):
        rows = traces.read_trace(path)
    assert [(each.input_tokens, each.output_tokens) for each in rows] == [(93, 32)]
    assert "1 of 2 requests had failed" in caplog.text


def test_a_turn_of_a_session_comes_its_delay_after_the_turn_before(tmp_path: Path) -> None:
    turns = [
        {"session_id": "a", "timestamp": 100, "input_length": 3, "output_length": 4},
        {"session_id": "b", "timestamp": 200, "input_length": 5, "output_length": 6},
        {"session_id": "a", "delay": 1500, "input_length": 7, "output_length": 8},
    ]
    rows = traces.read_trace(jsonl(tmp_path / "s", turns))
    assert [each.arrival_s for each in rows] == pytest.approx([0.0, 0.1, 1.5])
    with pytest.raises(TraceError, match=":1: column 'timestamp' is missing in a session's first"):
        traces.read_trace(jsonl(tmp_path / "s", turns[2:]))


def test_what_is_no_trace_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("[1, 2]\n")
    with pytest.raises(
        TraceError, match=r"known trace format .Bailian, BurstGPT, aiperf, Mooncake"
    ):
        traces.read_trace(path)


def test_the_cases_that_failed_are_read_right(shared_dir: Path | None) -> None:
    if shared_dir is None or not (shared_dir / "cases").is_dir():
        pytest.skip("the shared cases are not here")
    cases = shared_dir / "cases"
    rows = traces.read_trace(cases / "bailian_blksz_16.jsonl")
    assert rows[0].block_tokens == 16 and traces.rate_of(rows) == pytest.approx(1.711, rel=1e-3)
    first, second = list(traces.prompts(rows))[:2]
    assert first[:80] == second[:80] and first[80] != second[80]
    assert traces.read_trace(cases / "mooncake_blksz_64.jsonl")[0].block_tokens == 64
    assert len(traces.read_trace(cases / "burstgpt.csv")) == 35
    assert [r.output_tokens for r in traces.read_trace(cases / "azure2024.csv")] == [5, 6, 15, 1]


def test_times_finer_than_assumed_are_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "us", plain([600_000.0 * i for i in range(30)]))
    with pytest.raises(TraceError, match=r"0.001667 requests per second.*--time-unit"):
        traces.read_trace(path)
    assert traces.rate_of(traces.read_trace(path, time_unit="us")) == pytest.approx(1 / 0.6)


def test_dates_are_never_doubted_however_many_a_second(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    text += "".join(f"2024-05-10 12:00:00.{n:03d}500+00:00,10,5\n" for n in range(300))
    (tmp_path / "azure.csv").write_text(text)
    assert traces.rate_of(traces.read_trace(tmp_path / "azure.csv")) == pytest.approx(1000.0)


def test_bursts_are_told_where_a_user_sees_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "m", plain([3000.0 * (i // 10) for i in range(40)]))
    with caplog.at_level(logging.WARNING):
        traces.read_trace(path)
    assert "40 requests arrive at 4 instants, in bursts" in caplog.text


def test_packed_traces_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    plain_path = jsonl(tmp_path / "m", plain([1000.0 * i for i in range(5)]))
    packed = gzip.compress(plain_path.read_bytes())
    path = tmp_path / "m.jsonl.gz"
    path.write_bytes(packed)
    assert traces.read_trace(path) == traces.read_trace(plain_path)
    for damaged in (b"no gzip", packed[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(TraceError, match="damaged gzip file"):
            traces.read_trace(path)


@pytest.mark.parametrize("text", ["0", "-5", "x", "1.5", "100000000"])
def test_a_block_of_no_tokens_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    traces.add_reading_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--block-tokens={text}"])
    assert "--block-tokens: must be a whole number between 1 and" in capsys.readouterr().err
