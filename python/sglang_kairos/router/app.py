"""The router as an ASGI app: the serving endpoints, and the ones that speak for the whole fleet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sglang_kairos.config import KairosConfig
from sglang_kairos.router.exchange import forwarded
from sglang_kairos.router.fleet import Fleet, Server
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.proxy import PairProxy
from sglang_kairos.slo_http import SLO_PATHS, error_body

_ASK_TIMEOUT_S = 30.0
# SGLang closes idle connections after 5 s: let go before it does, or a request meets the closing.
_KEEP_ALIVE_S = 3.0


class Router:
    """Everything one router process holds. Usable between `start` and `stop`, on one event loop."""

    def __init__(self, options: RouterOptions, config: KairosConfig) -> None:
        self.options = options
        self.fleet = Fleet(options)
        self.metrics = RouterMetrics()
        self._config = config
        self._table = config.slo_table()
        self._session: aiohttp.ClientSession | None = None
        self._proxy: PairProxy | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The one client session. RuntimeError before `start`."""
        if self._session is None:
            raise RuntimeError("the router has not been started")
        return self._session

    async def start(self) -> None:
        """Open the client session and start looking at the servers."""
        options = self.options
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(
                total=options.request_timeout_s, sock_connect=options.connect_timeout_s
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._proxy = PairProxy(
            self.fleet,
            self._session,
            self._table,
            self.metrics,
            carries=self._config.enabled,
            max_retries=options.max_retries,
        )
        self._watching = asyncio.create_task(self.fleet.watch(self._session))

    async def stop(self) -> None:
        """Stop looking, give aborts a second, close all connections."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._proxy is not None:
            await self._proxy.finish()
        await self.session.close()

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        """The serving endpoints, raw ASGI: their answers are streams."""
        assert self._proxy is not None
        await self._proxy(scope, receive, send)

    async def health(self, _: Request) -> Response:
        """200 while a prefill/decode pair can be formed, 503 otherwise."""
        body = {
            "status": "ok" if self.fleet.ready else "no prefill/decode pair is up",
            "servers": {server.url: server.up for server in self.fleet.servers},
        }
        return _json(body, 200 if self.fleet.ready else 503)

    async def health_generate(self, request: Request) -> Response:
        """Each server's own generating health check: 200 if one of each role passes."""
        answers = await self._ask_all(request, "GET", "/health_generate")
        passed = dict.fromkeys(("prefill", "decode"), False)
        for server, answer in zip(self.fleet.servers, answers, strict=True):
            passed[server.role] |= answer.status_code == 200
        statuses = {
            server.url: answer.status_code
            for server, answer in zip(self.fleet.servers, answers, strict=True)
        }
        return _json({"servers": statuses}, 200 if all(passed.values()) else 503)

    async def one(self, request: Request) -> Response:
        """What any server can answer for all: the first that is there does."""
        servers = sorted(self.fleet.servers, key=lambda server: not server.up)
        answer = Response(status_code=503)
        for server in servers:
            answer = await self._ask(server, request, request.method, request.url.path)
            if answer.status_code < 500:
                break
        return answer

    async def every(self, request: Request) -> Response:
        """What concerns every server (flush the cache, abort): 200 only if all agree."""
        body = await request.body()
        answers = await self._ask_all(request, request.method, request.url.path, body)
        failed = {
            server.url: f"{answer.status_code} {bytes(answer.body)[:200].decode(errors='replace')}"
            for server, answer in zip(self.fleet.servers, answers, strict=True)
            if answer.status_code >= 400
        }
        if failed:
            text = f"{request.url.path} failed on: {failed}"
            return Response(error_body(request.url.path, 502, text, "BadGateway"), 502, _JSON)
        return _json({"success": True, "servers": len(answers)})

    async def server_info(self, request: Request) -> Response:
        """All servers' own answers, by role; `internal_states` are the decode servers'."""
        answers = await self._ask_all(request, "GET", "/server_info")
        infos: dict[str, list[Any]] = {"prefill": [], "decode": []}
        states: list[Any] = []
        for server, answer in zip(self.fleet.servers, answers, strict=True):
            info = _decoded(answer)
            infos[server.role].append(info)
            if server.role == "decode" and isinstance(info.get("internal_states"), list):
                states.extend(info["internal_states"])
        about = {
            "name": "kairos",
            "policy": self.options.policy,
            "prefill": [server.describe() for server in self.fleet.prefills],
            "decode": [server.describe() for server in self.fleet.decodes],
            "bytes_per_token": self.fleet.bytes_per_token.value,
            "handoff_s": self.fleet.handoff.value,
        }
        return _json({"internal_states": states, **infos, "router_manager": about})

    async def metrics_text(self, _: Request) -> Response:
        """Prometheus exposition."""
        for server in self.fleet.servers:
            self.metrics.up.labels(server.url, server.role).set(server.up)
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def _ask_all(
        self, request: Request, method: str, path: str, body: bytes = b""
    ) -> list[Response]:
        return await asyncio.gather(
            *(self._ask(server, request, method, path, body) for server in self.fleet.servers)
        )

    async def _ask(
        self, server: Server, request: Request, method: str, path: str, body: bytes = b""
    ) -> Response:
        """One server's answer, or a 503 that says why there is none."""
        headers = forwarded(request.headers.raw)
        key = self.options.api_key
        if key and not any(name == "authorization" for name, _ in headers):
            headers.append(("authorization", f"Bearer {key}"))
        try:
            async with self.session.request(
                method,
                server.url + path,
                params=request.url.query or None,
                data=body or None,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S),
            ) as answer:
                content = answer.headers.get("content-type", "application/json")
                return Response(await answer.read(), answer.status, {"content-type": content})
        except (aiohttp.ClientError, OSError) as error:
            text = f"{server.role} server {server.url}: {error!r}"
            return Response(error_body(path, 503, text, "Unavailable"), 503, _JSON)


def create_app(options: RouterOptions, config: KairosConfig) -> Starlette:
    """The app; its Router is in ``app.state.router``. ConfigError for unusable SLO classes."""
    router = Router(options, config)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await router.start()
        try:
            yield
        finally:
            await router.stop()

    both = ["GET", "POST"]
    routes = [Route(path, _Raw(router), methods=["POST", "PUT"]) for path in sorted(SLO_PATHS)]
    routes += [
        Route("/health", router.health),
        Route("/health_generate", router.health_generate),
        Route("/v1/models", router.one),
        Route("/model_info", router.one),
        Route("/get_model_info", router.one),
        Route("/server_info", router.server_info),
        Route("/get_server_info", router.server_info),
        Route("/flush_cache", router.every, methods=both),
        Route("/abort_request", router.every, methods=["POST"]),
        Route("/metrics", router.metrics_text),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.router = router
    return app


class _Raw:
    """Starlette takes a class instance as raw ASGI, and a function as an endpoint."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._router.serve(scope, receive, send)


_JSON = {"content-type": "application/json"}


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, _JSON)


def _decoded(answer: Response) -> dict[str, Any]:
    try:
        info = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        info = None
    return info if isinstance(info, dict) else {"error": f"HTTP {answer.status_code}"}
