"""``kairos TOOL …``: every tool by its short name; ``python -m`` with its module does the same."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Name, module with a `main(argv)`, what it is for.
TOOLS = {
    "report": ("sglang_kairos.reports.report", "table of runs, from a load generator's files"),
    "replay": ("sglang_kairos.loads.replay", "send a trace to a server or router, and measure"),
    "doctor": ("sglang_kairos.versions.doctor", "would Kairos start on this SGLang?"),
    "patch": ("sglang_kairos.versions.patch", "the seams as patches: list, check, apply, revert"),
    "calibrate": ("sglang_kairos.calibrate.cli", "measure a server's steps"),
    "sim": ("sglang_kairos.sim.__main__", "simulate a cluster; plan its size"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool that the first word names with the words after it; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    if words[0] not in TOOLS:
        print(f"error: {words[0]}: no such tool\n{_usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(TOOLS[words[0]][0])
    ended: int | None = module.main(words[1:])
    return ended or 0


def _usage() -> str:
    lines = [f"  {name:8} {text}" for name, (_, text) in TOOLS.items()]
    return "\n".join(["usage: kairos TOOL …  (kairos TOOL --help says more)", *lines])


if __name__ == "__main__":
    sys.exit(main())
