"""What can end a request's way through the router, or send it to another pair of servers."""

from __future__ import annotations

from typing import Protocol


class Upstream(Protocol):
    """The server that an error is about."""

    url: str

    @property
    def role(self) -> str:
        """``prefill`` or ``decode``."""


# The request itself: answered with 4xx, no server sees it.


class BadRequest(Exception):
    """The body cannot be used (400). `param` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unfoldable(ValueError):
    """A request for several samples per prompt cannot be written as one sample each (400)."""


class TooManySamples(ValueError):
    """A request's samples come to more bytes than are passed on (413)."""


class TooLarge(Exception):
    """One body exceeds the limit (413). The text names the limit."""


class Full(Exception):
    """The router is at one of its own limits (429). The text names the limit."""


class Shed(Exception):
    """No pair can keep the request's SLO, and its class is refused then (429)."""

    def __init__(self, ttft_s: float, tpot_s: float) -> None:
        super().__init__("no pair of servers can keep the SLO")
        self.ttft_s, self.tpot_s = ttft_s, tpot_s


# Somebody no longer wants the request served.


class ClientLeft(Exception):
    """Nobody waits for the answer any more (499)."""


class Aborted(Exception):
    """A call of /abort_request ended the request before any server had it (500)."""


class TimedOut(Exception):
    """The request has used up --request-timeout-secs (504)."""


class Draining(Exception):
    """The router ends before the request did (503)."""


# A server: another pair may do better.


class ServerGone(ConnectionError):
    """The server's probes failed while a request waited for it."""


class ServerFailed(Exception):
    """A server could not be reached, or broke off before it answered anything."""

    def __init__(self, server: Upstream, cause: BaseException) -> None:
        super().__init__(f"{server.role} server {server.url}: {cause!r}")
        self.role, self.url = server.role, server.url
        self.cause = cause


class Rejected(Exception):
    """A server answered with an error before anything was sent to the client."""

    def __init__(self, server: Upstream, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"{server.role} server {server.url} answered {status}")
        self.role, self.url, self.status = server.role, server.url, status
        self.content_type, self.body = content_type, body
