"""The requests that a router is serving, by the ids they have on the servers.

An id that a client chose must be its own while it runs; SGLang's abort ends whatever *begins* with the
id it names (Kairos servers take it exactly); and whoever was told to abort is not tried again.
"""

from __future__ import annotations

from typing import Any

from sglang_kairos.router.request.context import BadRequest, Call


class Aborted(Exception):
    """The request was aborted before any server had it."""


class CallRegistry:
    """On one event loop."""

    def __init__(self) -> None:
        self._by_id: dict[str, Call] = {}
        self._calls: dict[int, Call] = {}

    def hold(self, call: Call) -> None:
        """`call` is served until `release`. BadRequest if it names an id that another one has."""
        chosen = _ids(call.body.get("rid"))
        for name in chosen:
            if name in self._by_id:
                raise BadRequest(f"rid: a request with the id {name[:128]!r} is running", "rid")
        self._by_id.update(dict.fromkeys(chosen, call))
        self._calls[id(call)] = call

    def release(self, call: Call) -> None:
        """It is over."""
        del self._calls[id(call)]
        for name in call.server_ids if call.own_rid else _ids(call.body.get("rid")):
            self._by_id.pop(name, None)

    def name(self, call: Call, ids: list[str]) -> None:
        """The ids of its present attempt, made up by the router."""
        for old in call.server_ids:
            if self._by_id.get(old) is call:
                del self._by_id[old]
        call.server_ids = ids
        self._by_id.update(dict.fromkeys(ids, call))

    def may_abort(self, rid: str) -> bool:
        """Whether no other request's id begins with that one."""
        return not any(other != rid and other.startswith(rid) for other in self._by_id)

    def aborted(self, rid: Any, everybody: bool) -> None:
        """Somebody told us to abort that request, or all: none of them is tried again."""
        meant = [self._by_id[name] for name in _ids(rid) if name in self._by_id]
        for call in self._calls.values() if everybody else meant:
            call.aborted = True
            if call.relegated is not None:
                call.relegated.interrupt(Aborted())


def _ids(rid: Any) -> list[str]:
    return [one for one in (rid if isinstance(rid, list) else [rid]) if isinstance(one, str)]
