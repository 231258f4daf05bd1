"""Small answers of the router's own, written to ASGI."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from sglang_kairos.slo.body import error_body

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


async def answer(send: Send, status: int, body: bytes, headers: Headers | None = None) -> None:
    """A whole answer; JSON unless `headers` say otherwise."""
    own = list(headers or [])
    if not any(name == b"content-type" for name, _ in own):
        own.append((b"content-type", b"application/json"))
    own.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})


async def refuse(
    send: Send,
    path: str,
    status: int,
    message: str,
    kind: str,
    *,
    param: str | None = None,
    retry_after_s: int | None = None,
    facts: dict[str, Any] | None = None,
    headers: Headers | None = None,
) -> int:
    """An error in the shape that clients of `path` read; `facts` go beside its message. `status`."""
    body = error_body(path, status, message, kind, param)
    if facts:
        decoded = orjson.loads(body)
        decoded["error"] |= facts
        body = orjson.dumps(decoded)
    own = list(headers or [])
    if retry_after_s is not None:
        own.append((b"retry-after", str(retry_after_s).encode()))
    await answer(send, status, body, own)
    return status
