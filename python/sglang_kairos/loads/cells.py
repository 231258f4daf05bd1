"""Reads and checks lines, rows and cells of trace files, for all formats. All raise TraceError."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_kairos.loads.rows import MAX_SECONDS, MAX_TOKENS, TraceError


def read_lines(path: str | Path) -> Iterator[str]:
    """Yields the lines of a text file, which may be packed (``.gz``)."""
    try:
        if Path(path).suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as packed:
                yield from packed
        else:
            with Path(path).open(encoding="utf-8-sig", newline="") as file:
                yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TraceError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text") from None


def json_rows(path: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each row's place in the file and the row, of JSON objects one a line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{where}: must be a JSON object")
        yield where, row


def csv_rows(
    path: str, lines: Iterable[str], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each row's place in the file and its cells by column; all of `columns` are there."""
    reader = csv.reader(lines)
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in columns:
            if name not in header:
                raise TraceError(
                    f"{path}:1: no column {name!r}; it has {', '.join(map(repr, header)) or 'none'}"
                )
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{path}:{reader.line_num}", dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise TraceError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def number(where: str, row: Mapping[str, Any], column: str, high: float) -> float:
    """Returns the cell as a finite number in [0, high]; accepts JSON numbers and numeric text."""
    value = row.get(column)
    if value is None:
        raise TraceError(f"{where}: column {column!r} is missing")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= high:
        shown = str(value) if len(str(value)) <= 40 else str(value)[:37] + "..."
        raise TraceError(
            f"{where}: column {column!r} must be a number from 0 to {high:g}, got {shown!r}"
        )
    return number


def token_count(where: str, row: Mapping[str, Any], column: str) -> int:
    """Returns the cell as a whole number of tokens, at least 1."""
    value = number(where, row, column, MAX_TOKENS)
    if value != int(value):
        raise TraceError(f"{where}: column {column!r} must be a whole number, got {value:g}")
    return max(1, int(value))


def timestamp(where: str, row: Mapping[str, Any], column: str) -> float:
    """Returns seconds since the epoch, from an ISO date and time or from the seconds themselves."""
    text = (row.get(column) or "").strip()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return number(where, row, column, MAX_SECONDS * 10)
        except TraceError:
            raise TraceError(
                f"{where}: column {column!r} must be a date and time, got {text[:40]!r}"
            ) from None
    # Rows without a zone share one. Only differences count, so UTC is as good as any.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def block_ids(where: str, value: Any) -> tuple[int, ...] | None:
    """Returns the cell as ids of prompt blocks; None where there is none."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise TraceError(f"{where}: column 'hash_ids' must be a list of whole numbers")
    return tuple(value)
