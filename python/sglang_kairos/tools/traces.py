"""Request traces: read public ones, make one, reshape it, and turn it into prompts.

A trace is a list of `Request` rows in order of arrival, the first at 0 s. Two public formats are
read by their columns: Mooncake's JSONL (``timestamp`` in ms, ``input_length``, ``output_length``,
``hash_ids``) and Azure's CSV (``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``).

Prompts are token ids. Two requests share a prefix exactly as far as their ``hash_ids`` agree, and
the same seed gives the same prompts on every machine.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

MOONCAKE_BLOCK_TOKENS = 512
# Lengths and times beyond these are unit mistakes or damage, not requests.
MAX_TOKENS = 10_000_000
MAX_SECONDS = 1e9


class TraceError(ValueError):
    """A trace that cannot be used; the text names file, line and column."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row of a trace.

    `arrival_s` counts seconds from the trace's start, lengths count tokens. `hash_ids` names the
    prompt's blocks of `block_tokens` tokens each, the last one possibly partial; None means that
    the prompt shares nothing.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None = None
    block_tokens: int = MOONCAKE_BLOCK_TOKENS


def read_trace(path: str | Path) -> list[Request]:
    """Reads a trace in either format, told apart by its first character."""
    for line in _lines(path):
        if line.strip():
            return read_mooncake(path) if line.lstrip().startswith("{") else read_azure(path)
    raise TraceError(f"{path}: no requests in it")


def read_mooncake(path: str | Path) -> list[Request]:
    """Reads Mooncake JSONL. A length of 0 is taken as 1: no request is smaller."""
    rows: list[Request] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise TraceError(f"{where}: must be a JSON object")
        rows.append(
            Request(
                _number(where, row, "timestamp", MAX_SECONDS * 1e3) / 1e3,
                _tokens(where, row, "input_length"),
                _tokens(where, row, "output_length"),
                _hash_ids(where, row.get("hash_ids")),
            )
        )
    return _from_zero(path, rows)


def read_azure(path: str | Path) -> list[Request]:
    """Reads Azure's CSV. A length of 0 is taken as 1: no request is smaller."""
    rows: list[Request] = []
    reader = csv.reader(_lines(path))
    header = [name.strip() for name in next(reader, [])]
    for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens"):
        if name not in header:
            raise TraceError(
                f"{path}:1: no column {name!r}; it has {', '.join(map(repr, header)) or 'none'}"
            )
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}:{reader.line_num}"
            row = dict(zip(header, cells, strict=False))
            rows.append(
                Request(
                    _timestamp(where, row, "TIMESTAMP"),
                    _tokens(where, row, "ContextTokens"),
                    _tokens(where, row, "GeneratedTokens"),
                )
            )
    except csv.Error as error:
        raise TraceError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    return _from_zero(path, rows)


def long_tail(
    n: int,
    rate: float,
    seed: int,
    *,
    median_input: float = 400.0,
    sigma_input: float = 1.3,
    max_input: int = 16_000,
    median_output: float = 80.0,
    sigma_output: float = 0.8,
    max_output: int = 400,
) -> list[Request]:
    """A made trace: Poisson arrivals at `rate` per second, lognormal lengths in tokens, capped.

    A sigma of 1.3 puts p99 at about twenty times the median, as in Mooncake's published
    conversation trace (p50 6,909, p99 85,401) where a few prompts bring most of the work.
    """
    if n < 1 or not rate > 0:
        raise ValueError(f"needs n >= 1 and rate > 0, got n={n}, rate={rate}")
    source = random.Random(seed)

    def length(median: float, sigma: float, cap: int) -> int:
        return max(1, min(cap, round(source.lognormvariate(math.log(median), sigma))))

    rows, at = [], 0.0
    for _ in range(n):
        rows.append(
            Request(
                at,
                length(median_input, sigma_input, max_input),
                length(median_output, sigma_output, max_output),
            )
        )
        at += source.expovariate(rate)
    return rows


def rate_of(rows: Sequence[Request]) -> float:
    """Mean arrivals per second; infinite when all arrive at once."""
    span = rows[-1].arrival_s - rows[0].arrival_s
    return (len(rows) - 1) / span if span > 0 else math.inf


def scale_rate(rows: Sequence[Request], rate: float) -> list[Request]:
    """The same arrival pattern, stretched or squeezed to `rate` requests per second on average."""
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}")
    now = rate_of(rows)
    if not math.isfinite(now):
        return list(rows)
    return [replace(row, arrival_s=row.arrival_s * now / rate) for row in rows]


def scale_lengths(
    rows: Sequence[Request], input_factor: float, output_factor: float = 1.0
) -> list[Request]:
    """Lengths times a factor, at least one token each; shared prefixes shrink along."""
    if not (input_factor > 0 and output_factor > 0):
        raise ValueError("factors must be positive")
    return [
        replace(
            row,
            input_tokens=max(1, round(row.input_tokens * input_factor)),
            output_tokens=max(1, round(row.output_tokens * output_factor)),
            block_tokens=max(1, round(row.block_tokens * input_factor)),
        )
        for row in rows
    ]


def cap_lengths(
    rows: Sequence[Request], max_input: int | None = None, max_output: int | None = None
) -> list[Request]:
    """Lengths cut to at most these many tokens."""
    return [
        replace(
            row,
            input_tokens=min(row.input_tokens, max_input or row.input_tokens),
            output_tokens=min(row.output_tokens, max_output or row.output_tokens),
        )
        for row in rows
    ]


def window(
    rows: Sequence[Request],
    start_s: float = 0.0,
    duration_s: float = math.inf,
    n: int | None = None,
) -> list[Request]:
    """The requests that arrive in [start_s, start_s + duration_s), at most `n`, from 0 s again."""
    kept = [row for row in rows if start_s <= row.arrival_s < start_s + duration_s][:n]
    first = kept[0].arrival_s if kept else 0.0
    return [replace(row, arrival_s=row.arrival_s - first) for row in kept]


def prompts(
    rows: Iterable[Request], seed: int = 0, low: int = 100, high: int = 1000
) -> Iterator[list[int]]:
    """One prompt per row: token ids in [low, high), prefixes shared as `hash_ids` say.

    The default range is inside every vocabulary and clear of most special tokens.
    """
    if not 0 <= low < high:
        raise ValueError(f"needs 0 <= low < high, got {low}, {high}")
    for index, row in enumerate(rows):
        blocks = [
            _token_ids(f"{seed}/block/{hash_id}", row.block_tokens, low, high)
            for hash_id in row.hash_ids or ()
        ]
        missing = row.input_tokens - len(blocks) * row.block_tokens
        if missing > 0:
            blocks.append(_token_ids(f"{seed}/own/{index}", missing, low, high))
        ids: list[int] = np.concatenate(blocks)[: row.input_tokens].tolist()
        yield ids


def _token_ids(key: str, count: int, low: int, high: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    # A hash, not a random generator: its stream never changes between library versions.
    data = hashlib.shake_128(key.encode()).digest(4 * count)
    return np.frombuffer(data, dtype="<u4") % np.uint32(high - low) + np.uint32(low)


def _lines(path: str | Path) -> Iterator[str]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not UTF-8 text") from None


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


def _from_zero(path: str | Path, rows: list[Request]) -> list[Request]:
    if not rows:
        raise TraceError(f"{path}: no requests in it")
    rows.sort(key=lambda row: row.arrival_s)
    return window(rows)
