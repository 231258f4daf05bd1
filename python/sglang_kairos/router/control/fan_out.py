"""The endpoints that speak for the whole fleet: one server's answer, or all of theirs together."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sglang_kairos.router.auth import bears
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.server_info import number
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.responses import forwarded
from sglang_kairos.slo.body import error_body

AnyServer = PrefillServer | DecodeServer
T = TypeVar("T")

# What one of several servers may take before the next is asked.
_ASK_TIMEOUT_S = 30.0
# Clients ask for these in passing, benchmarks while their clock runs.
_GLANCE_S = 0.8
# A server that was told to wait answers a little later than that.
_GRACE_S = 5.0
_CLIENT_LEFT = 499
JSON = {"content-type": "application/json"}


class FanOut:
    """Sends a client's request to several servers, and makes one answer of theirs."""

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
            passed[server.role] |= found.status_code == 200 and not server.misplaced
        statuses = {
            server.url: found.status_code for server, found in zip(servers, answers, strict=True)
        }
        return as_json({"servers": statuses}, 200 if all(passed.values()) else 503)

    async def any(self, request: Request) -> Response:
        """What any server can answer for all: the first that is there does."""
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        return await _while_there(request, self._first(request, body))

    async def _first(self, request: Request, body: bytes) -> Response:
        found = error(_path(request), 503, "no server", "Unavailable")
        for server in sorted(self._fleet.servers, key=lambda server: not server.up):
            found = await self._ask(server, request, request.method, _path(request), body)
            if found.status_code < 500:
                break
        return found

    async def each(self, request: Request) -> Response:
        """What differs: all answers, by URL. Nobody is waited for longer than a glance."""
        servers = self._fleet.servers
        found = await self._glance(servers, request, _path(request))
        answers = {
            server.url: _decoded(one) if one is not None else _silent(server)
            for server, one in zip(servers, found, strict=True)
        }
        return as_json({"servers": answers})

    async def every(self, request: Request) -> Response:
        """What concerns every server (flush the cache, abort): 200 only if all agree.

        They have as long as a request has, or as long as ``?timeout=`` tells them to wait.
        """
        body = await self._body(request)
        if isinstance(body, Response):
            return body
        path, servers = _path(request), self._fleet.servers
        bodies = [body] * len(servers)
        if path == "/init_weights_update_group":
            bodies = ranked(body, [server.info for server in servers])
        asked = (
            self._ask(server, request, request.method, path, own, self._patience_s(request), True)
            for server, own in zip(servers, bodies, strict=True)
        )
        answers = await _while_there(request, _gathered(*asked))
        if isinstance(answers, Response):
            return answers
        if path == "/flush_cache":
            for prefill in self._fleet.prefills:
                prefill.prefix.clear()
        return together(path, [server.url for server in servers], answers)

    async def server_info(self, request: Request) -> Response:
        """All servers' answers, by role; `internal_states` are the decode servers'.

        Whoever does not answer at once is told of as it was last seen. In each role servers that
        told something come first: SGLang's benchmark reads the first decode server's.
        """
        fleet, servers = self._fleet, self._fleet.servers
        found = await self._glance(servers, request, "/server_info")
        known = self._may_see(request)
        infos: dict[str, list[Any]] = {"prefill": [], "decode": []}
        for server, one in zip(servers, found, strict=True):
            age_s = 0.0
            info: dict[str, Any]
            answer = _decoded(one) if one is not None and one.status_code != 503 else None
            if isinstance(answer, dict):
                info = answer
            elif server.info and known and not server.health.gone:
                info, age_s = dict(server.info), fleet.clock.now_s() - server.info_at_s
            else:
                info = _silent(server)
            info["router_view"] = {
                "url": server.url,
                "state": server.standing,
                "age_s": round(age_s, 3),
            }
            infos[server.role].append(info)
        for listed in infos.values():
            listed.sort(key=lambda info: "error" in info)
        states: list[Any] = []
        for info in infos["decode"]:
            if isinstance(info.get("internal_states"), list):
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

    async def _body(self, request: Request) -> bytes | Response:
        """The whole body, or the refusal of one that is too large."""
        most, held = self._options.max_body_bytes, bytearray()
        try:
            async for chunk in request.stream():
                held += chunk
                if len(held) > most:
                    text = f"the body has more than {most} bytes (--max-payload-size)"
                    return error(_path(request), 413, text, "PayloadTooLarge")
        except ClientDisconnect:
            return Response(status_code=_CLIENT_LEFT)
        return bytes(held)

    def _patience_s(self, request: Request) -> float:
        try:
            asked = float(request.query_params.get("timeout", 0.0))
        except ValueError:
            asked = 0.0  # the servers say what is wrong with it
        if not math.isfinite(asked):
            asked = 0.0
        return max(self._options.request_timeout_s, asked + _GRACE_S)

    def _may_see(self, request: Request) -> bool:
        """Whether what the router's own key has brought may be told to this client."""
        options = self._options
        if not options.api_key or options.client_api_key:
            return True
        named = any(name == b"authorization" for name, _ in request.headers.raw)
        return not named or bears(request.headers.raw, options.api_key)

    async def _glance(
        self, servers: Sequence[AnyServer], request: Request, path: str
    ) -> list[Response | None]:
        """What they answer at once; None for the others. Who is known to be gone is not asked."""
        tasks = [
            asyncio.create_task(self._ask(server, request, "GET", path))
            if not server.health.gone
            else None
            for server in servers
        ]
        asked = [task for task in tasks if task is not None]
        try:
            if asked:
                await asyncio.wait(asked, timeout=_GLANCE_S)
            return [task.result() if task is not None and task.done() else None for task in tasks]
        finally:
            for task in asked:
                task.cancel()

    async def _ask_all(
        self, servers: Sequence[AnyServer], request: Request, method: str, path: str
    ) -> list[Response]:
        return await asyncio.gather(
            *(self._ask(server, request, method, path) for server in servers)
        )

    async def _ask(
        self,
        server: AnyServer,
        request: Request,
        method: str,
        path: str,
        body: bytes = b"",
        patience_s: float | None = None,
        commands: bool = False,
    ) -> Response:
        """One server's answer, or a 503 that says why there is none."""
        timeout_s = _ASK_TIMEOUT_S if patience_s is None else patience_s
        try:
            async with self._session.request(
                method,
                server.url + path,
                params=request.url.query or None,
                data=body or None,
                headers=self._headers(request, commands),
                timeout=aiohttp.ClientTimeout(
                    total=timeout_s, sock_connect=self._options.connect_timeout_s
                ),
            ) as found:
                content = found.headers.get("content-type", "application/json")
                return Response(await found.read(), found.status, {"content-type": content})
        except TimeoutError:
            text = f"{server.role} server {server.url}: no answer within {timeout_s:g} s"
            return error(path, 503, text, "Unavailable")
        except (aiohttp.ClientError, OSError) as failure:
            text = f"{server.role} server {server.url}: {failure!r}"
            return error(path, 503, text, "Unavailable")

    def _headers(self, request: Request, commands: bool) -> list[tuple[str, str]]:
        """The client's own; its key is the servers' unless this router asks for one of its own.

        The router's key is lent to who may use it. For reading that is everybody; for commands it
        is clients that have shown a key of this router.
        """
        options, raw = self._options, request.headers.raw
        admin = bool(options.admin_api_key) and bears(raw, options.admin_api_key)
        headers = forwarded(raw, drop_auth=bool(options.client_api_key) and not admin)
        named = any(name == "authorization" for name, _ in headers)
        if options.api_key and not named and (options.client_api_key or not commands):
            headers.append(("authorization", f"Bearer {options.api_key}"))
        return headers


