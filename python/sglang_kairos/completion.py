"""``kairos completion``: a script that completes ``kairos`` in a shell. Needs `shtab`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from sglang_kairos.commands import COMMANDS, parser_of

SHELLS = ("bash", "zsh", "tcsh")
DESCRIPTION = """\
Print a script that completes the commands of kairos and their flags.
It holds the flags of this moment: write it anew after an update.
"""
# Where a command's flags are, if not in `build_parser` of its module.
_ELSEWHERE = {
    "sim": "sglang_kairos.sim.cli.compare:parser",
    "plan": "sglang_kairos.sim.cli.plan:parser",
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos completion``."""
    parser = parser_of("completion", description=DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script. Returns 1 without `shtab`."""
    shell = build_parser().parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        print('error: needs shtab: pip install "sglang-kairos[completion]"', file=sys.stderr)
        return 1
    print(shtab.complete(whole_parser(), shell=shell))
    return 0


def parser_named(name: str) -> argparse.ArgumentParser:
    """The parser of ``kairos NAME``. Of `serve` without SGLang's flags where there is no SGLang."""
    command = COMMANDS[name]
    module, _, function = _ELSEWHERE.get(name, f"{command.module}:build_parser").partition(":")
    try:
        found: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    except ImportError as error:
        print(f"kairos {name}: only its name is completed: {error}", file=sys.stderr)
        return parser_of(name)
    return found


def whole_parser() -> argparse.ArgumentParser:
    """One parser with a subcommand for each command."""
    whole = argparse.ArgumentParser(prog="kairos")
    commands = whole.add_subparsers(metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(
            name,
            help=command.help,
            parents=[parser_named(name)],
            add_help=False,
            conflict_handler="resolve",
        )
    return whole
