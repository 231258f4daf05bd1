"""Processes that end together: what Linux offers for it, in one place.

`end_with_parent` covers a parent that is killed, `adopt_orphans` and `kill_descendants` what a
child leaves behind, `kill_session` a child that does not end. Nothing here raises where the
kernel lacks a call: each then covers less.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# ``python -ISc EXEC_WITH_PARENT PARENT PROGRAM ARGUMENT…``: PROGRAM, killed when PARENT ends. Not
# a preexec_fn: those may deadlock in a process with threads.
EXEC_WITH_PARENT = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
except (AttributeError, OSError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def end_with_parent(parent: int) -> None:
    """The kernel kills this process once the *thread* that forked it has ended.

    `parent` is the process it expects; if that has ended already, this one ends here.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process, instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_session(leader: int) -> None:
    """Kills the process group of `leader`, and every other group of its session."""
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)
    for pid, (_, session) in _table().items():
        if session == leader:
            _kill(pid)


def kill_descendants(within_s: float = 5.0, spared: Collection[int] = ()) -> bool:
    """Kills the children of this process, and theirs, until there are none; whether it succeeded.

    `spared` are children that it leaves alone, with theirs. Needs `adopt_orphans` to find those
    whose parents have ended.
    """
    deadline = time.monotonic() + within_s
    while pids := descendants(spared):
        if time.monotonic() > deadline:
            return False
        for pid in pids:
            _kill(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    return True


def descendants(spared: Collection[int] = ()) -> list[int]:
    """Children of this process, and theirs, without `spared` and what descends from them."""
    table = _table()
    found: list[int] = []
    parents = {os.getpid()}
    while parents:
        parents = {
            pid for pid, (parent, _) in table.items() if parent in parents and pid not in spared
        }
        found += parents
    return found


def _table() -> dict[int, tuple[int, int]]:
    """Parent and session of every process."""
    table = {}
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The program's name comes before the last bracket and may hold anything.
            fields = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2]
            _, parent, _, session, *_ = fields.split()
            table[int(name)] = (int(parent), int(session))
    return table


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
