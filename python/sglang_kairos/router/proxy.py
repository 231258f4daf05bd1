"""The serving endpoints: one request, from its body to the last byte of its answer.

Nothing is sent to the client before decode's first byte, which for a stream is its first token:
until then the request can still move to another pair, or be answered with prefill's error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.exchange import (
    DecodeHead,
    Exchange,
    PrefillError,
    ServerFailed,
    forwarded,
    returned,
)
from sglang_kairos.router.fleet import DecodeServer, Fleet, PrefillServer, Server, is_unreachable
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.prompt import (
    Prompt,
    Unfoldable,
    describe,
    name_requests,
    pair_up,
    unfold_samples,
)
from sglang_kairos.slo import RequestSlo, SloError, SloTable
from sglang_kairos.slo_http import carry, dump, error_body

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_LEFT = 499
_DRAIN_S = 30.0
# Of the output a request allows, what it is expected to use.
_OUTPUT_SHARE = 0.5


class ClientLeft(Exception):
    """Nobody is waiting for the answer any more."""


class BadRequest(Exception):
    """The body cannot be used; `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(slots=True)
class Call:
    """A request the router has accepted."""

    path: str
    headers: list[tuple[str, str]]
    body: dict[str, Any]
    prompt: Prompt
    arrived_s: float
    deadline_s: float
    aged_s: float
    own_rid: bool
    tried: set[Server] = field(default_factory=set)
    predicted_s: float = 0.0
    aborting: asyncio.Task[None] | None = None


class PairProxy:
    """The ASGI app of the three endpoints. With `carries` off, SLOs are neither read nor sent."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        table: SloTable,
        metrics: RouterMetrics,
        *,
        carries: bool = True,
        max_retries: int = 3,
    ) -> None:
        self._fleet = fleet
        self._session = session
        self._table = table
        self._carries = carries
        self._metrics = metrics
        self._max_retries = max_retries
        self._background: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        path = scope["path"]
        self._metrics.in_flight.inc()
        status = CLIENT_LEFT
        try:
            call = await self._accept(scope, receive, arrived)
            status = await self._serve(call, receive, send)
        except BadRequest as error:
            status = 400
            await _answer(send, 400, error_body(path, 400, str(error), param=error.param))
        except ClientLeft:
            pass
        finally:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(path, str(status)).inc()

    async def finish(self) -> None:
        """Wait a moment for drains and aborts still running (shutdown)."""
        if self._background:
            await asyncio.wait(self._background, timeout=1.0)

    async def _accept(self, scope: Scope, receive: Receive, arrived_s: float) -> Call:
        """Read and check a request. BadRequest or ClientLeft."""
        raw = await _read(receive)
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"malformed JSON: {error}") from None
        if not isinstance(body, dict):
            raise BadRequest("malformed request: the body must be a JSON object")
        path = scope["path"]
        try:
            unfold_samples(body, path)
        except Unfoldable as error:
            raise BadRequest(str(error), "n") from None
        slo = self._slo(body, scope, arrived_s)
        now = time.monotonic()
        return Call(
            path=path,
            headers=forwarded(scope["headers"]),
            body=body,
            prompt=describe(body, path),
            arrived_s=arrived_s,
            deadline_s=now + (slo.slo.ttft_ms - slo.age_ms) / 1e3,
            aged_s=now,
            own_rid=body.get("rid") is None,
        )

    def _slo(self, body: dict[str, Any], scope: Scope, arrived_s: float) -> RequestSlo:
        if not self._carries:
            return RequestSlo(self._table.default)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        age_ms = 1e3 * (time.monotonic() - arrived_s)
        try:
            return carry(body, scope["path"], headers, self._table, age_ms=age_ms, always=True).slo
        except SloError as error:
            raise BadRequest(str(error), error.field) from None

    async def _serve(self, call: Call, receive: Receive, send: Send) -> int:
        """Serve an accepted request on one pair after another; the status it was answered with."""
        left = asyncio.ensure_future(_disconnected(receive))
        reason = "no server"
        try:
            for attempt in range(self._max_retries + 1):
                found = self._fleet.choose(self._placed(call), call.tried)
                if found is None:
                    break
                prefill, decode, call.predicted_s = found
                self._metrics.retries.inc(1 if attempt else 0)
                try:
                    return await self._attempt(call, prefill, decode, left, send)
                except ServerFailed as error:
                    reason = str(error)
                    self._note(error)
                    if not error.retryable:
                        return await self._fail(send, call.path, 504, reason, "Timeout")
                    if is_unreachable(error.cause):
                        call.tried.add(error.server)
                    if call.aborting is not None and not call.own_rid:
                        # The client's own id is still taken on the server that did answer.
                        await asyncio.wait({call.aborting}, timeout=1.0)
            return await self._fail(
                send, call.path, 503, f"no server could take the request: {reason}", "Unavailable"
            )
        finally:
            left.cancel()

    def _placed(self, call: Call) -> PlacedRequest:
        fleet, prompt = self._fleet, call.prompt
        return PlacedRequest(
            tokens=prompt.tokens + prompt.text_bytes / fleet.bytes_per_token.value,
            deadline_s=call.deadline_s,
            output_tokens=_OUTPUT_SHARE * prompt.output_tokens * prompt.samples,
            prompts=prompt.prompts * prompt.samples,
            handoff_s=fleet.handoff.value,
        )

    async def _attempt(
        self,
        call: Call,
        prefill: PrefillServer,
        decode: DecodeServer,
        left: asyncio.Future[None],
        send: Send,
    ) -> int:
        """One pair. ServerFailed when another may be tried; ClientLeft; else the status sent."""
        rids = name_requests(call.body, call.prompt, call.own_rid)
        pair_up(call.body, call.prompt.batch, prefill.host, prefill.bootstrap_port, self._fleet.rng)
        exchange = Exchange(
            self._session, prefill, decode, call.path, self._payload(call), call.headers, rids
        )
        placed, now = self._placed(call), time.monotonic()
        ticket = prefill.owe(placed.tokens, call.deadline_s, now)
        decode.join(placed.prompts, placed.tokens + placed.output_tokens)

        def prefilled() -> None:
            prefill.settle(ticket, time.monotonic(), served=True)
            if exchange.prompt_tokens and call.prompt.text_bytes and call.prompt.batch is None:
                known = exchange.prompt_tokens - call.prompt.tokens
                if known > 0:
                    self._fleet.bytes_per_token.observe(call.prompt.text_bytes / known)

        first = asyncio.create_task(exchange.run_prefill(prefilled))
        second = asyncio.create_task(exchange.run_decode())
        answered = False
        try:
            head = await _first_answer(first, second, left)
            if isinstance(head, PrefillError):
                headers = [(b"content-type", head.content_type.encode("latin-1"))]
                await _answer(send, head.status, head.body, headers)
                return head.status
            self._observe(call, exchange, head)
            broken = await _relay(head, left, send)
            if broken is not None:
                self._note(ServerFailed(decode, broken))
            answered = broken is None and head.response.status == 200
            return head.response.status
        finally:
            prefill.settle(ticket, time.monotonic(), served=False)
            decode.leave(placed.prompts, placed.tokens + placed.output_tokens)
            second.cancel()
            if answered and not first.done():
                self._spawn(_drain(first, exchange))
            elif answered:
                _ = first.exception()
            else:
                first.cancel()
                call.aborting = self._spawn(_abort(first, second, exchange))

    def _payload(self, call: Call) -> bytes:
        """The body to send now, its age brought up to date. BadRequest if it cannot be written."""
        now = time.monotonic()
        if self._carries:
            age_ms = 1e3 * (now - call.aged_s)
            carry(call.body, call.path, {}, self._table, age_ms=age_ms)
            call.aged_s = now
        try:
            return dump(call.body)
        except ValueError as error:
            raise BadRequest(str(error)) from None

    def _observe(self, call: Call, exchange: Exchange, head: DecodeHead) -> None:
        if head.response.status != 200:
            return
        now = time.monotonic()
        ttft = now - call.arrived_s
        self._metrics.ttft.labels(call.path).observe(ttft)
        if now > call.deadline_s:
            self._metrics.late.labels(call.path).inc()
        if call.prompt.stream:
            self._metrics.prediction_error.observe(abs(ttft - call.predicted_s))
            if exchange.prefilled_s is not None:
                self._fleet.handoff.observe(now - exchange.prefilled_s)

    def _note(self, error: ServerFailed) -> None:
        kind = "unreachable" if is_unreachable(error.cause) else type(error.cause).__name__
        self._metrics.errors.labels(error.server.url, kind).inc()
        if is_unreachable(error.cause):
            error.server.mark_down()
        logger.warning("%s", error)

    async def _fail(self, send: Send, path: str, status: int, message: str, kind: str) -> int:
        headers = [(b"retry-after", b"1")] if status == 503 else []
        await _answer(send, status, error_body(path, status, message, kind), headers)
        return status

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeft
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first_answer(
    prefill: asyncio.Task[PrefillError | None],
    decode: asyncio.Task[DecodeHead],
    left: asyncio.Future[None],
) -> DecodeHead | PrefillError:
    """Decode's head or prefill's error, whichever is first. ServerFailed, ClientLeft."""
    waiting: set[asyncio.Future[Any]] = {prefill, decode, left}
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if left in done:
            raise ClientLeft
        if prefill in done:
            error = prefill.result()
            if error is not None:
                return error
        if decode in done:
            return decode.result()


async def _relay(head: DecodeHead, left: asyncio.Future[None], send: Send) -> BaseException | None:
    """Send decode's answer on as it comes; what broke it off, if anything did. ClientLeft."""
    pump = asyncio.create_task(_pump(head, send))
    try:
        racing: set[asyncio.Future[Any]] = {pump, left}
        await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
        if not pump.done():
            raise ClientLeft
        return await pump
    finally:
        pump.cancel()


async def _pump(head: DecodeHead, send: Send) -> BaseException | None:
    response = head.response
    headers = returned(response.headers)
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    chunk = head.first
    try:
        while chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            chunk = await response.content.readany()
    except (aiohttp.ClientError, OSError) as error:
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            text = f"the decode server broke off: {error!r}"
            event = error_body("/v1/", 502, text, "BadGateway")
            last = b"data: " + event + b"\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": last})
        return error
    await send({"type": "http.response.body", "body": b""})
    return None


async def _drain(prefill: asyncio.Task[PrefillError | None], exchange: Exchange) -> None:
    """Let prefill finish its answer, so that its connection can be used again."""
    await asyncio.wait({prefill}, timeout=_DRAIN_S)
    prefill.cancel()
    await asyncio.gather(prefill, return_exceptions=True)
    exchange.close()


async def _abort(prefill: asyncio.Task[Any], decode: asyncio.Task[Any], exchange: Exchange) -> None:
    await asyncio.gather(prefill, decode, return_exceptions=True)
    await exchange.abort()


async def _answer(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    own = list(headers or [])
    if not any(name == b"content-type" for name, _ in own):
        own.append((b"content-type", b"application/json"))
    own.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})
