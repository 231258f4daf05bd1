"""Benchmarks go on working when what they measure changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchmark import against, decode_cost, decode_cpu, demo

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.reports.report import Run
from sglang_kairos.versions import patch


def test_the_cost_of_decode_decisions_can_be_measured() -> None:
    rows = decode_cost.measure(256, rounds=2)
    assert [row["what"] for row in rows] == ["select", "choose", "admit", "membership", "all fit"]
    assert all(row["median_us"] > 0 for row in rows)
    assert [row["bound_us"] for row in rows] == [100.0, *[None] * 4]


def test_the_decode_table_has_the_mean_and_the_range_of_every_cell() -> None:
    def run(policy: str, last_token_s: float) -> Run:
        outcome = Outcome(0, 0.0, 0.0, 10, 10, 1000.0, 50.0, "ok", "", 0.1, last_token_s, 2.0, 10)
        outcome.itls_ms = [20.0, 80.0]
        result = Result([outcome], 2.0)
        facts = {"slo": {"tpot_ms": 50.0}, "load": 1.3, "window_tokens_per_s": 700.0}
        return Run(policy, result, {**facts, **decode_cpu.silences_ms(result)})

    table = decode_cpu.markdown([run("stock", 1.5), run("kairos", 0.5), run("kairos", 1.5)])
    *_, stock, kairos = table.splitlines()
    assert stock.startswith("| 50 ms | 1.3 | stock | 100.0 % | 0.0 % | 0.0 % | 700 |")
    assert "| 50.0 (0.0–100.0) % |" in kairos and kairos.endswith("80 (80–80) ms |")


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_the_demo_compares_the_policies_that_the_version_has(
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = sglang_folder(version)
    stock = ["fcfs"] + ["hrrn"] * (version >= "0.5.20")
    stock += ["shortest-prefill-first"] * (version >= "0.5.21")
    policies = [*stock, "kairos"]
    used: list[str] = []
    monkeypatch.setattr(demo, "use", used.append)
    monkeypatch.setattr(demo, "find_tree", lambda: patch.find_tree(folder))
    assert demo.parse(["--sglang", version]).policies == policies
    assert used == [version]
    with pytest.raises(SystemExit):
        demo.parse(["--policies", "lpm"])
    assert f"this SGLang has: {', '.join(policies)}" in capsys.readouterr().err


def test_the_demo_starts_as_make_starts_it() -> None:
    root = Path(demo.__file__).parents[1]
    command = [sys.executable, "benchmark/demo.py", "--help"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert "--utilisation" in found.stdout


def test_before_and_after_are_compared_by_name_run_by_run() -> None:
    before = [
        {"rows": [{"what": "select", "running": 256, "us": us, "note": "x"}]} for us in (8, 4)
    ]
    after = [{"rows": [{"what": "select", "running": 256, "us": us}], "new": 1} for us in (2, 4)]
    sides = [[dict(against.figures(report)) for report in side] for side in (before, after)]
    assert against.compare(*sides) == {
        "rows[select 256].running": dict.fromkeys(["before", "after"], 256)
        | dict.fromkeys(["ratio", "least", "most"], 1),
        "rows[select 256].us": {"before": 6, "after": 3, "ratio": 0.5, "least": 0.25, "most": 1},
    }


def test_a_tree_without_the_benchmark_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        against.main([str(tmp_path), "decode_cost", "--", "--rounds", "1"])
    assert "holds no benchmark/decode_cost.py" in capsys.readouterr().err
