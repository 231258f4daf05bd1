"""Reads Qwen-Bailian's JSON lines: Mooncake's columns, ``timestamp`` in seconds, blocks of 16 tokens."""

from __future__ import annotations

from sglang_kairos.loads.format import TraceFormat, json_with, register
from sglang_kairos.loads.formats.mooncake import read_rows

register(TraceFormat("Bailian", json_with("chat_id", "timestamp"), read_rows, "s", 16))
