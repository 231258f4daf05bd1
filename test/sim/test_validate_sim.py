"""The validation's arithmetic and its recorder, without servers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from benchmark.experiments import validate_sim
from benchmark.experiments.validate_sim import JudgedTurn
from benchmark.harness import page as pages
from benchmark.harness import step_recorder
from benchmark.harness.page import BEGIN, END

from sglang_kairos.loads.replay import OK, Outcome, Result
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.sim.calibrate.calibrate import Calibration, MachinePace
from sglang_kairos.sim.calibrate.recording import DecodeStep, PrefillStep, read_record

EVEN = MachinePace((1.0,), (1.0,))
CALIBRATION = Calibration(
    PrefillLatency(1, 0, 0), DecodeLatency(1, 0, 0), EVEN, EVEN, 0.0, 0.0, 0.0
)
SETUP = {"platform": "CPU", "judged": "4 requests", "ttft_ms": 1e3, "tpot_ms": 50, "sim_seeds": 2}


def result(ttfts_ms: list[float], tpot_ms: float = 40.0) -> Result:
    """Answered requests with targets of 1 s and 50 ms."""
    return Result(
        [
            Outcome(
                *(index, 0.0, 0.0, 10, 11, 1000.0, 50.0, OK, ""),
                first_token_s=ttft / 1e3,
                last_token_s=(ttft + 10 * tpot_ms) / 1e3,
                output_tokens=11,
            )
            for index, ttft in enumerate(ttfts_ms)
        ],
        10.0,
    )


TURN = JudgedTurn(
    "fcfs",
    CALIBRATION,
    1.1,
    measured=result([500, 900, 1500, 2500]),
    simulated=[result([500, 900, 950, 2500]), result([500, 1100, 1500, 2500])],
    drifted=[result([500, 900, 1500, 2500], tpot_ms=60.0)],
    servers={},
)


def test_errors_are_simulated_less_measured_points() -> None:
    assert TURN.errors(TURN.simulated) == {"ttft_met": 0.0, "tpot_met": 0.0}
    assert TURN.errors(TURN.simulated[:1]) == {"ttft_met": 25.0, "tpot_met": 0.0}
    assert TURN.errors(TURN.drifted) == {"ttft_met": 0.0, "tpot_met": -100.0}
    assert TURN.spread() == (25.0, 75.0)


def test_the_worst_error_counts_whatever_its_sign() -> None:
    low = replace(TURN, simulated=[result([1500, 1500, 1500, 900])])
    assert validate_sim.worst([TURN, low]) == 25.0


def test_the_table_has_a_cell_for_every_heading() -> None:
    *_, head, rule, first, second = validate_sim.markdown([TURN, TURN], SETUP).splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert "| 50.0 | 50.0 (25–75) | +0.0 | 1.10 |" in first


def test_a_turn_is_plain_json() -> None:
    row = json.loads(json.dumps(TURN.row()))
    assert row["calibration"]["prefill_pace"]["slowdown"] == 1.0
    assert row["measured"]["ttft_p50_ms"] == 1200.0


def test_figures_drop_in_between_the_marks_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for text in ("new", "newer"):
        pages.drop_in(page, text)
        assert page.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"


def test_a_document_without_marks_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        validate_sim.parse([f"--markdown={page}"])
    assert f"--markdown: {page}: needs a line" in capsys.readouterr().err


def batch(decode: bool) -> Any:
    """As much of SGLang's batch as the recorder looks at."""
    stats = SimpleNamespace(wait_queue_entry_time=1.0)
    req = SimpleNamespace(bootstrap_room=7, origin_input_ids=range(30), time_stats=stats)
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: decode),
        reqs=[req],
        seq_lens_cpu=SimpleNamespace(sum=lambda: 31),
        extend_lens=[20],
        prefix_lens=[10],
        after_idle_gap=True,
    )


def test_the_recorder_notes_steps_until_its_gate_goes_and_then_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scheduler:
        disaggregation_mode = SimpleNamespace(value="prefill")

        def run_batch(self, batch: Any) -> str:
            return "result"

    module = ModuleType("scheduler")
    module.Scheduler = Scheduler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", module)
    stock = Scheduler.run_batch
    (tmp_path / step_recorder.GATE).touch()
    step_recorder.install(tmp_path)
    for decode in (False, True):
        assert Scheduler().run_batch(batch(decode)) == "result"
    (tmp_path / step_recorder.GATE).unlink()
    assert Scheduler().run_batch(batch(True)) == "result"
    assert Scheduler.run_batch is stock
    lines = (tmp_path / "prefill.jsonl").read_text().splitlines()
    prefill, decoded = (read_record(json.loads(line)) for line in lines)
    assert isinstance(prefill, PrefillStep) and isinstance(decoded, DecodeStep)
    assert (prefill.new, prefill.prefix, prefill.prompt) == ((20,), (10,), (30,))
    assert (decoded.rooms, decoded.kv, decoded.idle) == ((7,), 31, True)
    assert 0 <= prefill.end_s - prefill.start_s < 1
