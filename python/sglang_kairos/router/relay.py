"""Decode's answer on its way to the client, as it comes, and what can be measured of it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import aiohttp

from sglang_kairos.router.answers import Headers, Send
from sglang_kairos.router.exchange import DecodeHead
from sglang_kairos.router.headers import returned
from sglang_kairos.router.logprobs import Merger
from sglang_kairos.slo_http import error_body

_DONE = b"data: [DONE]\n\n"
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":\s*(\d{1,9})')


@dataclass(slots=True)
class Relayed:
    """What went through. Seconds of `time.monotonic`."""

    started: bool = False
    first_s: float = 0.0
    last_s: float = 0.0
    events: int = 0
    last_chunk: bytes = b""
    is_stream: bool = False

    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None unless it was a stream of two or more."""
        counted = _COMPLETION_TOKENS.findall(self.last_chunk)
        tokens = int(counted[-1]) if counted else self.events
        if not self.is_stream or tokens < 2:
            return None
        return (self.last_s - self.first_s) / (tokens - 1)


async def relay(
    head: DecodeHead, seen: Relayed, send: Send, own: Headers, merger: Merger | None
) -> BaseException | None:
    """Send the answer on; what broke it off, if anything did. `seen` is kept up to date."""
    response = head.response
    headers = returned(response.headers)
    if merger is not None:
        headers = [pair for pair in headers if pair[0] != b"content-length"]
    seen.is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
    seen.started = True
    seen.first_s = time.monotonic()
    start = {"type": "http.response.start", "status": response.status, "headers": headers + own}
    await send(start)
    chunk = head.first
    content = response.content
    try:
        while chunk:
            if b'"usage"' in chunk or b"completion_tokens" in chunk:
                seen.last_chunk = chunk
            seen.events += chunk.count(b"data: {")
            if chunk != _DONE:
                seen.last_s = time.monotonic()
            if merger is not None:
                chunk = merger.feed(chunk)
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await content.readany()
    except (aiohttp.ClientError, OSError) as error:
        return error
    last = merger.end() if merger is not None else b""
    await send({"type": "http.response.body", "body": last})
    return None


async def break_off(seen: Relayed, send: Send, status: int, message: str, kind: str) -> None:
    """End an answer that cannot go on: an event says so in a stream, anything else is left torn."""
    if seen.is_stream:
        event = error_body("/v1/", status, message, kind)
        last = b"data: " + event + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last})
