"""Whose fault it is that a request failed: the server's, the request's, or the router's own.

A server that fails what another server does is at fault, and counts towards its ejection. What two
servers say alike of one request is the request's fault. A request under which servers die may be
what kills them. It is tried once more, and never on the last live server of the role that died.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from sglang_kairos.router.errors import ServerGone
from sglang_kairos.router.fleet.servers import Server

_PROBE_S = 1.0
# What SGLang says of a request that an abort has ended, in the error of either server.
_ABORTED = re.compile(
    rb'Aborted by AbortReq|Aborted by decode-side abort|Abort in waiting queue|"Aborted"'
)


def was_aborted(body: bytes) -> bool:
    """Whether an error tells of an abort: somebody ended the request on purpose."""
    return _ABORTED.search(body) is not None


def own_shortage(error: BaseException) -> bool:
    """Whether the router itself has no file descriptor left: no server is to blame for that."""
    cause: Any = getattr(error, "os_error", error)
    return getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE)


def is_unreachable(error: BaseException) -> bool:
    """Whether an error means that nobody is there, rather than slowly or badly."""
    kinds = (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError, ServerGone)
    return isinstance(error, kinds)


def never_sent(error: BaseException) -> bool:
    """Whether no connection came about, so that the server never saw the request."""
    return isinstance(error, aiohttp.ConnectionTimeoutError | aiohttp.ClientConnectorError)


async def answers(server: Server) -> bool:
    """Whether somebody still listens there: a connection may break without its server's dying."""
    parts = urlsplit(server.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError as error:  # TimeoutError is one
        return own_shortage(error)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


class Failures:
    """What went wrong with one request, and whose fault that makes it (outlier detection).

    The same 5xx from two servers is the request's own fault. `fail` is told of a server once it is
    clear that the fault is the server's.
    """

    def __init__(self, fail: Callable[[Server], None]) -> None:
        self.cuts = 0
        self._fail = fail
        self._open: list[tuple[Server, int]] = []
        self._excused = False

    def answered(self, server: Server, status: int) -> None:
        """A server answered with that 5xx."""
        for other, before in self._open:
            if other is not server and before == status:
                self._excused = True
        self._open.append((server, status))

    def served(self) -> None:
        """Another pair served it, so whoever failed before failed by itself."""
        self._close()

    def given_up(self, had_others: bool) -> None:
        """Nobody served it.

        Without a second opinion a server is taken at its word. `had_others`: there could have been
        one.
        """
        if self._excused or (len(self._open) == 1 and had_others):
            self._open.clear()
        self._close()

    async def cut_off(self, server: Server, others: int, protect_last: bool) -> str:
        """A server died under the request, or cut it off before it answered.

        Returns why the request must not be tried again (it may be a query of death); empty if it
        may. `others`: live servers of the role that are left.
        """
        self.cuts += 1
        if self.cuts > 1:
            return "two servers broke off before they answered; it is not tried a third time"
        # One that is silent, or has only dropped a connection, still listens.
        if others <= 1 and protect_last and not await answers(server):
            left = "the last one" if others else "nobody"
            return (
                f"its {server.role} server died, and {left} of the role is left: what may have ended "
                "one is not sent there (--protect-last-server)"
            )
        return ""

    def _close(self) -> None:
        for server in dict.fromkeys(server for server, _ in self._open):
            self._fail(server)
        self._open.clear()
