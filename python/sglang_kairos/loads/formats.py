"""The trace formats that are read, by name: adding one is one `TraceFormat` in `FORMATS`.

A reader gets all lines of a file and gives rows whose arrival is in the file's own unit; what the
unit is, and how long a block of ``hash_ids`` is, is decided here from all rows together.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang_kairos.loads.rows import (
    MAX_SECONDS,
    MAX_TOKENS,
    MOONCAKE_BLOCK_TOKENS,
    Request,
    TraceError,
)

logger = logging.getLogger(__name__)

# Of each unit, how many make a second.
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
# More than any public trace has: beyond it the unit is a mistake.
MOST_PER_S = 1000.0
# Less than any trace has whose unit is not in the file: its times are finer than assumed.
LEAST_PER_S = 0.01
# A trace whose times have fractions of its unit hardly counts milliseconds.
MOST_PER_S_OF_FRACTIONS = 100.0
# Rows before a rate says anything about the unit.
_ENOUGH_ROWS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: `at` in the file's unit, `where` for error texts."""

    where: str
    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """`matches` the first line that is not empty; `unit` and `block_tokens` are usual, not certain."""

    name: str
    matches: Callable[[str], bool]
    read: Callable[[str, Sequence[str]], list[Row]]
    unit: str
    block_tokens: int = MOONCAKE_BLOCK_TOKENS
    dated: bool = False  # Its times name their unit.


def read(
    path: str | Path, block_tokens: int | None = None, time_unit: str | None = None
) -> list[Request]:
    """The requests of a trace in any of `FORMATS`, told apart by the first line, in order of arrival.

    `block_tokens` and `time_unit` (of `UNITS`) are taken from the rows unless given. TraceError.
    """
    lines = list(_lines(path))
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise TraceError(f"{path}: no requests in it")
    chosen = next((each for each in FORMATS if each.matches(first)), None)
    if chosen is None:
        known = ", ".join(each.name for each in FORMATS)
        raise TraceError(f"{path}:1: no trace in a known format ({known}): {first.strip()[:60]!r}")
    rows = chosen.read(str(path), lines)
    if not rows:
        raise TraceError(f"{path}: no requests in it")
    per_s = UNITS[time_unit] if time_unit else _per_s(path, chosen, rows)
    size = _block_tokens(path, rows, chosen.block_tokens, block_tokens)
    found = [
        Request(row.at / per_s, row.input_tokens, row.output_tokens, row.hash_ids, size)
        for row in rows
    ]
    found.sort(key=lambda request: request.arrival_s)
    zero = found[0].arrival_s
    found = [replace(request, arrival_s=request.arrival_s - zero) for request in found]
    _tell_of_ticks(path, found)
    return found


def _per_s(path: str | Path, chosen: TraceFormat, rows: Sequence[Row]) -> float:
    """The trace's units in a second: its format's, unless the rate that follows cannot be."""
    per_s = UNITS[chosen.unit]
    span = max(row.at for row in rows) - min(row.at for row in rows)
    if chosen.dated or len(rows) < _ENOUGH_ROWS or span <= 0.0:
        return per_s
    rate = (len(rows) - 1) / span * per_s
    fractions = any(not row.at.is_integer() for row in rows)
    if LEAST_PER_S <= rate <= (MOST_PER_S_OF_FRACTIONS if fractions else MOST_PER_S):
        return per_s
    seconds = (len(rows) - 1) / span
    if rate > LEAST_PER_S and fractions and seconds <= MOST_PER_S_OF_FRACTIONS:
        return 1.0
    raise TraceError(
        f"{path}: {rate:.4g} requests per second if its times are {chosen.unit} as usual in "
        f"{chosen.name} traces, {seconds:.4g} if seconds: say which (--time-unit)"
    )


