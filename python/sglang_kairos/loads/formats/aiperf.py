"""Reads aiperf's sessions, as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kairos.loads.cells import block_ids, json_rows, number, token_count
from sglang_kairos.loads.format import Row, TraceFormat, json_with, register
from sglang_kairos.loads.rows import MAX_SECONDS, TraceError


def read_sessions(path: str, lines: Sequence[str]) -> list[Row]:
    """Returns aiperf's turns. A first turn has a ``timestamp``, a later one a ``delay`` after it.

    An open loop cannot wait for an answer, so a turn comes `delay` after the arrival of the one
    before it. Lengths are taken as they stand: no history is added.
    """
    rows: list[Row] = []
    latest: dict[str, float] = {}
    for where, row in json_rows(path, lines):
        session = row.get("session_id")
        if not isinstance(session, str | int):
            raise TraceError(f"{where}: column 'session_id' is missing")
        if row.get("timestamp") is not None:
            at = number(where, row, "timestamp", MAX_SECONDS * 1e3)
        elif str(session) not in latest:
            raise TraceError(f"{where}: column 'timestamp' is missing in a session's first turn")
        else:
            at = latest[str(session)] + number(where, row, "delay", MAX_SECONDS * 1e3)
        latest[str(session)] = at
        tokens = token_count(where, row, "input_length"), token_count(where, row, "output_length")
        rows.append(Row(where, at, *tokens, block_ids(where, row.get("hash_ids"))))
    return rows


register(TraceFormat("aiperf", json_with("session_id", "input_length"), read_sessions, "ms"))
