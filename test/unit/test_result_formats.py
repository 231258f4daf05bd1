"""Results of load generators: what failed counts as failed, and a wrong file is told apart."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_kairos.tools import report
from sglang_kairos.tools.result_formats import Targets, from_bench_record, read_results

TARGETS = Targets(500.0, 50.0)


def bench(**more: Any) -> dict[str, Any]:
    """A record of SGLang's benchmark: four answered, six aborted inside a 200 stream."""
    return {
        "backend": "sglang",
        "request_throughput": 1.0,
        "duration": 10.0,
        "ttfts": [0.1] * 4 + [0.0] * 6,
        "itls": [[0.02, 0.02]] * 4 + [[]] * 6,
        "output_lens": [3] * 4 + [1] * 6,
        "input_lens": [9] * 10,
        "errors": [""] * 10,
        **more,
    }


def test_a_request_that_was_aborted_inside_a_200_has_failed() -> None:
    metrics = from_bench_record(bench(), 500.0, 50.0).metrics
    assert (metrics.sent, metrics.failed) == (10, 6)
    assert metrics.ttft_attainment == metrics.tpot_attainment == 0.4


@pytest.mark.parametrize(
    "one", [{"ttft": 0.0}, {"ttft": math.nan}, {"ttft": -1.0}, {"output": 0}, {"error": "reset"}]
)
def test_whatever_marks_a_request_as_failed_it_has_missed_both_targets(one: dict[str, Any]) -> None:
    record = bench(
        ttfts=[one.get("ttft", 0.1)],
        itls=[[0.02]],
        output_lens=[one.get("output", 2)],
        input_lens=[9],
        errors=[one.get("error", "")],
    )
    metrics = from_bench_record(record, 500.0, 50.0).metrics
    assert (metrics.failed, metrics.e2e_attainment) == (1, 0.0)


def test_lists_of_different_lengths_are_no_run() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        from_bench_record(bench(errors=[""]))


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GUIDE = {
    "benchmarks": [
        {
            "requests": {
                "successful": [
                    {
                        "request_start_time": 100.0,
                        "request_end_time": 100.5,
                        "time_to_first_token_ms": 300.0,
                        "inter_token_latency_ms": 20.0,
                        "prompt_tokens": 7,
                        "output_tokens": 11,
                    }
                ],
                "errored": [{"request_start_time": 101.0, "prompt_tokens": 7}],
                "incomplete": [],
            }
        }
    ]
}
AIPERF = "".join(
    json.dumps(
        {
            "metadata": {"request_start_ns": 10**11 + at, "request_end_ns": 10**11 + at + 10**8},
            "metrics": {
                "time_to_first_token": {"value": ttft, "unit": "ms"},
                "inter_token_latency": {"value": 20.0, "unit": "ms"},
                "input_sequence_length": {"value": 7},
                "output_sequence_length": {"value": 11},
            },
            "error": error,
        }
    )
    + "\n"
    for at, ttft, error in ((0, 300.0, None), (10**9, 300.0, {"code": 500}))
)
PERF = [
    {
        "start_time": 100.0,
        "end_time": 101.0,
        "info": {"response_metrics": {"output_token_times": [100.3 + 0.02 * i for i in range(11)]}},
        "error": None,
        "ttft_slo_sec": 0.2,
    },
    {"start_time": 101.0, "end_time": 101.5, "info": {}, "error": {"error_type": "reset"}},
]


@pytest.mark.parametrize("content", [GUIDE, AIPERF, PERF], ids=["GuideLLM", "aiperf", "inference"])
def test_other_tools_results_are_read_in_our_terms(content: Any, tmp_path: Path) -> None:
    (run,) = read_results(written(tmp_path / "r", content), TARGETS)
    good, bad = run.outcomes
    assert (good.ttft_ms, good.tpot_ms) == pytest.approx((300.0, 20.0))
    assert good.sent_s == 0.0 and bad.sent_s == pytest.approx(1.0)
    assert run.metrics.failed == 1
    assert run.metrics.e2e_attainment == 0.5


