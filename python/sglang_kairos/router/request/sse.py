"""Server-sent events: cut out of a stream's bytes, and what they say of its tokens' times.

By the server's own counts and nothing else. ``/generate`` counts in every event
(`meta_info.completion_tokens`). The OpenAI endpoints count only when asked to. So the router asks
in the client's place and takes out what the client did not ask for: `Hidden`. A stream without
counts has no TPOT: an event is not a token (``--stream-interval``, speculative decoding, role and
finish events).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from sglang_kairos.slo.body import COMPLETIONS, GENERATE

# Two line ends in a row, each of LF, CR LF or CR. A CR at the end of what is there may be half of
# a CR LF, so it ends nothing yet.
_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))(?:\r\n|\n|\r(?=[^\n]))")
_LINE = re.compile(rb"\r\n|\n|\r")
_LONGEST_END = 4

_DONE = b"[DONE]"
_COUNT, _FINISH, _CHOICES = b'"completion_tokens"', b'"finish_reason"', b'"choices"'
_NUMBER = re.compile(rb"\s*:\s*(\d{1,9})\b")
_NULL = re.compile(rb"\s*:\s*null\b")
_EMPTY = re.compile(rb"\s*:\s*\[\s*\]")
_ABORTED = re.compile(rb'\s*:\s*(?:\{\s*"type"\s*:\s*)?"abort"')
# Neither can lie inside a JSON string, where a quote is written \".
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_USAGE_OBJECT = re.compile(rb'"usage"\s*:\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}')


class Splitter:
    """Gives out each event when its last byte has come, with the blank line that ends it.

    What was given out and `rest`, joined, are the bytes that came. With `limit`, an event longer
    than that loses its middle: its first and its last `limit` bytes are kept.
    """

    __slots__ = ("_held", "_limit", "_size")

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._held: list[bytes] = []
        self._size = 0

    @property
    def rest(self) -> bytes:
        """The beginning of an event that has not ended."""
        return b"".join(self._held)

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that end in these bytes."""
        if not self._held and b"\r" not in chunk and chunk.find(b"\n\n") == len(chunk) - 2 >= 0:
            return [chunk]
        # An end may lie across what is held and what came: look a few bytes back, not at all of it.
        last = self._held.pop() if self._held else b""
        if len(last) > _LONGEST_END:
            self._held.append(last[:-_LONGEST_END])
            last = last[-_LONGEST_END:]
        elif self._held:
            last = self._held.pop() + last
        self._size -= len(last)
        text = last + chunk
        events: list[bytes] = []
        begin = 0
        for found in _END.finditer(text):
            events.append(b"".join((*self._held, text[begin : found.end()])))
            self._held.clear()
            self._size = 0
            begin = found.end()
        self._hold(text[begin:])
        return events

    def _hold(self, rest: bytes) -> None:
        if not rest:
            return
        self._held.append(rest)
        self._size += len(rest)
        if self._limit is not None and self._size > 3 * self._limit:
            whole = self.rest
            self._held = [whole[: self._limit], whole[-self._limit :]]
            self._size = 2 * self._limit


def data_of(event: bytes) -> bytes:
    """The data of one event: its ``data`` lines, joined by LF. Empty: it has none."""
    if event.startswith(b"data:") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[5:-2].strip(b" ")
    lines = _LINE.split(event)
    return b"\n".join(line[5:].strip(b" ") for line in lines if line.startswith(b"data:"))


class Hidden(Enum):
    """What the router asked a server for that the client must not see."""

    NOTHING = "nothing"
    LAST = "the event with the usage of the whole stream"
    EACH = "the usage in every event"


def ask_for_counts(
    body: dict[str, Any], path: str, choices: int, asked: Any, by_default: bool | None
) -> Hidden:
    """Have a stream's tokens counted; changes ``stream_options`` of `body` only.

    `asked`: the client's ``stream_options``. `by_default`: whether the decode server tells the usage
    unasked, None while that is not known. Then a usage event cannot be told from a wanted one, and
    is not asked for. A usage event counts all choices together, so for several of a completion
    each event is asked for its own.
    """
    if path == GENERATE or body.get("stream") is not True:
        return Hidden.NOTHING
    if asked is not None and not isinstance(asked, dict):
        return Hidden.NOTHING  # the server refuses it
    options = dict(asked or {})
    hidden = Hidden.NOTHING
    if choices > 1:
        if path == COMPLETIONS and options.get("continuous_usage_stats") in (None, False):
            options["continuous_usage_stats"] = True
            hidden = Hidden.EACH
    elif by_default is False and options.get("include_usage") in (None, False):
        options["include_usage"] = True
        hidden = Hidden.LAST
    if hidden is Hidden.NOTHING:
        if asked is None:
            body.pop("stream_options", None)
        else:
            body["stream_options"] = asked
    else:
        body["stream_options"] = options
    return hidden


def without(hidden: Hidden, event: bytes) -> bytes:
    """What the client sees of an event."""
    if hidden is Hidden.NOTHING:
        return event
    choices = event.find(_CHOICES)
    empty = choices >= 0 and _EMPTY.match(event, choices + len(_CHOICES)) is not None
    if hidden is Hidden.LAST and empty and _USAGE.search(event):
        return b""
    if hidden is Hidden.EACH and not empty:
        # A completion's event always has the key; unasked it says null.
        return _USAGE_OBJECT.sub(b'"usage":null', event)
    return event


