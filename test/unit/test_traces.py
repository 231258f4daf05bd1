"""Reading, making and reshaping traces, and the prompts they stand for."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from sglang_kairos.loads import traces
from sglang_kairos.loads.traces import Request, TraceError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def mooncake(**changes: object) -> str:
    row = {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]}
    return json.dumps({**row, **changes}) + "\n"


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"


def test_mooncake_rows_count_from_the_first_in_seconds(tmp_path: Path) -> None:
    text = mooncake(timestamp=4500) + "\n" + mooncake(extra="ignored")
    rows = traces.read_trace(write(tmp_path / "t.jsonl", text))
    assert rows == [Request(0.0, 700, 5, (1, 2)), Request(1.5, 700, 5, (1, 2))]


def test_mooncake_without_hash_ids_shares_nothing(tmp_path: Path) -> None:
    text = '{"timestamp": 0, "input_length": 0, "output_length": 0}'
    assert traces.read_trace(write(tmp_path / "t", text)) == [Request(0.0, 1, 1, None)]


def test_azure_is_read_by_column_name_whatever_the_order(tmp_path: Path) -> None:
    text = (
        "\ufeffGeneratedTokens,Model,TIMESTAMP,ContextTokens\r\n"
        "44,x,2024-05-10 00:00:02.5+00:00,374\r\n"
        "\r\n"
        "7,x,2024-05-10 00:00:01+00:00,12\r\n"
    )
    rows = traces.read_trace(write(tmp_path / "t.csv", text))
    assert rows == [Request(0.0, 12, 7), Request(1.5, 374, 44)]


def test_azure_seven_digit_fractions(tmp_path: Path) -> None:
    rows = traces.read_trace(write(tmp_path / "t", AZURE + "2023-11-16 18:15:50.9951690,396,109"))
    assert rows[1].arrival_s == pytest.approx(4.314579, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no requests"),
        (mooncake() + "{nope\n", "t:2: not JSON"),
        (mooncake() + "[1]\n", "t:2: must be a JSON object"),
        (mooncake() + '{"timestamp": 1, "output_length": 5}', "t:2: column 'input_length' is miss"),
        (mooncake(output_length=-1), "t:1: column 'output_length' must be a number from 0 to"),
        (mooncake(output_length=1.5), "t:1: column 'output_length' must be a whole number"),
        (mooncake(output_length=True), "t:1: column 'output_length'"),
        (mooncake(timestamp=1e300), "t:1: column 'timestamp'"),
        (
            mooncake(input_length="many"),
            "'input_length' must be a number from 0 to 1e+07, got 'man",
        ),
        (mooncake(hash_ids=["a"]), "t:1: column 'hash_ids'"),
        ("TIMESTAMP,ContextTokens\nx,1\n", "t:1: no column 'GeneratedTokens'; it has 'TIMESTAMP'"),
        (AZURE + "yesterday,1,2\n", "t:3: column 'TIMESTAMP' must be a date and time, got 'yest"),
        (AZURE + "2023-11-16 18:15:46,1\n", "t:3: column 'GeneratedTokens' is missing"),
        (AZURE + "2023-11-16 18:15:46,nan,2\n", "t:3: column 'ContextTokens'"),
        (AZURE.splitlines()[0], "no requests"),
    ],
)
def test_bad_input_names_file_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(TraceError) as caught:
        traces.read_trace(write(tmp_path / "t", text))
    assert said in str(caught.value)
    assert str(tmp_path / "t") in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="missing: cannot be read: No such file"):
        traces.read_trace(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceError, match="not UTF-8"):
        traces.read_trace(tmp_path / "binary")


def test_long_tail_has_the_statistics_asked_for() -> None:
    rows = traces.long_tail(4000, 8.0, seed=3)
    inputs = sorted(row.input_tokens for row in rows)
    assert statistics.median(inputs) == pytest.approx(400, rel=0.1)
    assert 12 < inputs[3960] / 400 < 30
    assert max(inputs) <= 16_000
    assert max(row.output_tokens for row in rows) <= 400
    assert traces.rate_of(rows) == pytest.approx(8.0, rel=0.1)
    assert rows[0].arrival_s == 0.0
    assert rows == traces.long_tail(4000, 8.0, seed=3)
    assert rows != traces.long_tail(4000, 8.0, seed=4)


@pytest.mark.parametrize(("n", "rate"), [(0, 1.0), (5, 0.0), (5, float("nan"))])
def test_long_tail_refuses_nonsense(n: int, rate: float) -> None:
    with pytest.raises(ValueError, match="needs n >= 1"):
        traces.long_tail(n, rate, 0)


def test_reshaping() -> None:
    rows = [Request(float(at), 1000 * (at + 1), 10, (at,), 512) for at in range(5)]
    assert traces.rate_of(traces.scale_rate(rows, 4.0)) == pytest.approx(4.0)
    assert [r.arrival_s for r in traces.window(rows, 1.0, 3.0)] == [0.0, 1.0, 2.0]
    assert [r.input_tokens for r in traces.window(rows, 1.0, n=2)] == [2000, 3000]
    assert traces.window(rows, 99.0) == []
    assert [r.input_tokens for r in traces.cap_lengths(rows, 2500)] == [1000, 2000] + [2500] * 3
    half = traces.scale_lengths(rows, 0.5, 0.01)
    assert (half[0].input_tokens, half[0].output_tokens, half[0].block_tokens) == (500, 1, 256)
    together = [Request(0.0, 1, 1), Request(0.0, 1, 1)]
    assert traces.scale_rate(together, 3.0) == together


def test_prompts_share_prefixes_as_hash_ids_say() -> None:
    rows = [
        Request(0.0, 100, 1, (7, 8, 9), 40),
        Request(0.0, 90, 1, (7, 8, 10), 40),
        Request(0.0, 100, 1, (7,), 40),
        Request(0.0, 50, 1),
        Request(0.0, 50, 1),
    ]
    first, second, third, alone, other = traces.prompts(rows, seed=1)
    assert [len(ids) for ids in (first, second, third, alone, other)] == [100, 90, 100, 50, 50]
    assert first[:80] == second[:80]
    assert first[80:90] != second[80:90]
    assert first[:40] == third[:40]
    assert first[40:80] != third[40:80]
    assert alone != other
    assert all(100 <= token < 1000 for token in first)


def test_prompts_are_the_same_every_time_and_on_every_machine() -> None:
    rows = [Request(0.0, 4, 1)]
    assert list(traces.prompts(rows)) == [[355, 311, 426, 812]]
    assert list(traces.prompts(rows)) != list(traces.prompts(rows, seed=5))
    with pytest.raises(ValueError, match="needs 0 <= low < high"):
        list(traces.prompts(rows, 0, 5, 5))
