"""Writes the decision log (``--kairos-decision-log PATH``): JSON lines, one file per process."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sglang_kairos.engine.state.tp_sync import rank_of


def files_of(path: str | Path, role: str = "*") -> list[Path]:
    """Returns the files that servers of this role (default: any) wrote for the setting `path`."""
    path = Path(path)
    return sorted(path.parent.glob(f"{path.stem}.{role}-*{path.suffix}"))


class DecisionLog:
    """The file of one scheduler: ``decisions.jsonl`` becomes ``decisions.decode-30001-0.jsonl``.

    The name has the role, the server's port and the rank. Several of one name (replicas behind one
    port) are numbered on, so two processes never write to one file. Raises OSError if it cannot be
    opened.
    """

    def __init__(self, path: str, scheduler: Any, role: str) -> None:
        port = getattr(getattr(scheduler, "server_args", None), "port", None)
        rank = rank_of(scheduler)
        self._origin = {"server": f"{platform.node()}:{port}", "rank": rank, "pid": os.getpid()}
        self._file = _own(Path(path), f"{role}-{port}-{rank}")

    def write(self, kind: str, role: str, facts: Mapping[str, Any]) -> None:
        """Appends one row: its origin, then the facts."""
        row = {"kind": kind, "role": role, **self._origin, **facts}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def plain(record: Any) -> dict[str, Any]:
    """Returns a dataclass of arrays and numbers, ready for JSON."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def _own(path: Path, whose: str) -> TextIO:
    """Returns the first file of that name that no other process has open."""
    for turn in itertools.count(1):
        more = f"-{turn}" if turn > 1 else ""
        file = path.with_name(f"{path.stem}.{whose}{more}{path.suffix}").open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        except OSError:  # this file system has no locks
            pass
        return file
    raise AssertionError("unreachable")
