"""Reads public request traces, makes one, reshapes it, and turns it into prompts.

A trace is a list of `Request` rows in order of arrival, the first at 0 s. `reader` reads the public
formats: Mooncake, Bailian, Azure, BurstGPT, aiperf's sessions.

Prompts are token ids. Two requests share a prefix exactly as far as their ``hash_ids`` agree, and
the same seed gives the same prompts on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sglang_kairos.loads import reader
from sglang_kairos.loads.rows import MAX_TOKENS, MOONCAKE_BLOCK_TOKENS, Request, TraceError

# `Request` and its like are known under this module's name.
__all__ = [
    "MAX_TOKENS",
    "MOONCAKE_BLOCK_TOKENS",
    "Request",
    "TraceError",
    "add_reading_options",
    "cap_lengths",
    "long_tail",
    "prompts",
    "rate_of",
    "read_trace",
    "scale_lengths",
    "scale_rate",
    "window",
]


def read_trace(
    path: str | Path, block_tokens: int | None = None, time_unit: str | None = None
) -> list[Request]:
    """Returns the requests of a trace in any known format, chosen by its first line.

    `block_tokens`: tokens per block of ``hash_ids``. `time_unit`: s, ms, us or ns. Both follow from
    the rows unless given. Raises TraceError where they do not.
    """
    return reader.read(path, block_tokens, time_unit)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for what a trace itself may leave open: block length and unit of time."""
    parser.add_argument(
        "--block-tokens",
        type=_block_tokens,
        metavar="N",
        help="tokens per block of a trace's hash_ids (default: what its rows allow)",
    )
    parser.add_argument(
        "--time-unit",
        choices=reader.UNITS,
        help="unit of a trace's times (default: its format's, if the rate is plausible)",
    )


def _block_tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(
            f"must be a whole number between 1 and {MAX_TOKENS}, got {text!r}"
        )
    return int(text)


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
    """Makes a trace: Poisson arrivals at `rate` per second, lognormal lengths in tokens, capped.

    A sigma of 1.3 puts p99 at about twenty times the median. In Mooncake's published conversation
    trace p50 is 6,909 and p99 85,401 tokens: a few prompts bring most of the work. Raises
    ValueError for `n` < 1.
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
    """Returns the mean arrivals per second; infinite when all arrive at once."""
    span = rows[-1].arrival_s - rows[0].arrival_s
    return (len(rows) - 1) / span if span > 0 else math.inf


def scale_rate(rows: Sequence[Request], rate: float) -> list[Request]:
    """Returns the same arrivals, stretched or squeezed to `rate` requests per second on average."""
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}")
    now = rate_of(rows)
    if not math.isfinite(now):
        return list(rows)
    return [replace(row, arrival_s=row.arrival_s * now / rate) for row in rows]


def scale_lengths(
    rows: Sequence[Request], input_factor: float, output_factor: float = 1.0
) -> list[Request]:
    """Returns the rows with lengths times a factor, at least one token; shared prefixes shrink too."""
    if not (input_factor > 0 and output_factor > 0):
        raise ValueError(
            f"factors must be above 0, got {input_factor} for input, {output_factor} for output"
        )
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
    """Returns the rows with lengths cut to at most these many tokens."""
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
    """Returns the requests that arrive in [start_s, start_s + duration_s), at most `n`, from 0 s."""
    kept = [row for row in rows if start_s <= row.arrival_s < start_s + duration_s][:n]
    first = kept[0].arrival_s if kept else 0.0
    return [replace(row, arrival_s=row.arrival_s - first) for row in kept]


def prompts(
    rows: Iterable[Request], seed: int = 0, low: int = 100, high: int = 1000
) -> Iterator[list[int]]:
    """Yields one prompt per row: token ids in [low, high), prefixes shared as `hash_ids` say.

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
    # A hash is used because its stream never changes between library versions.
    data = hashlib.shake_128(key.encode()).digest(4 * count)
    return np.frombuffer(data, dtype="<u4") % np.uint32(high - low) + np.uint32(low)
