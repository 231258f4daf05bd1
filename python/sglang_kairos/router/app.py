"""The router as an ASGI app: which path goes where, and what starts and stops with it."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sglang_kairos.config import KairosConfig
from sglang_kairos.router.admin import Admin
from sglang_kairos.router.answers import Receive, Scope, Send, refuse
from sglang_kairos.router.ask import JSON, Asker, as_json
from sglang_kairos.router.auth import bears, is_open
from sglang_kairos.router.fleet import Fleet
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.proxy import PairProxy
from sglang_kairos.router.watch import Watch
from sglang_kairos.slo_http import SLO_PATHS, error_body

# SGLang closes idle connections after 5 s: let go before it does, or a request meets the closing.
_KEEP_ALIVE_S = 3.0
# Answered by one server for all: they say the same, or it does not matter who does the work.
_ANY = (
    ("/v1/models", ["GET"]),
    ("/v1/models/{model:path}", ["GET"]),
    ("/model_info", ["GET"]),
    ("/get_model_info", ["GET"]),
    ("/tokenize", ["POST"]),
    ("/v1/tokenize", ["POST"]),
    ("/detokenize", ["POST"]),
    ("/v1/detokenize", ["POST"]),
    ("/parse_function_call", ["POST"]),
    ("/separate_reasoning", ["POST"]),
)
# Every server must do it.
_EVERY = (
    ("/flush_cache", ["GET", "POST"]),
    ("/start_profile", ["GET", "POST"]),
    ("/stop_profile", ["GET", "POST"]),
    ("/update_weights_from_disk", ["POST"]),
    ("/pause_generation", ["POST"]),
    ("/continue_generation", ["POST"]),
)


class Router:
    """Everything one router process holds. Usable between `start` and `stop`, on one event loop."""

    def __init__(self, options: RouterOptions, config: KairosConfig) -> None:
        self.options = options
        self.fleet = Fleet(options)
        self.metrics = RouterMetrics()
        self.draining = False
        self._config = config
        self._table = config.slo_table()
        self._session: aiohttp.ClientSession | None = None
        self._proxy: PairProxy | None = None
        self._watch: Watch | None = None
        self._asker: Asker | None = None
        self._admin: Admin | None = None

    @property
    def proxy(self) -> PairProxy:
        """What serves requests. RuntimeError before `start`."""
        if self._proxy is None:
            raise RuntimeError("the router has not been started")
        return self._proxy

    @property
    def asker(self) -> Asker:
        """What asks servers for clients. RuntimeError before `start`."""
        if self._asker is None:
            raise RuntimeError("the router has not been started")
        return self._asker

    async def start(self) -> None:
        """Open the client session and start looking at the servers."""
        options = self.options
        verify: ssl.SSLContext | bool = True
        if options.ca_cert:
            verify = ssl.create_default_context(cafile=options.ca_cert)
        self._session = session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_ALIVE_S, ssl=verify, use_dns_cache=True
            ),
            # Requests have a timer of their own, which counts retries, too.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._proxy = PairProxy(
            self.fleet,
            session,
            self._table,
            self.metrics,
            options,
            carries=self._config.enabled,
            max_wait=self._config.max_wait,
        )
        self._asker = Asker(self.fleet, session, options)
        self._watch = Watch(self.fleet, session, options, self.metrics)
        self._admin = Admin(self.fleet, self._watch, self.metrics, options.admin_api_key)
        self._watch.start()

    async def stop(self) -> None:
        """Stop looking, give aborts a second, close all connections."""
        if self._watch is not None:
            await self._watch.stop()
        if self._proxy is not None:
            await self._proxy.finish()
        if self._session is not None:
            await self._session.close()

    async def health(self, _: Request) -> Response:
        """200 while a prefill/decode pair can be formed and the router stays, 503 otherwise."""
        status = "ok" if self.fleet.ready else "no prefill/decode pair is up"
        ready = self.fleet.ready and not self.draining
        body = {
            "status": "draining" if self.draining else status,
            "servers": {server.url: server.up for server in self.fleet.servers},
        }
        return as_json(body, 200 if ready else 503)

    async def ping(self, _: Request) -> Response:
        """200 while the process lives (liveness, as /health is readiness)."""
        return Response(status_code=200)

    async def admin(self, request: Request) -> Response:
        """See `admin`."""
        assert self._admin is not None
        return await self._admin(request)

    async def abort_request(self, request: Request) -> Response:
        """On every server; and nobody who was meant is tried again."""
        try:
            asked = orjson.loads(await request.body() or b"{}")
        except orjson.JSONDecodeError:
            asked = {}
        if isinstance(asked, dict):
            everybody = asked.get("abort_all") is True
            if not everybody and not asked.get("rid"):
                # To SGLang, an empty id is the beginning of everybody's.
                text = "rid: must name a request, or abort_all be true"
                return Response(error_body(request.url.path, 400, text, param="rid"), 400, JSON)
            self.proxy.calls.aborted(asked.get("rid"), everybody)
        return await self.asker.every(request)

    async def metrics_text(self, _: Request) -> Response:
        """Prometheus exposition."""
        metrics, limits = self.metrics, self.proxy.limits
        metrics.in_flight.set(limits.in_flight)
        metrics.held_bytes.set(limits.held_bytes)
        metrics.relegated.set(len(self.proxy.later))
        for server in self.fleet.servers:
            metrics.up.labels(server.url, server.role).set(server.up)
            metrics.running.labels(server.url, server.role).set(len(server.attempts))
        for prefill in self.fleet.prefills:
            metrics.owed.labels(prefill.url).set(prefill.owed_s)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4")


class RouterApp:
    """The ASGI app: serving endpoints go straight to the proxy, everything else to Starlette."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._rest = _fleet_app(router)
        self._key = router.options.client_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if self._key and not is_open(path) and not bears(scope["headers"], self._key):
                text = "a valid API key is required as a bearer token"
                await refuse(send, path, 401, text, "Unauthorized")
                return
            if path in SLO_PATHS and scope["method"] in ("POST", "PUT"):
                await self.router.proxy(scope, receive, send)
                return
        await self._rest(scope, receive, send)


def create_app(options: RouterOptions, config: KairosConfig) -> RouterApp:
    """The app; its `router` holds everything. ConfigError for unusable SLO classes."""
    return RouterApp(Router(options, config))


def _fleet_app(router: Router) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await router.start()
        try:
            yield
        finally:
            await router.stop()

    def asked(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            found: Response = await getattr(router.asker, name)(request)
            return found

        return endpoint

    routes = [
        Route("/health", router.health),
        Route("/ping", router.ping),
        Route("/metrics", router.metrics_text),
        Route("/admin/servers", router.admin, methods=["GET", "POST", "DELETE"]),
        Route("/abort_request", router.abort_request, methods=["POST"]),
        Route("/health_generate", asked("health_generate")),
        Route("/server_info", asked("server_info")),
        Route("/get_server_info", asked("server_info")),
        Route("/v1/loads", asked("loads")),
    ]
    routes += [Route(path, asked("one"), methods=methods) for path, methods in _ANY]
    routes += [Route(path, asked("every"), methods=methods) for path, methods in _EVERY]
    return Starlette(routes=routes, lifespan=lifespan)