def test_a_target_in_the_file_counts_unless_another_is_given(tmp_path: Path) -> None:
    (run,) = read_results(written(tmp_path / "r", PERF), Targets())
    assert run.metrics.ttft_attainment == 0.0
    assert run.outcomes[0].met_tpot


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "it is empty"),
        ("Timestamp,Model\n1,2\n", "line 1: not JSON"),
        ('{"itls": []}\n{"itls"', "line 2: not JSON"),
        ([1, 2], "must hold JSON objects"),
        ({"session_id": 1}, "known tool .sglang.benchmark.serving, GuideLLM, aiperf"),
        (
            {"backend": "sglang", "request_throughput": 3.2, "duration": 1.0},
            "--output-details",
        ),
        ('{"planned_s": 0, "sent_s": 0, "status": "ok", "odd": 1}', "line 1: .*odd"),
        ({"benchmarks": []}, "no requests in it"),
        ('{"metadata": {}, "metrics": {}}', "no 'request_start_ns'"),
    ],
)
def test_a_wrong_file_is_told_apart(
    content: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "r.jsonl", content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert re.search(text, error), error


def test_guidellm_requests_that_were_never_sent_neither_count_nor_move_the_clock(
    tmp_path: Path,
) -> None:
    answer = {
        "request_start_time": 1.7e9,
        "request_end_time": 1.7e9 + 0.7,
        "time_to_first_token_ms": 500.0,
        "inter_token_latency_ms": 20.0,
        "prompt_tokens": 300,
        "output_tokens": 11,
    }
    nothing = dict.fromkeys(answer)
    requests = {
        "successful": [answer],
        "errored": [nothing],
        "incomplete": [{**answer, "request_start_time": 1.7e9 + 2.0}, nothing],
    }
    path = written(tmp_path / "g.json", {"benchmarks": [{"requests": requests}]})
    (result,) = read_results(path, Targets(600.0, 25.0))
    assert (result.metrics.sent, result.metrics.failed) == (3, 2)
    assert result.duration_s == pytest.approx(2.7)
    assert result.metrics.goodput_rps == pytest.approx(1 / 2.7)


def test_aiperfs_warm_up_does_not_count_and_what_was_cancelled_has_failed(tmp_path: Path) -> None:
    def one(start_ns: int, **more: Any) -> dict[str, Any]:
        metrics = {
            "time_to_first_token": {"value": 500.0, "unit": "ms"},
            "inter_token_latency": {"value": 20.0, "unit": "ms"},
            "input_sequence_length": {"value": 300, "unit": "tokens"},
            "output_sequence_length": {"value": 11, "unit": "tokens"},
        }
        about = {"request_start_ns": start_ns, "request_end_ns": start_ns + 10**9, **more}
        return {"metadata": about, "metrics": metrics, "error": None}

    warm_up = one(1, benchmark_phase="warmup")
    rows = [warm_up, one(5 * 10**9), one(6 * 10**9, was_cancelled=True)]
    path = written(tmp_path / "a.json", rows)
    (result,) = read_results(path, Targets(600.0, 25.0))
    assert [outcome.status for outcome in result.outcomes] == ["ok", "error"]
    assert result.duration_s == pytest.approx(2.0)
    written(path, [warm_up])
    with pytest.raises(ValueError, match="no requests in it but its warm-up's"):
        read_results(path, Targets())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"request_throughput": 3, "duration": 2}, "no ttfts, .*: run it with --output-details"),
        ({"input_config": {}}, "aiperf's summary: give profile_export.jsonl"),
        ({"load_summary": {}}, "give per_request_lifecycle_metrics.json"),
        ({"a": 1}, "known tool .*; its fields: a"),
        (bench(errors=None), "errors must be a list, got None"),
        (bench(output_lens=["x"] * 10), r"output_lens\[0\] must be a finite number"),
        (
            bench(itls=[[float("nan")]] * 10),
            r"itls\[0\] must be a finite number from 0 on, got nan",
        ),
        (bench(duration=float("inf")), "duration must be a finite number"),
        (
            {"benchmarks": [{"requests": {"successful": [{"request_start_time": "now"}]}}]},
            r"successful\[0\].request_start_time must be a finite number from 0 on, got 'now'",
        ),
    ],
)
def test_a_wrong_or_damaged_file_names_its_field_and_what_to_do(
    content: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        read_results(written(tmp_path / "f.json", content), Targets())


def test_a_file_without_targets_is_said_to_have_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "b.json", bench())
    assert report.main([str(path), "--ttft-ms", "600"]) == 0
    assert "it names no target; without --tpot-ms every answer meets it" in capsys.readouterr().err
    assert report.main([str(path), "--ttft-ms", "600", "--tpot-ms", "50"]) == 0
    assert capsys.readouterr().err == ""
