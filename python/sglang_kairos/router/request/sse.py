"""Server-sent events out of the bytes of a stream, however the reads cut them."""

from __future__ import annotations

import re

# Two line ends in a row, each of LF, CR LF or CR. A CR at the end of what is there may be half of
# a CR LF, so it ends nothing yet.
_END = re.compile(rb"(?:\r\n|\n|\r(?=[^\n]))(?:\r\n|\n|\r(?=[^\n]))")
_LINE = re.compile(rb"\r\n|\n|\r")
_LONGEST_END = 4


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
