"""Benchmarks go on working when what they measure changes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark.experiments import decode_cpu, demo
from benchmark.harness.experiment import Experiment, Trial, alternated
from benchmark.micro import against, decode_cost

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


ROOT = Path(demo.__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), ROOT / "Makefile"]
SOURCES = [*sorted(ROOT.glob("benchmark/**/*.py")), *sorted(ROOT.glob("contrib/**/*.py"))]
COMMAND = re.compile(r"(?:-m |bash )((?:benchmark|contrib)[./][\w./]+\w)")


def commands() -> list[str]:
    """Modules and scripts that pages, recipes and docstrings start, without those SGLang has."""
    texts = [path.read_text("utf-8") for path in (*PAGES, *SOURCES)]
    return sorted({found for text in texts for found in COMMAND.findall(text)})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_docs_answers_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.endswith(".sh"):
        assert (ROOT / command).is_file()
        return
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    module = importlib.import_module(command)
    # A recorder is the server itself, and its help is the server's.
    if not command.endswith("_recorder"):
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0
        assert "--help" in capsys.readouterr().out


def test_the_docs_start_every_benchmark() -> None:
    rooms = [ROOT / "benchmark" / room for room in ("experiments", "micro")]
    names = {path.stem for room in rooms for path in room.glob("*.py")}
    parts = {"__init__", "results_page", "results_traces", "echo_pd"}  # no benchmarks themselves
    assert names - parts == {one.rpartition(".")[2] for one in commands()} & names
    assert f"-m {demo.__name__} " in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    "command",
    [
        *(["-m", f"benchmark.{name}"] for name in ("demo", "router_cpu", "router_overhead")),
        ["-m", "benchmark.gpu.pack"],
        ["benchmark/demo.py"],
    ],
)
def test_an_old_name_works_and_tells_the_new_one(command: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": "python"}
    found = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "--out" in found.stdout
    assert "is now" in found.stderr


class Noted(Experiment):
    """Notes its trials, with two loads."""

    def loads(self) -> list[float]:
        return [0.5, 1.0]

    def measure(self, trial: Trial) -> None:
        self.runs.append(Row(trial))


class Row:
    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def row(self) -> list[object]:
        return [self.trial.name, self.trial.load, self.trial.turn]


def test_an_experiment_takes_turns_and_keeps_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    given = argparse.Namespace(policies=["a", "b"], repeat=2, json=file)
    Noted(given).run()
    one = [["1-a", 0.5, 0], ["2-b", 0.5, 0], ["3-b", 0.5, 1], ["4-a", 0.5, 1]]
    two = [["5-a", 1.0, 0], ["6-b", 1.0, 0], ["7-b", 1.0, 1], ["8-a", 1.0, 1]]
    assert json.loads(file.read_text()) == {"runs": [*one, *two], "setup": {}}
    assert alternated("abc", 3) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_no_class_name_is_there_twice() -> None:
    files = [*SOURCES, *ROOT.glob("python/**/*.py")]
    names = [
        n for path in files for n in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.M)
    ]
    ours = [
        n for path in SOURCES for n in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.M)
    ]
    assert [name for name in ours if names.count(name) > 1] == []


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
    assert "holds no benchmark/micro/decode_cost.py" in capsys.readouterr().err
