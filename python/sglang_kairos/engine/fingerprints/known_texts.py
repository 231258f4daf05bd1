"""The source texts of SGLang's functions that Kairos knows, by version: ``fingerprints.json``.

There is a column for each version, newest first. It has the hash of the text by
``module:qualified.name``, of the functions that are wrapped there (``engine.seams.table``) and of
those that handlers rely on (``relied_on``). A function that is not in a column is not used in that
version.

`KAIROS_SEAMS` names a file of the same form, with texts that its author has checked. They count as
Kairos' own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Kind = Literal["seams", "relied_on"]
KINDS: tuple[Kind, ...] = ("seams", "relied_on")
VOUCHED_FOR = "KAIROS_SEAMS"  # the environment variable

Column = Mapping[str, Mapping[str, str]]


class TableError(ValueError):
    """A file of fingerprints cannot be used; the message names it."""


def own_file() -> Path:
    """Returns the path of Kairos' own table."""
    return Path(__file__).with_name("fingerprints.json")


def release(version: str) -> str:
    """Returns the release that a version is built from: 0.5.23 for ``0.5.23+cu130``.

    A build before or after a release (``.dev3``, ``rc1``, ``.post1``) keeps its name, since its
    text may differ.
    """
    return version.removeprefix("v").split("+")[0]


_PHASES = {"dev": -4, "a": -3, "b": -2, "rc": -1, "": 0, "post": 1}
_NUMBER = re.compile(r"(?P<release>\d+(\.\d+)*)[-_.]?((?P<phase>dev|a|b|rc|post)(?P<number>\d+))?")


def order(version: str) -> tuple[tuple[int, ...], int, int]:
    """Returns a key to sort versions by, oldest first: 0.5.24.dev12, 0.5.24rc1, 0.5.24, 0.5.24.post1."""
    found = _NUMBER.match(release(version))
    if found is None:
        return (), 0, 0
    numbers = tuple(map(int, found["release"].split(".")))
    return numbers, _PHASES[found["phase"] or ""], int(found["number"] or 0)


def read(path: Path) -> dict[str, Column]:
    """Returns the columns of a file. Raises TableError if it is not one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise TableError(f"{path}: must be an object with a column for each SGLang version")
    for version, column in table.items():
        _check(f"{path}: {version}", column)
    return table


def _check(where: str, column: Any) -> None:
    if not isinstance(column, dict) or not set(column) <= set(KINDS):
        raise TableError(f"{where}: must be an object with {' and '.join(KINDS)}")
    for kind, prints in column.items():
        if not isinstance(prints, dict):
            raise TableError(f"{where}.{kind}: must be an object of function -> hash")
        for target, found in prints.items():
            if not isinstance(found, str) or not re.fullmatch("[0-9a-f]{16}", found):
                raise TableError(f"{where}.{kind}.{target}: must be 16 hexadecimal digits")


def vouched() -> dict[str, Column]:
    """Returns the columns of the file that `KAIROS_SEAMS` names, if any. Raises TableError."""
    named = os.environ.get(VOUCHED_FOR, "").strip()
    if not named:
        return {}
    try:
        return read(Path(named))
    except TableError as error:
        raise TableError(f"{VOUCHED_FOR}={error}") from None


@functools.cache
def table() -> dict[str, Column]:
    """Returns Kairos' own columns and those of `KAIROS_SEAMS`, newest first.

    A column in both is Kairos' own, with the other's entries put over it. A file that cannot be
    used counts as none: callers that start something ask `vouched` first and refuse.
    """
    columns = read(own_file())
    with contextlib.suppress(TableError):
        for version, theirs in vouched().items():
            ours = columns.get(version, {})
            columns[version] = {
                kind: {**ours.get(kind, {}), **theirs.get(kind, {})} for kind in KINDS
            }
    return dict(sorted(columns.items(), key=lambda item: order(item[0]), reverse=True))


@functools.cache
def _own() -> dict[str, Column]:
    return read(own_file())


def is_vouched_for(target: str, kind: Kind, text: str) -> bool:
    """Returns whether a text is known from the file of `KAIROS_SEAMS` only."""
    columns = _own().values()
    return text not in (column.get(kind, {}).get(target) for column in columns)


def of(target: str, kind: Kind) -> dict[str, str]:
    """Returns the hash of a function's text in each version that uses it, newest first."""
    return {
        version: column[kind][target]
        for version, column in table().items()
        if target in column.get(kind, {})
    }