def together(path: str, urls: Sequence[str], answers: Sequence[Response]) -> Response:
    """One answer for a command to every server, made of theirs.

    No server: 503. All did it: 200 with each one's answer. All refuse it alike (4xx): the first
    one's refusal, as it is. Anything else: 502, and who said what.
    """
    if not answers:
        return error(path, 503, "no server", "Unavailable")
    statuses = {found.status_code for found in answers}
    if len(statuses) == 1 and 400 <= min(statuses) < 500:
        return answers[0]
    said = {url: _said(found) for url, found in zip(urls, answers, strict=True)}
    failed = {
        url: one
        for (url, one), found in zip(said.items(), answers, strict=True)
        if found.status_code >= 400
        or (isinstance(one["answer"], dict) and one["answer"].get("success") is False)
    }
    if not failed:
        bodies = {url: one["answer"] for url, one in said.items()}
        return as_json({"success": True, "servers": len(answers), "answers": bodies})
    did = len(answers) - len(failed)
    words = {url: f"{one['status']} {str(one['answer'])[:200]}" for url, one in failed.items()}
    text = f"{path} failed on: {words}; {did} of {len(answers)} servers did it"
    body = orjson.loads(error_body(path, 502, text, "BadGateway"))
    body["error"]["servers"] = said
    return as_json(body, 502)


def ranked(body: bytes, infos: Sequence[Any]) -> list[bytes]:
    """The body of /init_weights_update_group for each server: their ranks follow each other.

    `rank_offset` in the body is the first server's; each one takes tp_size × pp_size ranks. A body
    without a rank goes to all as it is.
    """
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        asked = None
    if not isinstance(asked, dict) or type(asked.get("rank_offset")) is not int:
        return [body] * len(infos)
    bodies, rank = [], asked["rank_offset"]
    for info in infos:
        bodies.append(orjson.dumps({**asked, "rank_offset": rank}))
        size = [number(info or {}, key, 1, 1e5) or 1.0 for key in ("tp_size", "pp_size")]
        rank += int(size[0] * size[1])
    return bodies


async def _gathered(*asked: Coroutine[Any, Any, Response]) -> list[Response]:
    return await asyncio.gather(*asked)


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """Do it for as long as the client waits for it; its body must have been read."""
    doing = asyncio.create_task(work)
    watching = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else Response(status_code=_CLIENT_LEFT)
    finally:
        for task in (doing, watching):
            task.cancel()


async def _left(receive: Callable[[], Coroutine[Any, Any, Any]] | Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def as_json(body: Any, status: int = 200) -> Response:
    """A JSON answer."""
    try:
        written = orjson.dumps(body)
    except TypeError:  # a whole number of more than 64 bits
        written = json.dumps(body).encode()
    return Response(written, status, JSON)


def error(path: str, status: int, text: str, kind: str, param: str | None = None) -> Response:
    """An error as clients of `path` read it; `param` names the field."""
    return Response(error_body(path, status, text, kind, param), status, JSON)


def _path(request: Request) -> str:
    return str(request.scope["path"])


def _silent(server: AnyServer) -> dict[str, Any]:
    text = server.problem or ("gone" if server.health.gone else f"no answer within {_GLANCE_S} s")
    return {"error": f"{server.role} server {server.url}: {text}"}


def _said(found: Response) -> dict[str, Any]:
    try:
        answer = orjson.loads(found.body)
    except orjson.JSONDecodeError:
        answer = bytes(found.body)[:2000].decode(errors="replace")
    return {"status": found.status_code, "answer": answer}


def _decoded(found: Response) -> Any:
    try:
        info = orjson.loads(found.body)
    except orjson.JSONDecodeError:
        info = None
    return info if isinstance(info, dict | list) else {"error": f"HTTP {found.status_code}"}
