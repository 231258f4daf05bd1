"""Reads Azure's LLM inference traces of 2023 and 2024: CSV with ``TIMESTAMP`` and token counts."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kairos.loads.cells import csv_rows, timestamp, token_count
from sglang_kairos.loads.format import Row, TraceFormat, register


def read_rows(path: str, lines: Sequence[str]) -> list[Row]:
    """Returns one row for each line. TIMESTAMP is a date and time, or seconds."""
    return [
        Row(
            where,
            timestamp(where, row, "TIMESTAMP"),
            token_count(where, row, "ContextTokens"),
            token_count(where, row, "GeneratedTokens"),
        )
        for where, row in csv_rows(path, lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    ]


register(
    TraceFormat(
        "Azure",
        lambda line: not line.lstrip().startswith("["),
        read_rows,
        "s",
        dated=True,
        rank=2,
    )
)
