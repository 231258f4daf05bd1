"""The endpoints that speak for the whole fleet: one server's answer, or all of theirs together."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
from starlette.requests import Request
from starlette.responses import Response

from sglang_kairos.router.fleet import Fleet
from sglang_kairos.router.headers import forwarded
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.servers import Server
from sglang_kairos.slo_http import error_body

_ASK_TIMEOUT_S = 30.0
JSON = {"content-type": "application/json"}


class Asker:
    """Asks servers on behalf of a client."""

    def __init__(
        self, fleet: Fleet, session: aiohttp.ClientSession, options: RouterOptions
    ) -> None:
        self._fleet, self._session, self._options = fleet, session, options

    async def health_generate(self, request: Request) -> Response:
        """Each server's own generating health check: 200 if one of each role passes."""
        servers = self._fleet.servers
        answers = await self._ask_all(servers, request, "GET", "/health_generate")
        passed = dict.fromkeys(("prefill", "decode"), False)
        for server, found in zip(servers, answers, strict=True):
            passed[server.role] |= found.status_code == 200
        statuses = {
            server.url: found.status_code for server, found in zip(servers, answers, strict=True)
        }
        return as_json({"servers": statuses}, 200 if all(passed.values()) else 503)

    async def one(self, request: Request) -> Response:
        """What any server can answer for all: the first that is there does."""
        body = await request.body()
        found = Response(status_code=503)
        for server in sorted(self._fleet.servers, key=lambda server: not server.up):
            found = await self._ask(server, request, request.method, request.url.path, body)
            if found.status_code < 500:
                break
        return found

    async def every(self, request: Request) -> Response:
        """What concerns every server (flush the cache, abort): 200 only if all agree."""
        body = await request.body()
        servers = self._fleet.servers
        path = request.url.path
        answers = await self._ask_all(servers, request, request.method, path, body)
        if path == "/flush_cache":
            for prefill in self._fleet.prefills:
                prefill.prefix.clear()
        failed = {
            server.url: f"{found.status_code} {bytes(found.body)[:200].decode(errors='replace')}"
            for server, found in zip(servers, answers, strict=True)
            if found.status_code >= 400
        }
        if failed:
            text = f"{path} failed on: {failed}"
            return Response(error_body(path, 502, text, "BadGateway"), 502, JSON)
        return as_json({"success": True, "servers": len(answers)})

    async def loads(self, request: Request) -> Response:
        """``/v1/loads`` of all servers, by URL."""
        servers = self._fleet.servers
        answers = await self._ask_all(servers, request, "GET", "/v1/loads")
        found = {s.url: _decoded(one) for s, one in zip(servers, answers, strict=True)}
        return as_json({"servers": found})

    async def server_info(self, request: Request) -> Response:
        """All servers' own answers, by role; `internal_states` are the decode servers'."""
        fleet, servers = self._fleet, self._fleet.servers
        answers = await self._ask_all(servers, request, "GET", "/server_info")
        infos: dict[str, list[Any]] = {"prefill": [], "decode": []}
        states: list[Any] = []
        for server, found in zip(servers, answers, strict=True):
            info = _decoded(found)
            infos[server.role].append(info)
            if server.role == "decode" and isinstance(info.get("internal_states"), list):
                states.extend(info["internal_states"])
        about = {
            "name": "kairos",
            "policy": self._options.policy,
            "prefill": [server.describe() for server in fleet.prefills],
            "decode": [server.describe() for server in fleet.decodes],
            "bytes_per_token": fleet.bytes_per_token.value,
            "handoff_s": fleet.handoff.value,
            "margin_s": fleet.margin.value_s,
        }
        return as_json({"internal_states": states, **infos, "router_manager": about})

    async def _ask_all(
        self, servers: list[Any], request: Request, method: str, path: str, body: bytes = b""
    ) -> list[Response]:
        return await asyncio.gather(
            *(self._ask(server, request, method, path, body) for server in servers)
        )

    async def _ask(
        self, server: Server, request: Request, method: str, path: str, body: bytes = b""
    ) -> Response:
        """One server's answer, or a 503 that says why there is none."""
        options = self._options
        headers = forwarded(request.headers.raw, drop_auth=bool(options.client_api_key))
        if options.api_key and not any(name == "authorization" for name, _ in headers):
            headers.append(("authorization", f"Bearer {options.api_key}"))
        try:
            async with self._session.request(
                method,
                server.url + path,
                params=request.url.query or None,
                data=body or None,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S),
            ) as found:
                content = found.headers.get("content-type", "application/json")
                return Response(await found.read(), found.status, {"content-type": content})
        except (aiohttp.ClientError, OSError) as error:
            text = f"{server.role} server {server.url}: {error!r}"
            return Response(error_body(path, 503, text, "Unavailable"), 503, JSON)


def as_json(body: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(body), status, JSON)


def _decoded(found: Response) -> dict[str, Any]:
    try:
        info = orjson.loads(found.body)
    except orjson.JSONDecodeError:
        info = None
    return info if isinstance(info, dict) else {"error": f"HTTP {found.status_code}"}