@dataclass(slots=True)
class _Choice:
    """Times of its first and its last token in seconds; `tokens` None: not counted. `events`: how
    many brought some, 0 before the first."""

    first_s: float
    last_s: float
    tokens: int | None = None
    events: int = 0
    finished: bool = False

    def tpot_s(self) -> float | None:
        if self.tokens is None or self.tokens < 2 or self.events < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)


class Meter:
    """Of one stream with `choices` choices; told every event when it has come."""

    __slots__ = ("_broken", "_choices", "_expected", "_native", "done")

    def __init__(self, path: str, choices: int) -> None:
        self._native = path == GENERATE
        self._expected = choices
        self._choices: dict[int, _Choice] = {}
        self._broken = False
        self.done = False

    @property
    def finished(self) -> bool:
        """Whether every choice has said why it ended."""
        ended = sum(choice.finished for choice in self._choices.values())
        return ended >= self._expected and not self._broken

    def tpot_s(self) -> float | None:
        """Seconds per token after the first, (last − first) / (tokens − 1): of the slowest choice.

        None if a choice was not counted, if none has two tokens in two events, or after an error.
        """
        choices = self._choices.values()
        if self._broken or any(choice.tokens is None for choice in choices):
            return None
        return max((t for c in choices if (t := c.tpot_s()) is not None), default=None)

    def events(self, events: list[bytes], now_s: float) -> None:
        """Several at once."""
        for event in events:
            self.event(event, now_s)

    def event(self, event: bytes, now_s: float) -> None:
        """One event."""
        one_line = event.find(b"\n") == len(event) - 2
        data = event if one_line else data_of(event)
        finish = data.rfind(_FINISH) if self._expected == 1 else -1
        if finish < 0:
            self._rare(data_of(event), now_s)
            return
        # The text of an answer, which may be long, comes before all that is looked for.
        finish += len(_FINISH)
        finished = not _NULL.match(data, finish)
        if finished and _ABORTED.match(data, finish):
            self._broken = True
            return
        counted = data.rfind(_COUNT)
        number = _NUMBER.match(data, counted + len(_COUNT)) if counted >= 0 else None
        self._saw(0, int(number[1]) if number else None, finished, now_s)

    def _rare(self, data: bytes, now_s: float) -> None:
        """The end, the usage, an error, an extension; any of a stream with several choices."""
        if data.startswith(b"{"):
            self._parsed(data, now_s)
        else:
            self.done = self.done or data == _DONE

    def _parsed(self, data: bytes, now_s: float) -> None:
        try:
            row = orjson.loads(data)
        except orjson.JSONDecodeError:
            self._broken = True
            return
        if isinstance(row.get("error"), dict):
            self._broken = True
            return
        if self._native:
            meta = row.get("meta_info")
            counted = meta if isinstance(meta, dict) else {}
            key, finish = row.get("index"), counted.get("finish_reason")
            aborted = isinstance(finish, dict) and finish.get("type") == "abort"
        else:
            usage = row.get("usage")
            counted = usage if isinstance(usage, dict) else {}
            listed = row.get("choices")
            first = listed[0] if isinstance(listed, list) and listed else None
            if not isinstance(first, dict):
                self._total(counted.get("completion_tokens"))
                return
            key, finish = first.get("index"), first.get("finish_reason")
            aborted = finish == "abort"
        if aborted:
            self._broken = True
            return
        count = counted.get("completion_tokens")
        index = key if isinstance(key, int) and self._expected > 1 else 0
        self._saw(index, count if isinstance(count, int) else None, finish is not None, now_s)

    def _total(self, count: Any) -> None:
        """The usage of the whole stream: of all choices together."""
        if self._expected == 1 and isinstance(count, int):
            for choice in self._choices.values():
                choice.tokens = count

    def _saw(self, key: int, count: int | None, finished: bool, now_s: float) -> None:
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = _Choice(now_s, now_s)
        elif choice.finished:
            return  # hidden states and the like come behind the tokens
        choice.finished = finished
        if count is not None:
            new = choice.tokens is None or count > choice.tokens
            choice.tokens = max(count, choice.tokens or 0)
        else:
            # Counted once at the end: the last event is the last token's. Where each event counts,
            # one without brings nothing.
            new = not self._native and self._expected == 1
        if new and choice.tokens != 0:
            choice.first_s = choice.first_s if choice.events else now_s
            choice.last_s = now_s
            choice.events += 1


@dataclass(slots=True)
class Relayed:
    """What went through. `whole`: the client has been sent all of the answer; `ended`: and knows."""

    started: bool = False
    is_stream: bool = False
    whole: bool = False
    ended: bool = False
    meter: Meter | None = None

    def tpot_s(self) -> float | None:
        """Seconds per token after the first (`Meter.tpot_s`); None unless it was a stream."""
        return self.meter.tpot_s() if self.meter is not None else None

    def enough(self) -> bool:
        """Whether a client that leaves now has its answer, but for the words after the last token."""
        return self.whole or (self.meter is not None and self.meter.finished)
