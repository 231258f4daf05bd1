"""``kairos TOOL``: dispatches to the tools, and to nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos import cli


@pytest.mark.parametrize("name", cli.TOOLS)
def test_every_tool_is_there_and_takes_the_words_after_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    module = importlib.import_module(cli.TOOLS[name][0])
    monkeypatch.setattr(module, "main", lambda argv: seen.append(argv) or 3)
    assert cli.main([name, "--flag", "x"]) == 3
    assert seen == [["--flag", "x"]]


def test_a_tool_that_returns_nothing_has_ended_well(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = SimpleNamespace(main=lambda argv: None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: tool)
    assert cli.main(["report"]) == 0


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["reprot"], 2)])
def test_without_a_tool_it_names_them(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == code
    said = capsys.readouterr()
    assert all(name in said.out + said.err for name in cli.TOOLS)
    assert ("reprot: no such tool" in said.err) == ("reprot" in words)


def test_the_console_script_is_this_main(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"kairos": "sglang_kairos.cli:main"}


def test_a_tool_imports_no_other_tool() -> None:
    code = "import sys; from sglang_kairos import cli; cli.main(['--help']); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in run.stdout.split() if name.startswith("sglang_kairos.tools")]
