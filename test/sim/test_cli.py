"""`python -m sglang_kairos.sim`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sglang_kairos.sim.__main__ import main
from sglang_kairos.tools.replay import Metrics

MOONCAKE = '{"timestamp": %d, "input_length": 900, "output_length": 4, "hash_ids": [1, %d]}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "a trace.jsonl"
    path.write_text("".join(MOONCAKE % (i * 500, 2 + i) for i in range(20)))
    return path


def report(path: Path) -> Any:
    return json.loads(path.read_text())


def test_table_and_json_of_a_mooncake_trace(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    argv = f"--rate 1,4 --seed 3 --policies fcfs,kairos --prefill 2 --decode 2 --json {out}"
    assert main(["--trace", str(trace), *argv.split()]) == 0
    shown = capsys.readouterr().out
    assert shown.count("simulated: minimax-m2.5-h200-tp4, 2P2D, a trace.jsonl (20)") == 2
    runs = report(out)["runs"]
    assert [(run["policy"], round(run["rate"])) for run in runs] == [
        ("fcfs", 1),
        ("kairos", 1),
        ("fcfs", 4),
        ("kairos", 4),
    ]
    assert {field.name for field in fields(Metrics)} <= set(runs[0])
    assert runs[0]["slo"] == {"ttft_ms": [2000.0], "tpot_ms": 100.0} and runs[0]["seed"] == 3
    assert runs[0]["sent"] == 20 and runs[0]["cache_hit"] > 0.4
    assert report(out)["setup"]["simulated"] is True


def test_azure_columns_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "azure.csv"
    rows = "".join(f"2023-11-16 18:15:{i:02}.5,700,30\n" for i in range(9))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    assert main(["--trace", str(path), "--limit", "7", "--policies", "edf"]) == 0
    assert "azure.csv (7), 1 req/s" in capsys.readouterr().out


def test_the_same_command_writes_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        argv = "--generate 60 --rate 20 --seed 1,2 --ttft-ms 300,2000 --prediction-noise 0.3"
        assert main([*argv.split(), "--policies", "kairos,lpm", "--json", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--policies fcfs,fastest", "unknown policy 'fastest'; known: fcfs, lpm"),
        ("--rate 0", "--rate must be a number between 1e-06 and 1e+06, got '0'"),
        ("--rate nan", "got 'nan'"),
        ("--ttft-ms -5", "--ttft-ms must be a number between 1 and 3.6e+06, got '-5'"),
        ("--tpot-ms x", "--tpot-ms must be a number between 0.1 and 600000, got 'x'"),
        ("--prefill 0", "must be a whole number between 1 and 1024, got '0'"),
        ("--limit 5", "--limit needs --trace"),
        ("--seed 1.5", "--seed must be a whole number"),
        ("--system abacus", "invalid choice: 'abacus'"),
    ],
)
def test_bad_arguments_are_named(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([argv.replace(" ", "=", 1)])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "no requests in it"),
        ("TIMESTAMP,Tokens\n1,2\n", "no column 'ContextTokens'"),
        ('{"timestamp": 1, "input_length": -3, "output_length": 1}\n', ":1: column 'input_length'"),
    ],
)
def test_bad_traces_are_refused_with_the_place(
    text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace"
    if text is not None:
        path.write_text(text)
    assert main(["--trace", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_an_unwritable_report_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no" / "out.json"
    assert main(["--generate", "5", "--policies", "fcfs", "--json", str(missing)]) == 2
    assert "cannot be written" in capsys.readouterr().err
