"""`python -m sglang_kairos.sim`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Metrics
from sglang_kairos.sim.__main__ import main
from sglang_kairos.sim.bound import bound
from sglang_kairos.sim.cli import compare, options
from sglang_kairos.sim.cli.progress import progress_bar

MOONCAKE = '{"timestamp": %d, "input_length": 900, "output_length": 4, "hash_ids": [1, %d]}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "a trace.jsonl"
    path.write_text("".join(MOONCAKE % (i * 500, 2 + i) for i in range(20)))
    return path


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and without bounds unless a test asks: starting others takes a second."""
    monkeypatch.setattr(compare, "bound_available", lambda: False)
    monkeypatch.setattr(options, "usable_cores", lambda: 1)


@pytest.fixture
def bound_of_80_percent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A bound that is always 0.8, and the set-ups that it was computed for."""
    asked: list[Any] = []

    def ttft_bound(rows: Any, setup: Any, time_limit_s: float) -> bound.Bound:
        asked.append((len(rows), setup.ttft_ms, setup.seed, time_limit_s))
        return bound.Bound(0.8, "made up", exact=False, gap=0.1, seconds=0.0)

    monkeypatch.setattr(bound, "ttft_bound", ttft_bound)
    monkeypatch.setattr(compare, "bound_available", lambda: True)
    return asked


def report(path: Path) -> Any:
    return json.loads(path.read_text())


def runs_of(argv: str, out: Path) -> list[dict[str, Any]]:
    assert main([*argv.split(), "--json", str(out)]) == 0
    runs: list[dict[str, Any]] = report(out)["runs"]
    return runs


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
    assert runs[0]["ttft_bound"] is None and runs[0]["share_of_bound"] is None
    assert report(out)["setup"]["simulated"] is True


def test_several_slo_settings_share_the_trace_and_the_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "--generate 40 --rate 30 --seed 4,5 --slo 2000:100,10/5000/30000:50 --policies fcfs,edf"
    runs = runs_of(argv, tmp_path / "out.json")
    assert [(run["slo"]["tpot_ms"], run["seed"], run["policy"]) for run in runs] == [
        (tpot, seed, policy) for tpot in (100, 50) for seed in (4, 5) for policy in ("fcfs", "edf")
    ]
    assert [run["slo"]["ttft_ms"] for run in runs] == [[2000.0]] * 4 + [[10.0, 5000.0, 30000.0]] * 4
    assert runs[0]["rate"] == runs[4]["rate"] != runs[2]["rate"]
    # The same trace under fcfs, whatever the promise: only what counts as met differs.
    assert runs[0]["ttft_p99_ms"] == runs[4]["ttft_p99_ms"]
    assert runs[0]["ttft_attainment"] > runs[4]["ttft_attainment"]
    assert "TTFT 10/5000/30000 ms, TPOT 50 ms" in capsys.readouterr().out


def test_the_bound_is_found_once_per_trace_slo_and_seed(
    bound_of_80_percent: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "--generate 30 --seed 1,2 --slo 30:50,35:50 --policies fcfs,kairos --bound-seconds 7"
    runs = runs_of(argv, tmp_path / "out.json")
    assert bound_of_80_percent == [
        (30, (ttft,), seed, 7.0) for ttft in (30.0, 35.0) for seed in (1, 2)
    ]
    assert len(runs) == 8
    for run in runs:
        assert run["ttft_bound"] == 0.8
        assert 0 < run["ttft_attainment"] < 0.8
        assert run["share_of_bound"] == pytest.approx(run["ttft_attainment"] / 0.8)
    shown = capsys.readouterr().out
    assert "at most 80.0 % of TTFT targets can be met (or fewer; made up); % of that: fcfs" in shown


def test_the_shipped_bound_is_not_exceeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "bound_available", lambda: True)
    argv = "--generate 60 --rate 60 --ttft-ms 150 --policies fcfs,kairos --times law"
    for run in runs_of(argv, tmp_path / "out.json"):
        assert run["ttft_attainment"] <= run["ttft_bound"] <= 1
        assert run["bound_exact"] is True and 0 < run["share_of_bound"] <= 1


def test_no_bound_turns_it_off(bound_of_80_percent: list[Any], tmp_path: Path) -> None:
    runs = runs_of("--generate 9 --policies fcfs --no-bound", tmp_path / "out.json")
    assert runs[0]["ttft_bound"] is None and not bound_of_80_percent


def test_asking_for_a_bound_without_scipy_names_the_extra(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--generate", "5", "--bound"])
    assert '--bound needs scipy: pip install "sglang-kairos[sim]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "shape"),
    [
        ("", {}),
        ("--tail standard", {}),
        ("--tail lighter", {"sigma_input": 0.9, "sigma_output": 0.5}),
        ("--tail lighter --sigma-input 0", {"sigma_input": 0.0, "sigma_output": 0.5}),
        ("--median-output 7 --max-input 500", {"median_output": 7.0, "max_input": 500}),
    ],
)
def test_the_tail_of_made_traces_is_a_preset_with_exceptions(
    argv: str, shape: dict[str, float]
) -> None:
    args = compare.parser().parse_args([*argv.split(), "--generate", "50"])
    wanted: Any = shape
    assert options.TraceSource(args).rows(2.0, 3) == traces.long_tail(50, 2.0, 3, **wanted)


def test_heavier_tails_have_longer_prompts() -> None:
    longest = []
    for tail in ("lighter", "standard", "heavier"):
        args = compare.parser().parse_args(["--tail", tail])
        rows = options.TraceSource(args).rows(1.0, 0)
        longest.append(max(row.input_tokens for row in rows))
    assert longest == sorted(longest) and longest[0] < longest[2]


def test_a_system_by_law_is_the_built_in_one() -> None:
    args = compare.parser().parse_args(["--times", "law"])
    assert options.system_of(args) is options.SYSTEMS["minimax-m2.5-h200-tp4"]


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
        ("--policies fcfs,fastest", "unknown policy 'fastest'; known: edf, fcfs"),
        ("--rate 0", "--rate must be a number between 1e-06 and 1e+06, got '0'"),
        ("--rate nan", "got 'nan'"),
        ("--ttft-ms -5", "--ttft-ms must be a number between 1 and 3.6e+06, got '-5'"),
        ("--tpot-ms x", "--tpot-ms must be a number between 0.1 and 600000, got 'x'"),
        ("--prefill 0", "must be a whole number between 1 and 1024, got '0'"),
        ("--limit 5", "--limit needs --trace"),
        ("--jobs 0", "--jobs must be a whole number between 1 and 1024, got '0'"),
        ("--slo 2000", "--slo must be TTFT:TPOT in ms"),
        ("--slo 2000:100,0:5", "--slo TTFT must be a number between 1 and 3.6e+06, got '0'"),
        ("--slo 2000:", "--slo TPOT must be a number between 0.1 and 600000, got ''"),
        ("--slo 9:9,9:9", "--slo names a value twice"),
        ("--policies fcfs,fcfs", "--policies names a value twice: 'fcfs,fcfs'"),
        ("--sigma-input 9", "--sigma-input must be a number between 0 and 5, got '9'"),
        ("--max-output 0", "--max-output must be a whole number between 1 and 10000000, got '0'"),
        ("--bound-seconds 0", "--bound-seconds must be a number between 0.1 and 86400, got '0'"),
        ("--tail fat", "invalid choice: 'fat'"),
        ("--times guessed", "invalid choice: 'guessed'"),
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
    ("argv", "says"),
    [
        ("--trace t --tail heavier --max-input 9", "--tail, --max-input: only for made requests"),
        ("--slo 9:9 --ttft-ms 5", "leave --ttft-ms and --tpot-ms out"),
        ("--slo 9:9 --tpot-ms 5", "leave --ttft-ms and --tpot-ms out"),
        ("--json no/such/folder/out.json", "--json no/such/folder/out.json: cannot be written"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_anything_runs(
    argv: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ([], ["plan"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, *argv.split()])
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


def test_a_folder_where_the_report_should_go_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--generate", "5", "--policies", "fcfs", "--json", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be written: Is a directory" in capsys.readouterr().err


def test_an_interrupted_run_says_so_and_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_grid", interrupted)
    assert main(["--generate", "5"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("simulations") as show:
        assert show is not None
        show(3, 8)
        assert "3/8" in sys.stderr.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("stream", "missing"), [(io.StringIO, False), (Terminal, True)])
def test_nothing_is_shown_off_a_terminal_or_without_tqdm(
    stream: type[io.StringIO], missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    if missing:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar("simulations") as show:
        assert show is None
