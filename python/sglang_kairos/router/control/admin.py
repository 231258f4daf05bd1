"""``/admin/servers``: servers added and removed while the router runs. Bearer token required.

GET                                     all servers and their state
POST   {"role": "prefill", "url": "http://h:30000", "bootstrap_port": 8998}
DELETE ?url=http://h:30000[&force=1]    no new requests; gone once its last one has ended
"""

from __future__ import annotations

import asyncio
import logging

import orjson
from starlette.requests import Request
from starlette.responses import Response

from sglang_kairos.router.auth import bears
from sglang_kairos.router.control.fan_out import JSON, as_json
from sglang_kairos.router.errors import ServerFailed, ServerGone
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.poller import Poller
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import OptionError, prefill_of, url_of
from sglang_kairos.slo.body import error_body

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1


class Admin:
    """The three calls. An empty key disables them."""

    def __init__(self, fleet: Fleet, poller: Poller, metrics: RouterMetrics, key: str) -> None:
        self._fleet, self._poller, self._metrics, self._key = fleet, poller, metrics, key
        self._leaving: dict[PrefillServer | DecodeServer, asyncio.Task[None]] = {}

    async def __call__(self, request: Request) -> Response:
        """Dispatch by method."""
        if not self._key:
            return _error(403, "disabled: start the router with --admin-api-key", "Forbidden")
        if not bears(request.headers.raw, self._key):
            return _error(401, "the admin key is required as a bearer token", "Unauthorized")
        if request.method == "POST":
            return self._add(await request.body())
        if request.method == "DELETE":
            force = request.query_params.get("force", "0") not in ("0", "", "false")
            return self._remove(request.query_params.get("url", ""), force)
        return as_json({"servers": [server.describe() for server in self._fleet.servers]})

    def _add(self, raw: bytes) -> Response:
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            return _error(400, f"malformed JSON: {error}")
        if not isinstance(body, dict) or body.get("role") not in ("prefill", "decode"):
            return _error(400, "role: must be prefill or decode", param="role")
        try:
            url = url_of("url", str(body.get("url")))
            port = body.get("bootstrap_port")
            if port is not None:
                prefill_of([url, str(port)])
        except OptionError as error:
            return _error(400, str(error))
        if (found := self._fleet.find(url)) is not None:
            if found.draining:
                return _error(409, f"{url} is being removed; wait until it is gone", "Conflict")
            return _error(409, f"{url} is there already", "Conflict")
        server = self.enrol(body["role"], url, port)
        assert server is not None
        logger.info("%s %s added by the administrator", server.role, url)
        return as_json(server.describe(), 201)

    def enrol(
        self, role: str, url: str, bootstrap_port: int | None
    ) -> PrefillServer | DecodeServer | None:
        """A server that takes requests from now on; one that is leaving stays. None: it is there."""
        found = self._fleet.find(url)
        if found is not None:
            leaving = self._leaving.pop(found, None)
            if leaving is None or found.role != role:
                return None
            leaving.cancel()
            found.draining = False
            return found
        server: PrefillServer | DecodeServer
        if role == "prefill":
            server = self._fleet.add_prefill(url, bootstrap_port)
        else:
            server = self._fleet.add_decode(url)
        self._poller.add(server)
        return server

    def _remove(self, url: str, force: bool) -> Response:
        server = self._fleet.find(url.rstrip("/"))
        if server is None:
            return _error(404, f"no server {url!r}", "NotFound")
        logger.info("%s %s removed by the administrator", server.role, server.url)
        self.dismiss(server)
        if force:
            server.cut(ServerFailed(server, ServerGone("removed by the administrator")))
        return as_json(server.describe(), 202)

    def dismiss(self, server: PrefillServer | DecodeServer) -> None:
        """No new requests for it; it is gone once its last one has ended."""
        server.draining = True
        if server not in self._leaving:
            self._leaving[server] = asyncio.create_task(self._when_idle(server))

    async def _when_idle(self, server: PrefillServer | DecodeServer) -> None:
        while server.attempts:
            await asyncio.sleep(_LOOK_EVERY_S)
        self._leaving.pop(server, None)
        self._poller.drop(server)
        self._fleet.remove(server)
        self._metrics.forget(server.url, server.role)


def _error(
    status: int, text: str, kind: str = "BadRequestError", param: str | None = None
) -> Response:
    return Response(error_body("/admin/servers", status, text, kind, param), status, JSON)
