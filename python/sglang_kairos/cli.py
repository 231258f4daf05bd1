"""``kairos COMMAND …``: everything that Kairos can do, by name. ``python -m sglang_kairos`` is the same.

A command's module is imported when it runs, and no other: `kairos report` needs no SGLang.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence

from sglang_kairos.commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names with the words after it. Returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"error: {words[0]}: no such command\n{usage()}", file=sys.stderr)
        return 2
    command, given = COMMANDS[words[0]], [*COMMANDS[words[0]].first, *words[1:]]
    if command.as_main:
        sys.argv[1:] = given
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
        return 0
    ended: int | None = importlib.import_module(command.module).main(given)
    return ended or 0


def usage() -> str:
    """One line for each command."""
    lines = [f"  {name:11} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: kairos COMMAND …  (kairos COMMAND --help says more)", *lines])


if __name__ == "__main__":
    sys.exit(main())
