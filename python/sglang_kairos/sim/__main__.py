"""``kairos sim``: policies against each other; ``kairos plan``: how many servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from sglang_kairos.loads.traces import TraceError
from sglang_kairos.sim.cli import compare, plan
from sglang_kairos.sim.cli.options import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line asks for. 2: it cannot; 130: interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["plan"]:
        parser, command, argv = plan.parser(), plan.plan, argv[1:]
    else:
        parser, command = compare.parser(), compare.compare
    args = parser.parse_args(argv)
    try:
        command(args)
        sys.stdout.flush()
    except UsageError as error:
        parser.error(str(error))
    except TraceError as error:
        return _refuse(str(error))
    except BrokenProcessPool:
        return _refuse("a simulating process was killed; out of memory? Fewer --jobs need less")
    except BrokenPipeError:
        # Whoever read stdout, `head` say, has seen enough; without this Python complains on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
