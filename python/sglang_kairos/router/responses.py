"""What goes to clients besides a server's answer: answers of the router's own, and headers.

Headers that pass the router are end-to-end ones, without those it answers for itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

from sglang_kairos.slo.age import START_HEADERS
from sglang_kairos.slo.body import error_body
from sglang_kairos.slo.request import SLO_HEADERS

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

# Hop-by-hop headers, those that this router answers for, and those that would undo the pairing.
_NOT_FORWARDED = frozenset(
    """accept-encoding connection content-length expect host keep-alive proxy-authenticate
    proxy-authorization proxy-connection te trailer transfer-encoding upgrade
    x-override-bootstrap-host x-override-bootstrap-port x-override-bootstrap-room""".split()
) | {*SLO_HEADERS, *START_HEADERS}
_NOT_RETURNED = frozenset(
    """connection date keep-alive proxy-connection server te trailer transfer-encoding
    upgrade x-request-id""".split()
)


# Browsers are answered by the router, for servers that would let everybody in.
_CORS = "access-control-"


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


def forwarded(raw: list[tuple[bytes, bytes]], drop_auth: bool = False) -> list[tuple[str, str]]:
    """The client's end-to-end headers for the servers, without those the router answers for.

    `drop_auth`: the client's key is the router's, not the servers'.
    """
    named = {
        word.strip().lower()
        for key, value in raw
        if key == b"connection"
        for word in value.decode("latin-1").split(",")
    }
    headers = [
        (name, value.decode("latin-1"))
        for name, value in ((key.decode("latin-1"), value) for key, value in raw)
        if name not in _NOT_FORWARDED
        and name not in named
        and not (drop_auth and name == "authorization")
    ]
    headers.append(("accept-encoding", "identity"))
    return headers


def returned(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """A server's headers for the client."""
    return [
        (key.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for key, value in headers.items()
        if key.lower() not in _NOT_RETURNED and not key.lower().startswith(_CORS)
    ]
