"""Tables, JSON and pictures of runs; upstream's benchmark record in the same terms."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.upstream import upstream_goodput
from sglang_kairos.loads.replay import Metrics, Outcome, Result
from sglang_kairos.reports import report
from sglang_kairos.reports.bench_serving import from_bench_record
from sglang_kairos.reports.outcomes import Targets
from sglang_kairos.reports.report import Run

KEYS = [
    "ttft_attainment",
    "tpot_attainment",
    "e2e_attainment",
    "goodput_rps",
    "decode_tokens_per_s",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p99_ms",
    "longest_wait_ms",
    "sent",
    "failed",
]


def result(ttft_ms: float, n: int = 20) -> Result:
    outcomes = [
        Outcome(
            i,
            planned_s=i,
            sent_s=i,
            input_tokens=100 * (i + 1),
            asked_tokens=11,
            ttft_slo_ms=1000.0,
            tpot_slo_ms=50.0,
            status="ok" if i else "timeout",
            first_token_s=i + ttft_ms * (i + 1) / 1e3,
            last_token_s=i + ttft_ms * (i + 1) / 1e3 + 0.1,
            ended_s=i + 5.0,
            output_tokens=11 if i else 0,
        )
        for i in range(n)
    ]
    return Result(outcomes, 10.0)


def test_a_run_has_exactly_these_keys() -> None:
    assert [item.name for item in fields(Metrics)] == KEYS
    assert list(report.COLUMNS) == KEYS
    assert list(Run("fcfs", result(10.0)).row()) == ["policy", *KEYS]


def test_table_of_single_runs() -> None:
    lines = report.table([Run("fcfs", result(100.0)), Run("kairos", result(10.0))], "CPU").split(
        "\n"
    )
    assert lines[0] == "CPU"
    assert lines[1].split()[:3] == ["policy", "TTFT", "met"]
    assert [line.split()[:2] for line in lines[3:]] == [["fcfs", "45.0"], ["kairos", "95.0"]]
    assert len({len(line) for line in lines[1:]}) == 1


def test_table_of_repeats_gives_mean_and_spread() -> None:
    runs = [Run("fcfs", result(100.0)), Run("fcfs", result(10.0)), Run("hrrn", result(10.0))]
    text = report.table(runs)
    assert "fcfs (mean of 2)" in text
    rows = {line.split()[0]: line.split() for line in text.split("\n")}
    assert rows["fcfs"][4] == "70.0"
    assert rows["lowest"][1] == "45.0"
    assert rows["highest"][1] == "95.0"


def test_nothing_answered_still_makes_a_table_json_and_picture(tmp_path: Path) -> None:
    run = Run("fcfs", Result(result(10.0).outcomes[:1], 1.0))
    assert " - " in report.table([run])
    report.write_json(tmp_path / "r.json", [run])
    row = json.loads((tmp_path / "r.json").read_text())["runs"][0]
    assert (row["ttft_p50_ms"], row["failed"]) == (None, 1)
    pytest.importorskip("matplotlib")
    report.write_png(tmp_path / "r.png", [run], "CPU")


def test_json_and_picture(tmp_path: Path) -> None:
    runs = [Run("fcfs", result(100.0)), Run("fcfs", result(90.0)), Run("kairos", result(10.0))]
    report.write_json(tmp_path / "r.json", runs, {"platform": "CPU"})
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["setup"] == {"platform": "CPU"}
    assert [row["policy"] for row in written["runs"]] == ["fcfs", "fcfs", "kairos"]
    pytest.importorskip("matplotlib")
    report.write_png(tmp_path / "r.png", runs, "CPU, two runs")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def bench_outputs() -> list[Any]:
    """As upstream's RequestFuncOutput: two that met, one too slow, one failed."""
    return [
        SimpleNamespace(success=True, ttft=0.5, itl=[0.02] * 10, output_len=11, error=""),
        SimpleNamespace(success=True, ttft=1.2, itl=[0.02] * 10, output_len=11, error=""),
        SimpleNamespace(success=True, ttft=0.1, itl=[], output_len=1, error=""),
        SimpleNamespace(success=False, ttft=0.0, itl=[], output_len=11, error="Not Found: x"),
    ]


def bench_record(**more: Any) -> dict[str, Any]:
    outputs = bench_outputs()
    return {
        "duration": 4.0,
        "input_lens": [100] * 4,
        "output_lens": [o.output_len if o.success else 0 for o in outputs],
        "ttfts": [o.ttft for o in outputs],
        "itls": [o.itl for o in outputs],
        "errors": [o.error for o in outputs],
        **more,
    }


def test_bench_record_agrees_with_upstream() -> None:
    slos = {"ttft": 1000.0, "tpot": 30.0}
    metrics = from_bench_record(bench_record(goodput_slos_ms=slos), Targets()).metrics
    assert metrics.ttft_attainment == 0.5
    assert metrics.tpot_attainment == 0.75
    assert (metrics.e2e_attainment, metrics.goodput_rps, metrics.failed) == (0.5, 0.5, 1)
    assert metrics.decode_tokens_per_s == 23 / 4
    goodput = upstream_goodput()
    outputs = bench_outputs()
    for output in outputs:
        output.latency = output.ttft + sum(output.itl)
    theirs = goodput.calculate_goodput(outputs, slos, 4.0)
    assert theirs.slo_attainment == metrics.e2e_attainment
    assert theirs.request_goodput == metrics.goodput_rps


def test_bench_record_with_other_targets_or_none() -> None:
    assert from_bench_record(bench_record(), Targets()).metrics.e2e_attainment == 0.75
    tight = from_bench_record(bench_record(goodput_slos_ms={"ttft": 1.0}), Targets(600.0))
    assert tight.metrics.ttft_attainment == 0.5
    record = bench_record()
    del record["itls"]
    with pytest.raises(ValueError, match="no itls: run SGLang's benchmark with --output-details"):
        from_bench_record(record, Targets())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(100.0).dump(tmp_path / "fcfs.jsonl")
    (tmp_path / "bench.jsonl").write_text(json.dumps(bench_record()) + "\n")
    argv = [str(tmp_path / "fcfs.jsonl"), str(tmp_path / "bench.jsonl"), "--ttft-ms", "600"]
    assert report.main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert [(row["policy"], row["ttft_attainment"]) for row in rows] == [
        ("fcfs", 0.25),
        ("bench", 0.5),
    ]
    assert "bench" in capsys.readouterr().out
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    assert report.main([str(tmp_path / "bad.jsonl")]) == 2
    assert report.main([str(tmp_path / "missing")]) == 2
