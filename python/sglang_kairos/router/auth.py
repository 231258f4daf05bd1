"""Bearer tokens, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

_OPEN = frozenset(("/health", "/ready", "/metrics", "/ping"))


def bears(headers: Iterable[tuple[bytes, bytes]], key: str) -> bool:
    """Whether the request's Authorization is that bearer token."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.partition(b" ")
            return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), key.encode())
    return False


def is_open(path: str) -> bool:
    """Paths that ask for no client key: probes and scrapers carry none. (/admin has its own.)"""
    return path in _OPEN or path.startswith("/admin/")
