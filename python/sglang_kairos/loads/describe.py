"""``kairos traces``: what is in a trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sglang_kairos.commands import parser_of
from sglang_kairos.loads import traces
from sglang_kairos.loads.rows import Request, TraceError

DESCRIPTION = """\
Say what is in a trace, as `kairos replay` and `kairos sim` read it.
Lengths are tokens, p50/p99. Shared: prompt tokens whose block has come before, in percent.
"""
_HEADS = ("trace", "requests", "seconds", "requests/s", "prompt", "answer", "shared %")


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos traces``."""
    parser = parser_of("traces", description=DESCRIPTION)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="traces")
    traces.add_reading_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each trace. Returns 2 where one cannot be read."""
    given = build_parser().parse_args(argv)
    rows = [_HEADS]
    try:
        for file in given.files:
            found = traces.read_trace(file, given.block_tokens, given.time_unit)
            rows.append((file.name, *describe(found)))
    except (TraceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def describe(rows: Sequence[Request]) -> tuple[str, str, str, str, str, str]:
    """The cells after a trace's name: see `_HEADS`."""
    span = rows[-1].arrival_s
    rate = f"{traces.rate_of(rows):.3g}" if span > 0 else "-"
    lengths = [
        "/".join(f"{value:.0f}" for value in np.percentile(of, (50, 99)))
        for of in ([row.input_tokens for row in rows], [row.output_tokens for row in rows])
    ]
    return str(len(rows)), f"{span:.0f}", rate, lengths[0], lengths[1], f"{100 * _shared(rows):.0f}"


def _shared(rows: Sequence[Request]) -> float:
    """Share of prompt tokens, 0 to 1, in blocks that an earlier request had."""
    seen: set[int] = set()
    again = 0
    for row in rows:
        blocks = row.hash_ids or ()
        again += min(row.input_tokens, sum(b in seen for b in blocks) * row.block_tokens)
        seen.update(blocks)
    return again / sum(row.input_tokens for row in rows)