def _block_tokens(path: str | Path, rows: Sequence[Row], usual: int, given: int | None) -> int:
    """Tokens of a block: ``(blocks - 1) · size < tokens <= blocks · size`` holds in every row."""
    low, high = (given, given) if given else (1, MAX_TOKENS)
    for row in rows:
        blocks = len(row.hash_ids or ())
        if not blocks:
            continue
        least = -(-row.input_tokens // blocks)
        most = -(-row.input_tokens // (blocks - 1)) - 1 if blocks > 1 else MAX_TOKENS
        if least > high or most < low:
            fitting = f"{least} to {most}" if least <= most else "none"
            before = f"--block-tokens {given}" if given else f"{low} to {high} of the rows before"
            raise TraceError(
                f"{row.where}: column 'hash_ids' has {blocks} blocks for {row.input_tokens} tokens: "
                f"tokens per block that fit are {fitting}, not {before}"
            )
        low, high = max(low, least), min(high, most)
    if low <= usual <= high:
        return usual
    powers = [1 << n for n in range(MAX_TOKENS.bit_length()) if low <= 1 << n <= high]
    if len(powers) == 1:
        return powers[0]
    if low == high:
        return low
    raise TraceError(
        f"{path}: its rows allow {low} to {high} tokens per block of 'hash_ids': say how "
        "many (--block-tokens)"
    )


def _tell_of_ticks(path: str | Path, rows: Sequence[Request]) -> None:
    instants = len({row.arrival_s for row in rows})
    if len(rows) >= 5 * instants and instants > 1:
        logger.warning(
            "%s: %d requests arrive at %d instants, in bursts", path, len(rows), instants
        )


# --- formats


def _read_json(path: str, lines: Sequence[str]) -> list[Row]:
    """Mooncake's and Bailian's rows. A length of 0 is taken as 1: no request is smaller."""
    return [
        Row(
            where,
            _number(where, row, "timestamp", MAX_SECONDS * 1e9),
            _tokens(where, row, "input_length"),
            _tokens(where, row, "output_length"),
            _hash_ids(where, row.get("hash_ids")),
        )
        for where, row in _objects(path, lines)
    ]


def _read_sessions(path: str, lines: Sequence[str]) -> list[Row]:
    """aiperf's sessions: a first turn has a ``timestamp``, later ones a ``delay`` after the turn
    before. An open loop cannot wait for an answer, so a turn comes `delay` after the arrival of the
    one before it. Lengths are taken as they stand: no history is added."""
    rows: list[Row] = []
    latest: dict[str, float] = {}
    for where, row in _objects(path, lines):
        session = row.get("session_id")
        if not isinstance(session, str | int):
            raise TraceError(f"{where}: column 'session_id' is missing")
        if row.get("timestamp") is not None:
            at = _number(where, row, "timestamp", MAX_SECONDS * 1e3)
        elif str(session) not in latest:
            raise TraceError(f"{where}: column 'timestamp' is missing in a session's first turn")
        else:
            at = latest[str(session)] + _number(where, row, "delay", MAX_SECONDS * 1e3)
        latest[str(session)] = at
        tokens = _tokens(where, row, "input_length"), _tokens(where, row, "output_length")
        rows.append(Row(where, at, *tokens, _hash_ids(where, row.get("hash_ids"))))
    return rows


def _read_azure(path: str, lines: Sequence[str]) -> list[Row]:
    return [
        Row(
            where,
            _timestamp(where, row, "TIMESTAMP"),
            _tokens(where, row, "ContextTokens"),
            _tokens(where, row, "GeneratedTokens"),
        )
        for where, row in _cells(path, lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    ]


def _read_burstgpt(path: str, lines: Sequence[str]) -> list[Row]:
    """A row without response tokens is a request that failed: it is left out, and counted."""
    rows, failed = [], 0
    for where, row in _cells(path, lines, ("Timestamp", "Request tokens", "Response tokens")):
        at = _number(where, row, "Timestamp", MAX_SECONDS)
        prompt = _tokens(where, row, "Request tokens")
        if _number(where, row, "Response tokens", MAX_TOKENS) == 0:
            failed += 1
            continue
        rows.append(Row(where, at, prompt, _tokens(where, row, "Response tokens")))
    if failed:
        logger.warning(
            "%s: %d of %d requests had failed (0 response tokens) and are left out",
            path,
            failed,
            failed + len(rows),
        )
    return rows


def _json_with(*names: str) -> Callable[[str], bool]:
    def matches(line: str) -> bool:
        return line.lstrip().startswith("{") and all(f'"{name}"' in line for name in names)

    return matches


def _columns(*names: str) -> Callable[[str], bool]:
    def matches(line: str) -> bool:
        header = [cell.strip() for cell in next(csv.reader([line]), [])]
        return set(names) <= set(header)

    return matches


# The first that matches reads it; the last two take what looks like theirs, and say what it lacks.
FORMATS = (
    TraceFormat("BurstGPT", _columns("Timestamp", "Request tokens"), _read_burstgpt, "s"),
    TraceFormat("Bailian", _json_with("chat_id", "timestamp"), _read_json, "s", 16),
    TraceFormat("aiperf", _json_with("session_id", "input_length"), _read_sessions, "ms"),
    TraceFormat("Mooncake", _json_with(), _read_json, "ms"),
    TraceFormat(
        "Azure", lambda line: not line.lstrip().startswith("["), _read_azure, "s", dated=True
    ),
)


# --- cells


def _lines(path: str | Path) -> Iterator[str]:
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


def _objects(path: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _cells(
    path: str, lines: Iterable[str], columns: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
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


def _number(where: str, row: Mapping[str, Any], column: str, high: float) -> float:
    """The cell as a finite number in [0, high]; JSON numbers and numeric text alike."""
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


def _tokens(where: str, row: Mapping[str, Any], column: str) -> int:
    number = _number(where, row, column, MAX_TOKENS)
    if number != int(number):
        raise TraceError(f"{where}: column {column!r} must be a whole number, got {number:g}")
    return max(1, int(number))


def _timestamp(where: str, row: Mapping[str, Any], column: str) -> float:
    """Seconds since the epoch from an ISO date and time, or the seconds themselves."""
    text = (row.get(column) or "").strip()
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return _number(where, row, column, MAX_SECONDS * 10)
        except TraceError:
            raise TraceError(
                f"{where}: column {column!r} must be a date and time, got {text[:40]!r}"
            ) from None
    # Without a zone all rows share one; any will do for differences.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _hash_ids(where: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise TraceError(f"{where}: column 'hash_ids' must be a list of whole numbers")
    return tuple(value)
