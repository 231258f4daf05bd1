"""Results of load generators: what failed counts as failed, and a wrong file is told apart."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.loads.replay import Result
from sglang_kairos.reports import report
from sglang_kairos.reports.bench_serving import from_bench_record
from sglang_kairos.reports.formats import Reading, read_results
from sglang_kairos.reports.outcomes import ABORTED, Targets

TARGETS = Targets(500.0, 50.0)
# What each tool itself wrote of seven answers of a stand-in server, trimmed: a whole one of five
# tokens, one of one token; ended by the server inside a 200 before its first token, after its third
# with an error event, after its third with finish_reason "abort"; torn after its third; a 503.
RECORDED = Path(__file__).parent / "data" / "load_generators"
FILES = {
    "sglang.benchmark.serving": "bench.jsonl",
    "GuideLLM": "guidellm.json",
    "aiperf": "profile_export.jsonl",
    "inference-perf": "per_request_lifecycle_metrics.json",
}


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
    metrics = from_bench_record(bench(), TARGETS).metrics
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
    metrics = from_bench_record(record, TARGETS).metrics
    assert (metrics.failed, metrics.e2e_attainment) == (1, 0.0)


def test_lists_of_different_lengths_are_no_run() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        from_bench_record(bench(errors=[""]), TARGETS)


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
        "computed_metrics": {"ttft_slo_sec": 0.2},
    },
    {"start_time": 101.0, "end_time": 101.5, "info": {}, "error": {"error_type": "reset"}},
]


@pytest.mark.parametrize("content", [GUIDE, AIPERF, PERF], ids=["GuideLLM", "aiperf", "inference"])
def test_other_tools_results_are_read_in_our_terms(content: Any, tmp_path: Path) -> None:
    (run,) = read_results(written(tmp_path / "r", content), TARGETS).results
    good, bad = run.outcomes
    assert (good.ttft_ms, good.tpot_ms) == pytest.approx((300.0, 20.0))
    assert good.sent_s == 0.0 and bad.sent_s == pytest.approx(1.0)
    assert run.metrics.failed == 1
    assert run.metrics.e2e_attainment == 0.5


def test_a_target_in_the_file_counts_unless_another_is_given(tmp_path: Path) -> None:
    (run,) = read_results(written(tmp_path / "r", PERF), Targets()).results
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
        ({"benchmarks": []}, "file holds no requests"),
        ('{"metadata": {}, "metrics": {}}', "record.0. has no metadata.request_start_ns"),
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
    (result,) = read_results(path, Targets(600.0, 25.0)).results
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
    (result,) = read_results(path, Targets(600.0, 25.0)).results
    assert [outcome.status for outcome in result.outcomes] == ["ok", "error"]
    assert result.duration_s == pytest.approx(2.0)
    written(path, [warm_up])
    with pytest.raises(ValueError, match="holds no requests but those of its warm-up"):
        read_results(path, Targets())


TIMES, LENGTH = "output_token_times", "output_sequence_length"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"request_throughput": 3, "duration": 2},
            "no ttfts, .*: run SGLang's benchmark with --output-details",
        ),
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
            bench(goodput_slos_ms={"ttft": "soon"}),
            r"record.goodput_slos_ms.ttft must be a finite number from 0 on, got 'soon'",
        ),
        ({"benchmarks": [{"requests": {"errored": 3}}]}, "requests.errored must be a list, got 3"),
        ({"benchmarks": [3]}, r"benchmarks\[0\] must be an object, got 3"),
        (
            [{"start_time": 1.0, "end_time": 2.0, "info": {"response_metrics": {"x": 1}}}],
            "run it with api.streaming: true",
        ),
        (
            [{"start_time": 1.0, "end_time": 2.0, "info": {"response_metrics": {TIMES: ["a"]}}}],
            r"request\[0\].info.response_metrics.output_token_times must be a finite number",
        ),
        (
            [{"metadata": {"request_start_ns": 1}, "metrics": {LENGTH: {"value": 3}}}],
            r"record\[0\] has no metrics.time_to_first_token: run aiperf with --streaming",
        ),
        (
            [{"metadata": {"request_start_ns": 1}, "metrics": {LENGTH: {"value": "3"}}}],
            r"record\[0\].metrics.output_sequence_length.value must be .* got '3'",
        ),
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
    assert "names no target" not in capsys.readouterr().err


def recorded(tool: str, targets: Targets | None = None, **more: Any) -> Reading:
    return read_results(RECORDED / FILES[tool], targets or Targets(), **more)


@pytest.mark.parametrize("tool", FILES)
def test_of_seven_recorded_answers_two_were_whole(tool: str) -> None:
    # SGLang's benchmark recorded a run of five tokens each: of its file, the short one was cut off.
    whole = 1 if tool == "sglang.benchmark.serving" else 2
    ((result,), notes) = (reading := recorded(tool)).results, reading.notes
    assert (result.metrics.sent, result.metrics.failed) == (7, 7 - whole)
    answered = sorted((o for o in result.outcomes if o.ok), key=lambda o: -o.output_tokens)
    assert [outcome.output_tokens for outcome in answered] == [5, 1][:whole]
    # The stand-in waits 30 ms before its first token and 10 ms before each other one.
    assert 30 < answered[0].ttft_ms < 45
    assert 10 < answered[0].tpot_ms < 14
    assert {(o.ttft_slo_ms, o.tpot_slo_ms) for o in answered} == {(800.0, 40.0)}
    assert notes[0].startswith(f"TPOT of {tool} is ")


@pytest.mark.parametrize(
    ("tool", "thought_done"),
    [("sglang.benchmark.serving", 4), ("GuideLLM", 1), ("aiperf", 2), ("inference-perf", 3)],
)
def test_what_was_ended_inside_a_200_has_failed_whatever_its_tool_thought(
    tool: str, thought_done: int
) -> None:
    reading = recorded(tool)
    (result,) = reading.results
    assert sum(outcome.status == ABORTED for outcome in result.outcomes) == thought_done
    assert not any(o.met_ttft or o.met_tpot for o in result.outcomes if not o.ok)
    assert any(note.startswith(f"{thought_done} of 7 answers") for note in reading.notes)
    # Who says that short answers may end by themselves gets back those that only look short.
    kept = {"sglang.benchmark.serving": 4, "GuideLLM": 3, "aiperf": 4, "inference-perf": 2}[tool]
    (lenient,) = recorded(tool, Targets(short_answers="ok")).results
    assert sum(outcome.ok for outcome in lenient.outcomes) == kept


@pytest.mark.parametrize(
    ("tool", "met"),
    [("GuideLLM", (True, True)), ("aiperf", (True, False)), ("inference-perf", (False, False))],
)
def test_an_answer_of_one_token_counts_as_its_tool_counts_it(
    tool: str, met: tuple[bool, bool]
) -> None:
    def single(**more: Any) -> Any:
        (result,) = recorded(tool, **more).results
        (found,) = (one for one in result.outcomes if one.output_tokens == 1)
        return found

    assert (single().met_ttft, single().met_tpot) == met
    ours = single(one_token_as_tool=False)
    assert ours.met_ttft and ours.met_tpot
    unjudged = single(targets=Targets(math.inf, math.inf))
    assert unjudged.met_ttft and unjudged.met_tpot, "no target, nothing to miss"
    text = "missed" if False in met else "no TPOT, which counts as met"
    assert any("answers of one token (1)" in note and text in note for note in recorded(tool).notes)


def test_aiperf_without_its_settings_cannot_tell_short_from_cut_off(tmp_path: Path) -> None:
    alone = written(tmp_path / "profile_export.jsonl", (RECORDED / FILES["aiperf"]).read_text())
    reading = read_results(alone, TARGETS)
    assert sum(outcome.ok for outcome in reading.results[0].outcomes) == 4
    assert any("leave its files side by side" in note for note in reading.notes)
    strict = read_results(alone, Targets(500.0, 50.0, "failed"))
    assert sum(outcome.ok for outcome in strict.results[0].outcomes) == 2
    written(tmp_path / "profile_export_aiperf.json", "{")
    with pytest.raises(ValueError, match=r"profile_export_aiperf\.json beside it is not JSON"):
        read_results(alone, TARGETS)


def test_tokens_are_counted_by_the_server_where_it_told_them() -> None:
    """aiperf and inference-perf tokenise the text again, and divide by that."""
    record = json.loads(AIPERF.splitlines()[0])
    record["metrics"] |= {
        "usage_completion_tokens": {"value": 6},
        "decode_duration": {"value": 200.0},
    }
    perf = json.loads(json.dumps(PERF[0]))
    perf["info"]["response_metrics"]["server_usage"] = {"completion_tokens": 6}
    for content in ([record], [perf]):
        with tempfile.TemporaryDirectory() as folder:
            path = written(Path(folder) / "r.json", content)
            ((outcome,),) = (one.outcomes for one in read_results(path, TARGETS).results)
        assert (outcome.output_tokens, outcome.tpot_ms) == (6, pytest.approx(40.0))


def test_aiperfs_own_count_is_given_some_room_when_lengths_are_compared(tmp_path: Path) -> None:
    def one(off: float) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(AIPERF.splitlines()[0])
        record["metrics"]["osl_mismatch_diff_pct"] = {"value": off}
        return record

    path = written(tmp_path / "p.jsonl", [one(-8.3), one(-50.0), one(300.0)])
    (result,) = read_results(path, Targets(short_answers="failed")).results
    assert [outcome.ok for outcome in result.outcomes] == [True, False, True]


@pytest.mark.parametrize(
    ("ratio", "lengths", "failed"),
    [(1.0, [8, 7, 1], 2), (0.5, [8, 4, 3], 1), (0.0, [8, 1], 0), (None, [1], 0)],
)
def test_a_random_run_of_sglangs_benchmark_has_answers_of_a_known_length_at_least(
    ratio: float | None, lengths: list[int], failed: int
) -> None:
    count = len(lengths)
    record = bench(
        dataset_name="random-ids",
        random_output_len=8,
        random_range_ratio=ratio,
        ttfts=[0.1] * count,
        itls=[[0.02] * (length - 1) for length in lengths],
        output_lens=lengths,
        input_lens=[9] * count,
        errors=[""] * count,
    )
    assert from_bench_record(record, Targets()).metrics.failed == failed


@pytest.mark.parametrize(
    ("more", "blind"),
    [
        ({"random_range_ratio": 0.5}, True),
        ({"random_range_ratio": 1.0}, False),
        ({"backend": "sglang-oai"}, False),
    ],
)
def test_it_is_said_where_sglangs_benchmark_cannot_tell(
    more: dict[str, Any], blind: bool, tmp_path: Path
) -> None:
    notes = read_results(written(tmp_path / "b.jsonl", bench(**more)), TARGETS).notes
    assert any("look whole in this file" in note for note in notes) == blind


def mutated(document: Any, data: st.DataObject) -> Any:
    """`document` with one value, found at random, replaced by something that is none there."""
    junk = st.sampled_from(
        [None, "x", "", -1, 1e400, math.nan, True, [], {}, [None], [[1]], {"a": 1}]
    )
    if isinstance(document, dict) and document and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(document)))
        return {**document, key: mutated(document[key], data)}
    if isinstance(document, list) and document and data.draw(st.integers(0, 9)):
        at = data.draw(st.integers(0, len(document) - 1))
        return [mutated(one, data) if i == at else one for i, one in enumerate(document)]
    return data.draw(junk)


@pytest.mark.parametrize("tool", FILES)
@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_file_is_read_or_refused_by_an_error_that_says_why(
    tool: str, data: st.DataObject
) -> None:
    text = (RECORDED / FILES[tool]).read_text()
    documents = (
        [json.loads(line) for line in text.splitlines()]
        if FILES[tool].endswith("jsonl")
        else json.loads(text)
    )
    damaged = mutated(documents, data)
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "damaged.json", json.dumps(damaged))
        results: list[Result] = []
        with contextlib.suppress(ValueError):  # and nothing else
            results = read_results(path, TARGETS).results
        assert all(0 <= result.metrics.e2e_attainment <= 1 for result in results)
