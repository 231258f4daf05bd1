"""Decode's answer on its way to the client, as it comes, and what can be measured of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import aiohttp

from sglang_kairos.router.request.headers import returned
from sglang_kairos.router.request.logprobs import Merger
from sglang_kairos.router.request.sse import Splitter
from sglang_kairos.router.request.token_times import Hidden, Meter, without
from sglang_kairos.router.request.upstream_stream import DecodeHead
from sglang_kairos.router.responses import Headers, Send
from sglang_kairos.slo.body import error_body

# Of an event only passed on, more than this of either end is not looked at.
_LOOKED_AT = 64 * 1024


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


class Passage:
    """One answer from decode to the client, without what is `hidden` from it."""

    def __init__(
        self,
        head: DecodeHead,
        seen: Relayed,
        send: Send,
        meter: Meter,
        hidden: Hidden = Hidden.NOTHING,
        merger: Merger | None = None,
    ) -> None:
        self._head, self._seen, self._send = head, seen, send
        self._merger = merger
        content_type = head.response.headers.get("content-type", "")
        seen.is_stream = content_type.startswith("text/event-stream")
        seen.meter = meter if seen.is_stream else None
        self._hidden = hidden if seen.is_stream else Hidden.NOTHING
        self._splitter = Splitter(_LOOKED_AT if self._hidden is Hidden.NOTHING else None)

    @property
    def exhausted(self) -> bool:
        """Whether decode has sent its last byte: then its connection is free again."""
        return self._head.response.content.at_eof()

    @property
    def _holds(self) -> bool:
        """Whether some of what has come may not have been sent."""
        return self._merger is not None or self._hidden is not Hidden.NOTHING

    def _done(self) -> bool:
        return self._seen.meter is not None and self._seen.meter.done

    async def relay(self, own: Headers) -> BaseException | None:
        """Send the answer on; what broke it off, if anything did. `seen` is kept up to date."""
        response, seen = self._head.response, self._seen
        headers = returned(response.headers)
        if self._holds:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        seen.started = True
        start = {"type": "http.response.start", "status": response.status, "headers": headers + own}
        await self._send(start)
        chunk, content = self._head.first, response.content
        try:
            while chunk:
                # With its last byte here, an answer is ended with one message instead of two.
                last = not self._holds and content.at_eof()
                await self._pass(chunk, more=not last)
                if last:
                    seen.whole = seen.ended = True
                    return None
                # With the last byte of a body of known length its end is known as well.
                seen.whole = self._done() or (not self._holds and content.at_eof())
                chunk = await content.readany()
        except (aiohttp.ClientError, OSError) as error:
            if not seen.whole:
                return error
        rest = b"" if self._hidden is Hidden.NOTHING else self._splitter.rest
        if self._merger is not None:
            rest = self._merger.feed(rest) + self._merger.end()
        await self._send({"type": "http.response.body", "body": rest})
        seen.whole = seen.ended = True
        return None

    async def read_on(self) -> None:
        """Read and measure what comes after the client has left. aiohttp.ClientError, OSError."""
        content = self._head.response.content
        while chunk := await content.readany():
            self._measure(self._splitter.feed(chunk), time.monotonic())

    async def end(self) -> None:
        """Tell the client that its answer has ended, if it has not been told."""
        if not self._seen.ended:
            self._seen.ended = True
            await self._send({"type": "http.response.body", "body": b""})

    async def _pass(self, chunk: bytes, more: bool) -> None:
        now = time.monotonic()
        events: list[bytes] = []
        if self._hidden is not Hidden.NOTHING:
            events = self._splitter.feed(chunk)
            chunk = b"".join([without(self._hidden, event) for event in events])
        shown = chunk if self._merger is None else self._merger.feed(chunk)
        if shown:
            await self._send({"type": "http.response.body", "body": shown, "more_body": more})
        if self._seen.meter is not None:
            if self._hidden is Hidden.NOTHING:
                events = self._splitter.feed(chunk)
            self._measure(events, now)

    def _measure(self, events: list[bytes], now_s: float) -> None:
        if self._seen.meter is not None:
            for event in events:
                self._seen.meter.event(event, now_s)


async def break_off(seen: Relayed, send: Send, status: int, message: str, kind: str) -> None:
    """End an answer that cannot go on: an event says so in a stream, anything else is left torn."""
    if seen.is_stream:
        event = error_body("/v1/", status, message, kind)
        last = b"data: " + event + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last})
