"""Bounds on time that a busy machine may miss now and then, and a defect misses every time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Late(AssertionError):
    """Nothing is wrong but the time it took."""


def promptly(began_s: float, limit_s: float) -> None:
    """Late unless `limit_s` seconds have not passed since `began_s` (`time.monotonic`)."""
    took_s = time.monotonic() - began_s
    if took_s >= limit_s:
        raise Late(f"took {took_s:.2f} s, at most {limit_s:g}")


def once_undisturbed(
    check: Callable[[], None], spoilt: type[AssertionError] = Late, tries: int = 8
) -> None:
    """Runs `check` until it passes; what is not `spoilt` fails at once, and so does the last try."""
    for left in reversed(range(tries)):
        try:
            check()
        except spoilt:
            if not left:
                raise
        else:
            return
