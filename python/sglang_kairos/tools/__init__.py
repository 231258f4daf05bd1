"""Old module names of the tools, for one release: each says its new name and runs it."""

from __future__ import annotations

import sys

from sglang_kairos import cli, names


def run_renamed(module: str) -> int:
    """Run the command that ``python -m sglang_kairos.tools.MODULE`` is now. Returns its exit code."""
    old = f"python -m sglang_kairos.tools.{module}"
    new = names.new_names("command")[old]
    names.say_renamed(old, new)
    return cli.main([new.removeprefix("kairos "), *sys.argv[1:]])
