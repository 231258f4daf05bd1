"""Takes SLOs from HTTP requests: a middleware in front of SGLang's FastAPI app.

Clients that talk to a server directly (no Kairos router) name their SLO in the body or in headers.
The middleware puts it where SGLang carries it to its schedulers. It answers a bad value with HTTP
400, and so it does with what would harm a scheduler (`slo.limits`). It imports nothing of SGLang.
Requests that say nothing about SLOs pass through byte for byte.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from starlette.middleware import Middleware

from sglang_kairos.slo.body import AGE_STEP_MS, SLO_PATHS, carry, dump, error_body, mentions_slo
from sglang_kairos.slo.limits import (
    NO_LIMITS,
    RequestError,
    RequestLimits,
    check_bootstrap,
    check_request,
)
from sglang_kairos.slo.targets import SloError, SloTable

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class HasMiddleware(Protocol):
    """The part of a Starlette or FastAPI app that `install` touches."""

    user_middleware: list[Any]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the middleware knows of its server.

    `preferred`: the ``custom_params`` among its preferred sampling parameters. `needs_bootstrap`:
    it decodes what others prefill.
    """

    limits: RequestLimits = NO_LIMITS
    preferred: Mapping[str, Any] = field(default_factory=dict)
    needs_bootstrap: bool = False


UNKNOWN = ServerFacts()


class SloMiddleware:
    """A pure ASGI middleware: it streams the response and buffers the request body once."""

    def __init__(
        self,
        app: App,
        table: SloTable,
        facts: ServerFacts = UNKNOWN,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        count: Callable[[str], None] | None = None,
    ) -> None:
        self._app = app
        self._clock, self._wall_clock = clock, wall_clock
        self._count = count
        self._table = table
        self._facts = facts
        self._notes: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _route_path(scope)
        if path not in SLO_PATHS or scope.get("method") not in ("POST", "PUT"):
            await self._app(scope, receive, send)
            return
        arrived_s = self._clock()
        raw, ended = await _read_body(receive)
        if ended is not None:
            # The client left in the middle of its body. The app behind sees just that.
            await self._app(scope, _replay(raw, receive, ended), send)
            return
        try:
            raw, scope = self._checked(raw, path, scope, arrived_s)
        except (SloError, RequestError) as error:
            await _answer_400(send, error_body(path, 400, str(error), param=error.field))
            return
        except ValueError as error:
            await _answer_400(send, error_body(path, 400, str(error)))
            return
        await self._app(scope, _replay(raw, receive, None), send)

    def _checked(
        self, raw: bytes, path: str, scope: Scope, arrived_s: float
    ) -> tuple[bytes, Scope]:
        """Returns the body to pass on and its scope; malformed JSON stays as it is.

        Raises SloError or RequestError.
        """
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            # SGLang reads with Python's json, which accepts NaN too, so such a body is checked as well.
            body = _python_json(raw)
            if isinstance(body, dict):
                check_request(body, path, self._facts.limits)
            return raw, scope
        if not isinstance(body, dict):
            return raw, scope
        check_request(body, path, self._facts.limits)
        if self._facts.needs_bootstrap:
            check_bootstrap(body)
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        if not mentions_slo(raw, headers, self._table):
            return raw, scope
        notes: list[str] = []
        age_ms = 1e3 * (self._clock() - arrived_s)
        carried = carry(
            body,
            path,
            headers,
            self._table,
            age_ms=age_ms if age_ms >= AGE_STEP_MS else 0.0,
            now_s=self._wall_clock(),
            preferred=self._facts.preferred,
            notes=notes,
        )
        self._tell(notes)
        if not carried.changed:
            return raw, scope
        changed = dump(body)
        kept = [
            (name, value)
            for name, value in scope["headers"]
            if name not in (b"content-length", b"transfer-encoding")
        ]
        kept.append((b"content-length", str(len(changed)).encode()))
        return changed, {**scope, "headers": kept}

    def _tell(self, notes: list[str]) -> None:
        """Counts the notes, and logs the first, tenth, hundredth … header of a kind."""
        for note in notes:
            if self._count is not None:
                self._count(note)
            self._notes[note] += 1
            count = self._notes[note]
            if count == 10 ** (len(str(count)) - 1):
                logger.warning("Kairos: SLO header %s, seen %d times", note, count)


def _python_json(raw: bytes) -> Any:
    """Returns what `json` reads; None if it cannot."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def install(
    app: HasMiddleware,
    table: SloTable,
    facts: ServerFacts = UNKNOWN,
    count: Callable[[str], None] | None = None,
) -> None:
    """Puts the middleware into a FastAPI app that has not served yet, as the innermost one.

    Innermost means after API-key checks (a stranger learns nothing) and after SGLang's own request
    decompression (the body is plain JSON). `count` is told of each header that was not taken as
    written. Does nothing when it is there.
    """
    if any(item.cls is SloMiddleware for item in app.user_middleware):
        return
    app.user_middleware.append(Middleware(SloMiddleware, table=table, facts=facts, count=count))


def _route_path(scope: Scope) -> str:
    if scope["type"] != "http":
        return ""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path


async def _read_body(receive: Receive) -> tuple[bytes, Message | None]:
    """Returns the whole body, and the message that ended it early (None: it is complete)."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks), message
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks), None


def _replay(raw: bytes, receive: Receive, ended: Message | None) -> Receive:
    """Returns a `receive` that hands out the buffered body once, then `ended` or the real messages."""
    body: bytes | None = raw
    end = ended

    async def replay() -> Message:
        nonlocal body, end
        if body is not None:
            message: Message = {
                "type": "http.request",
                "body": body,
                "more_body": end is not None,
            }
            body = None  # the app has its own reference; ours would keep the bytes in memory
            return message
        if end is not None:
            last, end = end, None
            return last
        return await receive()

    return replay


async def _answer_400(send: Send, content: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})
