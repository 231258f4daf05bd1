"""Reads BurstGPT: CSV with ``Timestamp`` in seconds and token counts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sglang_kairos.loads.cells import csv_rows, number, token_count
from sglang_kairos.loads.format import Row, TraceFormat, columns, register
from sglang_kairos.loads.rows import MAX_SECONDS, MAX_TOKENS

logger = logging.getLogger(__name__)


def read_rows(path: str, lines: Sequence[str]) -> list[Row]:
    """Returns the rows. One without response tokens failed: it is left out and counted."""
    rows, failed = [], 0
    for where, row in csv_rows(path, lines, ("Timestamp", "Request tokens", "Response tokens")):
        at = number(where, row, "Timestamp", MAX_SECONDS)
        prompt = token_count(where, row, "Request tokens")
        if number(where, row, "Response tokens", MAX_TOKENS) == 0:
            failed += 1
            continue
        rows.append(Row(where, at, prompt, token_count(where, row, "Response tokens")))
    if failed:
        logger.warning(
            "%s: %d of %d requests had failed (0 response tokens) and are left out",
            path,
            failed,
            failed + len(rows),
        )
    return rows


register(TraceFormat("BurstGPT", columns("Timestamp", "Request tokens"), read_rows, "s"))
