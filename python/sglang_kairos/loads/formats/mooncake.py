"""Reads Mooncake's JSON lines: ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids``."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kairos.loads.cells import block_ids, json_rows, number, token_count
from sglang_kairos.loads.format import Row, TraceFormat, json_with, register
from sglang_kairos.loads.rows import MAX_SECONDS


def read_rows(path: str, lines: Sequence[str]) -> list[Row]:
    """Returns Mooncake's or Bailian's rows. A length of 0 is taken as 1: no request is smaller."""
    return [
        Row(
            where,
            number(where, row, "timestamp", MAX_SECONDS * 1e9),
            token_count(where, row, "input_length"),
            token_count(where, row, "output_length"),
            block_ids(where, row.get("hash_ids")),
        )
        for where, row in json_rows(path, lines)
    ]


register(TraceFormat("Mooncake", json_with(), read_rows, "ms", rank=1))
