"""Shows on a terminal how far a command has come."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sglang_kairos.sim.cli.pool import Progress


@contextmanager
def progress_bar(unit: str) -> Iterator[Progress | None]:
    """Yields a bar on stderr, if that is a terminal and tqdm is installed; None otherwise."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield None
        return
    if not sys.stderr.isatty():
        yield None
        return
    with tqdm(unit=f" {unit}", leave=False, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield show
