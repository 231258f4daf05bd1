"""One request on one pair: the same body to both servers, prefill's answer drained, decode's kept.

A prefill server answers when its KV has been taken over, with one token nobody needs; its errors
matter. With ``stream`` they come as status 200 and an event, so the beginning is kept and read.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import orjson

from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer, Server

KEEP_BYTES = 256 * 1024
_ABORT_TIMEOUT_S = 5.0
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":\s*(\d{1,9})')


class ServerGone(ConnectionError):
    """Its probes failed while a request was waiting for it."""


class ServerFailed(Exception):
    """A server could not be reached or broke off before it answered anything."""

    def __init__(self, server: Server, cause: BaseException) -> None:
        super().__init__(f"{server.role} server {server.url}: {cause!r}")
        self.server = server
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Refusal:
    """A server's refusal, as it goes to the client."""

    status: int
    content_type: str
    body: bytes


class DecodeHead(NamedTuple):
    """Decode's status and headers, and the first bytes of its body (empty: the body is)."""

    response: aiohttp.ClientResponse
    first: bytes


class Exchange:
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
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.prefilled_s: float | None = None
        self.prompt_tokens = 0
        self.prefill_body = b""
        self.prefill_cut = False
        self._keep_bytes = keep_bytes
        self._session = session
        self._path = path
        # For both legs: aiohttp would look up how to send bytes, and wrap them, for each.
        self._payload = aiohttp.BytesPayload(payload)
        self._headers = headers
        self._rids = rids
        self._responses: dict[str, aiohttp.ClientResponse] = {}

    async def run_prefill(self, on_done: Callable[[], None]) -> Refusal | None:
        """Send, and drain the answer; `on_done` when the prompt is prefilled. ServerFailed."""
        try:
            response = await self._post(self.prefill)
            kept = bytearray()
            while chunk := await response.content.readany():
                room = self._keep_bytes - len(kept)
                self.prefill_cut |= len(chunk) > room
                kept += chunk[:room]
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(self.prefill, error) from error
        failure = _prefill_error(response, bytes(kept))
        if failure is None:
            self.prefilled_s = time.monotonic()
            if self._keep_bytes > KEEP_BYTES:
                self.prefill_body = bytes(kept)
            counted = _PROMPT_TOKENS.search(kept)
            self.prompt_tokens = int(counted[1]) if counted else 0
            on_done()
        return failure

    async def run_decode(self) -> DecodeHead:
        """Send, and wait for the first bytes of the answer. ServerFailed."""
        try:
            response = await self._post(self.decode)
            return DecodeHead(response, await response.content.readany())
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFailed(self.decode, error) from error

    async def abort(self) -> None:
        """Stop both servers working on it: close the connections and name the ids, if known.

        Closing alone is enough, but SGLang looks for a closed connection only every few seconds.
        """
        self.close()
        bodies = [orjson.dumps({"rid": rid}) for rid in self._rids]
        servers: list[PrefillServer | DecodeServer]
        servers = [self.decode] if self.prefilled_s else [self.decode, self.prefill]
        await asyncio.gather(*(self._abort_one(s, body) for s in servers for body in bodies))

    def close(self) -> None:
        """Drop connections whose answer has not been read to the end."""
        for response in self._responses.values():
            response.close()

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


def is_unreachable(error: BaseException) -> bool:
    """Whether an error means that nobody is there, rather than slowly or badly."""
    kinds = (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError, ServerGone)
    return isinstance(error, kinds)


def _prefill_error(response: aiohttp.ClientResponse, body: bytes) -> Refusal | None:
    content_type = response.headers.get("content-type", "application/json")
    if response.status != 200:
        return Refusal(response.status, content_type, body)
    if not content_type.startswith("text/event-stream"):
        return None
    return stream_error(body)


def stream_error(body: bytes) -> Refusal | None:
    """The error that a stream reports in one of these events, which HTTP's status did not."""
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
            return Refusal(status, "application/json", orjson.dumps({"error": error}))
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
