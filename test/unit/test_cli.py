"""``kairos COMMAND``: dispatches to the commands, and imports nothing else."""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos import cli, commands, completion, launch_server
from sglang_kairos.commands import COMMANDS
from sglang_kairos.config import add_flags
from sglang_kairos.names import RENAMED

CALLED = [name for name, command in COMMANDS.items() if not command.as_main]
# What a user says that is no flag of the parser: SGLang's own.
SERVERS_OWN = {"--model-path", "Qwen/Qwen3-8B", "--disaggregation-mode", "prefill", "--tp", "2"}


@pytest.mark.parametrize("name", CALLED)
def test_every_command_is_there_and_takes_the_words_after_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    module = importlib.import_module(COMMANDS[name].module)
    monkeypatch.setattr(module, "main", lambda argv: seen.append(argv) or 3)
    assert cli.main([name, "--flag", "x"]) == 3
    assert seen == [[*COMMANDS[name].first, "--flag", "x"]]


def test_a_server_runs_as_python_m_runs_it_for_its_spawned_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["kairos"])
    monkeypatch.setattr(
        cli.runpy, "run_module", lambda module, **how: ran.append((module, how, sys.argv[1:]))
    )
    assert cli.main(["serve", "--port", "1"]) == 0
    how = {"run_name": "__main__", "alter_sys": True}
    assert ran == [("sglang_kairos.launch_server", how, ["--port", "1"])]


def test_a_command_that_returns_nothing_has_ended_well(monkeypatch: pytest.MonkeyPatch) -> None:
    command = SimpleNamespace(main=lambda argv: None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: command)
    assert cli.main(["report"]) == 0


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["reprot"], 2)])
def test_without_a_command_it_names_them(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == code
    said = capsys.readouterr()
    assert all(f"  {name} " in said.out + said.err for name in COMMANDS)
    assert ("reprot: no such command" in said.err) == ("reprot" in words)


def test_the_console_script_is_this_main(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"kairos": "sglang_kairos.cli:main"}


def test_a_command_imports_no_other_command() -> None:
    code = "import sys; from sglang_kairos import cli; cli.main(['--help']); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Where there is no GPU, Python's start-up hook has imported the CPU's part.
    ours = [
        name
        for name in run.stdout.split()
        if name.startswith("sglang_kairos.") and not name.startswith("sglang_kairos.cpu")
    ]
    assert sorted(ours) == ["sglang_kairos.cli", "sglang_kairos.commands"]


def test_the_package_itself_runs_as_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "sglang_kairos", "cpu", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert run.stdout.startswith("usage: kairos cpu ")


@pytest.fixture
def _without_sglangs_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang takes 20 s to import: of the server's flags Kairos' own are enough here."""

    def kairos_flags() -> argparse.ArgumentParser:
        parser = commands.parser_of("serve", add_help=False)
        add_flags(parser)
        return parser

    monkeypatch.setattr(launch_server, "build_parser", kairos_flags)


@pytest.mark.usefixtures("_without_sglangs_flags")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command_and_its_example_parses(name: str) -> None:
    command, parser = COMMANDS[name], completion.parser_named(name)
    shown = parser.format_help()
    assert shown.startswith(f"usage: kairos {name} ")
    assert commands.command_line(name) in shown
    assert (f"python -m {command.module}" in shown) == command.as_module
    words = shlex.split(command.example.partition(" >")[0])
    _, rest = parser.parse_known_args(words)
    assert set(rest) <= (SERVERS_OWN if name in ("serve", "pd") else set())


def test_every_module_that_can_be_run_is_a_command(repo_root: Path) -> None:
    package = repo_root / "python" / "sglang_kairos"
    runnable = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in package.rglob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text("utf-8")
    }
    old = {row.old.removeprefix("python -m ") for row in RENAMED if row.kind == "command"}
    inner = {"sglang_kairos.cli", "sglang_kairos.__main__", "sglang_kairos.cpu.zygote"}
    assert runnable - old - inner <= {command.module for command in COMMANDS.values()}
    assert old <= runnable


@pytest.mark.parametrize("row", [row for row in RENAMED if row.kind == "command"], ids=str)
def test_an_old_command_says_its_new_name_and_runs_it(row: Any) -> None:
    words = row.old.removeprefix("python ").split()
    run = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith(f"usage: {row.new} ")
    assert run.stderr.count(row.new) == 1 and row.old in run.stderr


@pytest.mark.usefixtures("_without_sglangs_flags")
def test_completion_knows_every_command_and_its_flags() -> None:
    commands_there = completion.whole_parser()._subparsers
    assert commands_there is not None
    (choices,) = (action.choices for action in commands_there._group_actions)
    assert isinstance(choices, dict) and set(choices) == set(COMMANDS)
    assert "--prefill-policy" in choices["router"].format_help()
    assert "--kairos-late-share" in choices["pd"].format_help()


@pytest.mark.usefixtures("_without_sglangs_flags")
def test_completion_prints_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert completion.main(["bash"]) == 0
    said = capsys.readouterr().out
    assert "complete " in said and "--prefill-policy" in said


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert completion.main(["bash"]) == 1
    assert "sglang-kairos[completion]" in capsys.readouterr().err
