"""Old module names of the tools, for one release: each says its new name and runs it."""

from __future__ import annotations

import sys

from sglang_kairos import cli


def run_renamed(old: str, command: str) -> int:
    """Runs ``kairos COMMAND`` for ``python -m sglang_kairos.tools.OLD``; its exit code."""
    was = f"python -m sglang_kairos.tools.{old}"
    print(
        f"{was} is now `kairos {command}`; the old name goes with the next release", file=sys.stderr
    )
    return cli.main([command, *sys.argv[1:]])
