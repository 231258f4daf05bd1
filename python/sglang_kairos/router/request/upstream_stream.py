"""One request on one pair: the same body to both servers, prefill's answer drained, decode's kept.

A prefill server answers when its KV has been taken over, with one token nobody needs; its errors
matter. With ``stream`` they come as status 200 and an event, so the beginning is kept and read.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import aiohttp
import orjson

from sglang_kairos.router.clock import SYSTEM_CLOCK, Clock
from sglang_kairos.router.errors import Rejected, ServerFailed
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer, Server
from sglang_kairos.router.request.logprobs import Merger
from sglang_kairos.router.request.sse import Hidden, Meter, Relayed, Splitter, without
from sglang_kairos.router.responses import Headers, Send, returned
from sglang_kairos.slo.body import error_body

KEEP_BYTES = 256 * 1024
# Of an event only passed on, more than this of either end is not looked at.
_LOOKED_AT = 64 * 1024
_ABORT_TIMEOUT_S = 5.0
_JSON = "application/json"
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d{1,9})')


class DecodeHead(NamedTuple):
    """Decode's status and headers, and the first bytes of its body (empty: the body is)."""

    response: aiohttp.ClientResponse
    first: bytes


class UpstreamPair:
    """Both legs of one attempt. `close` always, and `abort` instead if nobody wants the answer."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        prefill: PrefillServer,
        decode: DecodeServer,
        path: str,
        payload: bytes,
        headers: list[tuple[str, str]],
        rids: list[str],
        keep_bytes: int = KEEP_BYTES,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.prefilled_s: float | None = None
        self.prompt_tokens = 0
        self.prefill_body = b""
        self.prefill_cut = False
        self._keep_bytes = keep_bytes
        self._session = session
        self._clock = clock
        self._path = path
        # For both legs: aiohttp would look up how to send bytes, and wrap them, for each.
        self._payload = aiohttp.BytesPayload(payload)
        self._headers = headers
        self.rids = rids
        self._responses: dict[str, aiohttp.ClientResponse] = {}

    async def run_prefill(self, on_done: Callable[[], None]) -> None:
        """Send, and drain the answer; `on_done` when the prompt is prefilled.

        Raises ServerFailed or Rejected.
        """
        try:
            response = await self._post(self.prefill)
            kept = bytearray()
            while chunk := await response.content.readany():
                room = self._keep_bytes - len(kept)
                self.prefill_cut |= len(chunk) > room
                kept += chunk[:room]
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(self.prefill, error) from error
        self._check_prefill(response, bytes(kept))
        self.prefilled_s = self._clock.now_s()
        if self._keep_bytes > KEEP_BYTES:
            self.prefill_body = bytes(kept)
        counted = _PROMPT_TOKENS.search(kept)
        self.prompt_tokens = int(counted[1]) if counted else 0
        on_done()

    async def run_decode(self, stream: bool) -> DecodeHead:
        """Send, and wait for the first bytes of the answer. Raises ServerFailed or Rejected.

        `stream`: the answer may come as events, of which the first may be an error.
        """
        try:
            response = await self._post(self.decode)
            head = DecodeHead(response, await response.content.readany())
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(self.decode, error) from error
        if response.status >= 400:
            raise await _rejection(self.decode, head)
        if stream and (refused := stream_error(self.decode, head.first)) is not None:
            raise refused
        return head

    async def abort(self) -> None:
        """Stop both servers working on it: close the connections and name the ids, if known.

        Closing alone is enough, but SGLang looks for a closed connection only every few seconds.
        """
        self.close()
        bodies = [orjson.dumps({"rid": rid}) for rid in self.rids]
        servers: list[PrefillServer | DecodeServer]
        servers = [self.decode] if self.prefilled_s else [self.decode, self.prefill]
        await asyncio.gather(*(self._abort_one(s, body) for s in servers for body in bodies))

    def close(self) -> None:
        """Drop connections whose answer has not been read to the end."""
        for response in self._responses.values():
            response.close()

    def _check_prefill(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        """Raises Rejected if prefill's answer is an error."""
        content_type = response.headers.get("content-type", _JSON)
        if response.status != 200:
            raise Rejected(self.prefill, response.status, content_type, body)
        if content_type.startswith("text/event-stream"):
            refused = stream_error(self.prefill, body)
            if refused is not None:
                raise refused

    async def _post(self, server: PrefillServer | DecodeServer) -> aiohttp.ClientResponse:
        response = await self._session.post(
            server.url + self._path,
            data=self._payload,
            headers=self._headers,
            allow_redirects=False,
        )
        self._responses[server.role] = response
        return response

    async def _abort_one(self, server: PrefillServer | DecodeServer, body: bytes) -> None:
        kept = [header for header in self._headers if header[0] == "authorization"]
        try:
            async with self._session.post(
                server.url + "/abort_request",
                data=body,
                headers=[("content-type", "application/json"), *kept],
                timeout=aiohttp.ClientTimeout(total=_ABORT_TIMEOUT_S),
            ) as response:
                await response.read()
        except (aiohttp.ClientError, OSError):
            pass  # gone: then so is the request


