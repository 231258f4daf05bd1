"""Prompt log probabilities: prefill computes them, decode answers, so the router joins the two.

``/generate`` with ``return_logprob`` has them in `meta_info` (`input_token_logprobs` and the lists
beside it): prefill's are put in front of decode's, as upstream's balancer does.
``/v1/completions`` with ``echo`` and ``logprobs`` has them in front of the answer's own in
`choices[].logprobs`. There prefill's are put in front, less the one token that it decoded.
"""

from __future__ import annotations

from typing import Any

import orjson

from sglang_kairos.router.request.body import KEEP_LOGPROBS_BYTES
from sglang_kairos.router.request.sse import Splitter, data_of
from sglang_kairos.slo.body import COMPLETIONS, GENERATE

TOO_LONG = (
    f"prompt log probabilities of more than {KEEP_LOGPROBS_BYTES >> 20} MiB cannot be served over "
    "separate prefill: ask for fewer of each token (top_logprobs_num, logprobs), for later ones only "
    "(logprob_start_len), or with shorter prompts"
)
_LISTS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
# ``return_flat_raw_top_logprobs``: arrays that decode has none of.
_FLAT = "input_top_logprobs_"
_OF_IDS = "output_token_ids_logprobs"
_OPENAI_LISTS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")


class Merger:
    """Joins one prefill answer with decode's answer, whole or event by event."""

    def __init__(self, prefill_body: bytes, stream: bool, path: str = GENERATE) -> None:
        self._stream = stream
        self._openai = path == COMPLETIONS
        self._splitter = Splitter()
        self._body: list[bytes] = []
        self._found: dict[int, dict[str, Any]] = {}
        # A stream repeats the prompt's part in every event: the first entry of each index counts.
        for answer in _answers(prefill_body, stream):
            for index, row in self._rows(answer):
                part = _choice_part(row) if self._openai else _meta(row)
                if part is not None:
                    self._found.setdefault(index, part)

    @property
    def found(self) -> bool:
        """Whether prefill's answer had any part to join."""
        return bool(self._found)

    def feed(self, chunk: bytes) -> bytes:
        """Decode's next bytes; what can be sent on by now."""
        if self._stream:
            return b"".join(self._event(event) for event in self._splitter.feed(chunk))
        self._body.append(chunk)
        return b""

    def end(self) -> bytes:
        """What is left when decode has ended."""
        if self._stream:
            return self._splitter.rest
        body = b"".join(self._body)
        self._body.clear()
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            return body
        for index, row in self._rows(answer):
            self._join(row, index)
        return orjson.dumps(answer)

    def _event(self, event: bytes) -> bytes:
        try:
            answer = orjson.loads(data_of(event))
        except orjson.JSONDecodeError:
            return event
        if not isinstance(answer, dict):
            return event
        for index, row in self._rows(answer):
            self._join(row, index)
        return b"data: " + orjson.dumps(answer) + b"\n\n"

    def _rows(self, answer: Any) -> list[tuple[int, Any]]:
        """One answer's parts by the index of their prompt."""
        if self._openai:
            rows = answer.get("choices") if isinstance(answer, dict) else None
        else:
            rows = answer if isinstance(answer, list) else [answer]
        found = []
        for place, row in enumerate(rows if isinstance(rows, list) else ()):
            index = row.get("index") if isinstance(row, dict) else None
            found.append((index if isinstance(index, int) else place, row))
        return found

    def _join(self, row: Any, index: int) -> None:
        if not isinstance(row, dict) or index not in self._found:
            return
        if self._openai:
            # Only the first event of a choice echoes the prompt.
            _put_before(row, self._found[index])
            if self._stream:
                del self._found[index]
            return
        meta, mine = _meta(row), self._found[index]
        if meta is None:
            return
        for key in _LISTS:
            if isinstance(meta.get(key), list) and isinstance(mine.get(key), list):
                meta[key] = mine[key] + meta[key]
        for key, value in mine.items():
            if key.startswith(_FLAT) and key in meta:
                meta[key] = value
        # The first token is prefill's, and these of its are not handed over with the KV: decode has
        # None for it (0.5.23) or begins with the second token (0.5.16).
        rows, first = meta.get(_OF_IDS), mine.get(_OF_IDS)
        if isinstance(rows, list) and isinstance(first, list) and rows and first:
            if not rows[0]:
                rows[0] = first[0]
            elif len(rows) + 1 == meta.get("completion_tokens"):
                rows.insert(0, first[0])


def _put_before(choice: dict[str, Any], mine: dict[str, Any]) -> None:
    theirs = choice.get("logprobs")
    theirs = theirs if isinstance(theirs, dict) else {}
    joined = {key: mine[key] + (theirs.get(key) or []) for key in _OPENAI_LISTS}
    choice["logprobs"] = {**theirs, **joined}


def _choice_part(row: Any) -> dict[str, Any] | None:
    """The prompt's part of prefill's choice: all but the token that it decoded."""
    found = row.get("logprobs") if isinstance(row, dict) else None
    if not isinstance(found, dict):
        return None
    lists = {key: found.get(key) or [] for key in _OPENAI_LISTS}
    return {key: value[:-1] for key, value in lists.items() if isinstance(value, list)}


def _meta(row: Any) -> dict[str, Any] | None:
    meta = row.get("meta_info") if isinstance(row, dict) else None
    return meta if isinstance(meta, dict) else None


def _answers(body: bytes, stream: bool) -> list[Any]:
    """The JSON of a body or of each event."""
    found: list[Any] = []
    for text in map(data_of, Splitter().feed(body + b"\n\n")) if stream else [body]:
        try:
            found.append(orjson.loads(text))
        except orjson.JSONDecodeError:
            continue
    return found
