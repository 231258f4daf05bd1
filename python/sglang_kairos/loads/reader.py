"""Reads a trace of any known format.

A format gives rows whose arrival is in the file's own unit. The unit, and the length of a block of
``hash_ids``, are decided here from all rows together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sglang_kairos.loads.cells import read_lines
from sglang_kairos.loads.format import FORMATS, Row, TraceFormat
from sglang_kairos.loads.rows import MAX_TOKENS, Request, TraceError

logger = logging.getLogger(__name__)

# How many of each unit make a second.
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
# No public trace has a higher rate, so beyond it the unit is a mistake.
MOST_PER_S = 1000.0
# No trace without a stated unit has a lower rate, so below it times are finer than assumed.
LEAST_PER_S = 0.01
# A trace whose times have fractions of its unit is unlikely to count milliseconds.
MOST_PER_S_OF_FRACTIONS = 100.0
# With fewer rows a rate says nothing about the unit.
_ENOUGH_ROWS = 20


def read(
    path: str | Path, block_tokens: int | None = None, time_unit: str | None = None
) -> list[Request]:
    """Returns the requests of a trace in any of `FORMATS`, in order of arrival, the first at 0 s.

    `block_tokens` and `time_unit` (of `UNITS`) are taken from the rows unless given. Raises
    TraceError.
    """
    by_rank = sorted(FORMATS.values(), key=lambda each: each.rank)
    lines = list(read_lines(path))
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise TraceError(f"{path}: no requests in it")
    chosen = next((each for each in by_rank if each.matches(first)), None)
    if chosen is None:
        known = ", ".join(each.name for each in by_rank)
        raise TraceError(f"{path}:1: not a known trace format ({known}): {first.strip()[:60]!r}")
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
    """Returns the trace's units in a second: its format's, unless the rate cannot be right then."""
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
        f"{chosen.name} traces, {seconds:.4g} if seconds: name the unit with --time-unit"
    )


def _block_tokens(path: str | Path, rows: Sequence[Row], usual: int, given: int | None) -> int:
    """Returns the tokens of a block. Each row has (blocks - 1) · size < tokens <= blocks · size."""
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
        f"{path}: its rows allow {low} to {high} tokens per block of 'hash_ids': name the number "
        "with --block-tokens"
    )


def _tell_of_ticks(path: str | Path, rows: Sequence[Request]) -> None:
    instants = len({row.arrival_s for row in rows})
    if len(rows) >= 5 * instants and instants > 1:
        logger.warning(
            "%s: %d requests arrive at %d instants, in bursts", path, len(rows), instants
        )
