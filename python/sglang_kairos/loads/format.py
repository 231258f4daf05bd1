"""Defines a trace format. Each is one file in `formats`; `reader` chooses one by the first line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_kairos.loads.rows import MOONCAKE_BLOCK_TOKENS
from sglang_kairos.registry import Registry


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read. `at`: its arrival in the file's unit; `where`: its place, for error texts."""

    where: str
    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """How one kind of trace is recognised by its first line, and read.

    `matches(line)` gets the first line that is not empty. `read(path, lines)` returns a row for
    each request; arrivals are in the file's unit. `unit` and `block_tokens` are usual, not certain:
    `reader` checks them against the rows. `dated`: times name their unit.
    `rank`: of the formats that match, the lowest rank reads the file. Formats with columns of their
    own have 0. Two formats accept any file that looks like theirs and report what it lacks; they
    come later.
    """

    name: str
    matches: Callable[[str], bool]
    read: Callable[[str, Sequence[str]], list[Row]]
    unit: str
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    dated: bool = False
    rank: int = 0


FORMATS: Registry[TraceFormat] = Registry("sglang_kairos.loads.formats")


def register(trace_format: TraceFormat) -> None:
    """Makes a format known by its name. Raises ValueError if the name is taken."""
    FORMATS.add(trace_format.name, trace_format)


def json_with(*names: str) -> Callable[[str], bool]:
    """Matches a line that is a JSON object with these keys."""

    def matches(line: str) -> bool:
        return line.lstrip().startswith("{") and all(f'"{name}"' in line for name in names)

    return matches


def columns(*names: str) -> Callable[[str], bool]:
    """Matches a CSV header that has these columns."""

    def matches(line: str) -> bool:
        header = [cell.strip() for cell in next(csv.reader([line]), [])]
        return set(names) <= set(header)

    return matches
