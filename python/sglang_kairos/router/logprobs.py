"""Prompt log probabilities: prefill computes them, decode answers, so the router joins the two.

Only ``/generate`` with ``return_logprob`` has them (`meta_info.input_token_logprobs`, and the two
lists beside it); as upstream's balancer does, prefill's are put in front of decode's.
"""

from __future__ import annotations

from typing import Any

import orjson

from sglang_kairos.slo_http import GENERATE

# A prefill answer with log probabilities of a long prompt is kept up to this size; a longer one is
# not joined.
KEEP_BYTES = 32 * 1024 * 1024
_LISTS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")


def wants_merge(path: str, body: dict[str, Any]) -> bool:
    """Whether the answer holds prompt log probabilities."""
    asked = body.get("return_logprob")
    return path == GENERATE and (any(asked) if isinstance(asked, list) else bool(asked))


class Merger:
    """Joins one prefill answer with decode's answer, whole or event by event."""

    def __init__(self, prefill_body: bytes, stream: bool) -> None:
        self._stream = stream
        self._rest = b""
        self._found = _from_stream(prefill_body) if stream else _from_body(prefill_body)

    def feed(self, chunk: bytes) -> bytes:
        """Decode's next bytes; what can be sent on by now."""
        self._rest += chunk
        if not self._stream:
            return b""
        *events, self._rest = self._rest.split(b"\n\n")
        return b"".join(self._event(event) + b"\n\n" for event in events)

    def end(self) -> bytes:
        """What is left when decode has ended."""
        rest, self._rest = self._rest, b""
        if self._stream:
            return self._event(rest) if rest else b""
        try:
            answer = orjson.loads(rest)
        except orjson.JSONDecodeError:
            return rest
        rows = answer if isinstance(answer, list) else [answer]
        for index, row in enumerate(rows):
            self._join(row, index)
        return orjson.dumps(answer)

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:") or b"[DONE]" in event:
            return event
        try:
            row = orjson.loads(event[5:])
        except orjson.JSONDecodeError:
            return event
        self._join(row, row.get("index", 0) if isinstance(row, dict) else 0)
        return b"data: " + orjson.dumps(row)

    def _join(self, row: Any, index: Any) -> None:
        meta = row.get("meta_info") if isinstance(row, dict) else None
        mine = self._found.get(index)
        if not isinstance(meta, dict) or mine is None:
            return
        for key in _LISTS:
            if isinstance(meta.get(key), list) and isinstance(mine.get(key), list):
                meta[key] = mine[key] + meta[key]


def _from_body(body: bytes) -> dict[int, dict[str, Any]]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return _metas(list(enumerate(answer if isinstance(answer, list) else [answer])))


def _from_stream(body: bytes) -> dict[int, dict[str, Any]]:
    rows: list[tuple[int, Any]] = []
    for event in body.split(b"\n\n"):
        if event.startswith(b"data:") and b"[DONE]" not in event:
            try:
                row = orjson.loads(event[5:])
            except orjson.JSONDecodeError:
                continue
            rows.append((row.get("index", 0) if isinstance(row, dict) else 0, row))
    return _metas(rows)


def _metas(rows: list[tuple[int, Any]]) -> dict[int, dict[str, Any]]:
    """First entry of each index: a stream repeats the prompt's part in every event."""
    found: dict[int, dict[str, Any]] = {}
    for index, row in rows:
        meta = row.get("meta_info") if isinstance(row, dict) else None
        if isinstance(meta, dict):
            found.setdefault(index, meta)
    return found