async def _rejection(server: Server, head: DecodeHead) -> Rejected:
    """Decode's error, read to its end."""
    response = head.response
    content_type = response.headers.get("content-type", _JSON)
    try:
        body = head.first + await response.content.read()
    except (aiohttp.ClientError, OSError):
        body = head.first
    return Rejected(server, response.status, content_type, body)


def stream_error(server: Server, body: bytes) -> Rejected | None:
    """Returns the error that one of these events reports, which HTTP's status did not."""
    if b'"error"' not in body and b'"abort"' not in body:
        return None
    for line in body.split(b"\n"):
        if not line.startswith(b"data:") or (b'"error"' not in line and b'"abort"' not in line):
            continue
        try:
            event = orjson.loads(line[5:])
        except orjson.JSONDecodeError:
            continue
        error = _event_error(event)
        if error is not None:
            code = error.get("code")
            status = code if isinstance(code, int) and 400 <= code <= 599 else 500
            return Rejected(server, status, _JSON, orjson.dumps({"error": error}))
    return None


def _event_error(event: Any) -> dict[str, Any] | None:
    """The error an event of a stream reports, in OpenAI's shape."""
    if not isinstance(event, dict):
        return None
    error = event.get("error")
    if isinstance(error, dict):
        return error
    meta = event.get("meta_info")
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    if isinstance(reason, dict) and reason.get("type") == "abort":
        return {
            "message": str(reason.get("message") or "aborted by the prefill server"),
            "type": str(reason.get("err_type") or "InternalServerError"),
            "param": None,
            "code": reason.get("status_code") or 500,
        }
    return None


class AnswerRelay:
    """One answer from decode to the client, without what is `hidden` from it."""

    def __init__(
        self,
        head: DecodeHead,
        seen: Relayed,
        send: Send,
        meter: Meter,
        hidden: Hidden = Hidden.NOTHING,
        merger: Merger | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._head, self._seen, self._send = head, seen, send
        self._merger = merger
        self._clock = clock
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
            events = self._splitter.feed(chunk)
            if self._seen.meter is not None:
                self._seen.meter.events(events, self._clock.now_s())

    async def end(self) -> None:
        """Tell the client that its answer has ended, if it has not been told."""
        if not self._seen.ended:
            self._seen.ended = True
            await self._send({"type": "http.response.body", "body": b""})

    async def _pass(self, chunk: bytes, more: bool) -> None:
        now = self._clock.now_s()
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
            self._seen.meter.events(events, now)


async def break_off(seen: Relayed, send: Send, status: int, message: str, kind: str) -> None:
    """End an answer that cannot go on: an event says so in a stream, anything else is left torn."""
    if seen.is_stream:
        event = error_body("/v1/", status, message, kind)
        last = b"data: " + event + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last})
