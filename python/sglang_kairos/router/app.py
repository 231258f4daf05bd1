"""The router as an ASGI app: which path goes where, and what starts and stops with it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sglang_kairos.config import KairosConfig
from sglang_kairos.router.auth import bears, is_open
from sglang_kairos.router.clock import SYSTEM_CLOCK, Clock
from sglang_kairos.router.control.admin import Admin
from sglang_kairos.router.control.discovery import ApiServer, Discovery
from sglang_kairos.router.control.endpoints import (
    ANY,
    EACH,
    ENDPOINTS,
    EVERY,
    OWN,
    REFUSED,
    WEBSOCKET,
)
from sglang_kairos.router.control.fan_out import FanOut, as_json, error
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.poller import Poller
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.context import REQUEST_ID
from sglang_kairos.router.request.serving import PairProxy
from sglang_kairos.router.responses import Message, Receive, Scope, Send, refuse
from sglang_kairos.slo.body import SLO_PATHS

# SGLang closes idle connections after 5 s: let go before it does, or a request meets the closing.
_KEEP_ALIVE_S = 3.0
Endpoint = Callable[[Request], Awaitable[Response]]
_MISSING = "NotFoundError"
_EXPOSITION = "text/plain; version=0.0.4"
# /health waits this long for the first look at a server.
_FIRST_LOOK_S = 0.5


class Router:
    """Everything one router process holds. Usable between `start` and `stop`, on one event loop."""

    def __init__(
        self, options: RouterOptions, config: KairosConfig, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self.options = options
        self.fleet = Fleet(options, clock)
        self.metrics = RouterMetrics(options.ttft_buckets)
        self.draining = False
        self._config = config
        self._table = config.slo_table()
        self._session: aiohttp.ClientSession | None = None
        self._proxy: PairProxy | None = None
        self._poller: Poller | None = None
        self._fan_out: FanOut | None = None
        self._admin: Admin | None = None
        self._discovery: Discovery | None = None
        self._cluster = ApiServer() if options.pods is not None else None
        self._scraped: web.AppRunner | None = None

    @property
    def proxy(self) -> PairProxy:
        """What serves requests. RuntimeError before `start`."""
        if self._proxy is None:
            raise RuntimeError("the router has not been started")
        return self._proxy

    @property
    def fan_out(self) -> FanOut:
        """What speaks for the whole fleet. RuntimeError before `start`."""
        if self._fan_out is None:
            raise RuntimeError("the router has not been started")
        return self._fan_out

    async def start(self) -> None:
        """Open the client session and start looking at the servers."""
        options = self.options
        verify: ssl.SSLContext | bool = True
        if options.ca_certs or options.client_cert:
            verify = ssl.create_default_context()
            for path in options.ca_certs:
                verify.load_verify_locations(path)
            if options.client_cert:
                verify.load_cert_chain(options.client_cert, options.client_key or None)
        self._session = session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_ALIVE_S, ssl=verify, use_dns_cache=True
            ),
            # Requests have a timer of their own, which counts retries, too.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=options.connect_timeout_s),
            auto_decompress=False,
            skip_auto_headers=("Content-Type", "User-Agent", "Accept"),
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
        self._fan_out = FanOut(self.fleet, session, options)
        self._poller = Poller(self.fleet, session, options, self.metrics)
        self._admin = Admin(self.fleet, self._poller, self.metrics, options.admin_api_key)
        self._poller.start()
        if options.pods is not None:
            self._discovery = Discovery(options.pods, self._admin, self._cluster)
            self._discovery.start()
        if options.metrics_port is not None:
            await self._serve_metrics(options.metrics_host, options.metrics_port)

    async def stop(self) -> None:
        """Stop looking, give aborts a second, close all connections."""
        if self._scraped is not None:
            await self._scraped.cleanup()
        if self._discovery is not None:
            await self._discovery.stop()
        if self._poller is not None:
            await self._poller.stop()
        if self._proxy is not None:
            await self._proxy.finish()
        if self._session is not None:
            await self._session.close()

    async def health(self, _: Request) -> Response:
        """200 while a prefill/decode pair can be formed and the router stays, 503 otherwise."""
        fleet = self.fleet
        now_s = fleet.clock.now_s
        until = now_s() + _FIRST_LOOK_S
        while not self._ready and fleet.ready and now_s() < until:
            await asyncio.sleep(0.01)
        status = "no prefill/decode pair is up"
        if fleet.ready:
            status = "ok" if self._ready else "no prefill/decode pair has answered a probe yet"
        body = {
            "status": "draining" if self.draining else status,
            "servers": {server.url: server.up for server in fleet.servers},
        }
        if fleet.problems:
            body["problems"] = fleet.problems
        return as_json(body, 200 if self._ready and not self.draining else 503)

    @property
    def _ready(self) -> bool:
        # A server's role is known by its first answer only; nobody waits for it with probes off.
        return self.fleet.met if self.options.probes else self.fleet.ready

    async def root(self, _: Request) -> Response:
        """Who is here."""
        return as_json("Kairos' router is running")

    async def ping(self, _: Request) -> Response:
        """200 while the process lives (liveness, as /health is readiness)."""
        return Response(status_code=200)

    async def admin(self, request: Request) -> Response:
        """See `control.admin`."""
        assert self._admin is not None
        return await self._admin(request)

    async def abort_request(self, request: Request) -> Response:
        """On every server; and nobody who was meant is tried again."""
        try:
            asked = orjson.loads(await request.body() or b"{}")
        except orjson.JSONDecodeError:
            asked = None  # the servers say what is wrong with it
        if isinstance(asked, dict):
            everybody = asked.get("abort_all") is True
            if not everybody and not asked.get("rid"):
                # To SGLang, an empty id is the beginning of everybody's.
                text = "rid: must name a request, or abort_all be true"
                return error("/abort_request", 400, text, "BadRequestError", param="rid")
            self.proxy.registry.aborted(asked.get("rid"), everybody)
        return await self.fan_out.every(request)

    async def metrics_text(self, _: Request) -> Response:
        """Prometheus exposition."""
        return Response(self._metrics_now(), media_type=_EXPOSITION)

    async def _serve_metrics(self, host: str, port: int) -> None:
        async def scrape(_: web.Request) -> web.Response:
            return web.Response(body=self._metrics_now(), headers={"content-type": _EXPOSITION})

        app = web.Application()
        app.router.add_get("/metrics", scrape)
        self._scraped = web.AppRunner(app, access_log=None)
        await self._scraped.setup()
        try:
            await web.TCPSite(self._scraped, host, port).start()
        except OSError as failure:
            raise RuntimeError(f"--prometheus-port: cannot listen: {failure}") from None

    @property
    def metrics_address(self) -> str:
        """Where /metrics is served besides, ``http://host:port``. RuntimeError if it is not."""
        if self._scraped is None:
            raise RuntimeError("--prometheus-port was not given")
        host, port = self._scraped.addresses[0][:2]
        return f"http://{host}:{port}"

    def _metrics_now(self) -> bytes:
        metrics, limits = self.metrics, self.proxy.limits
        metrics.in_flight.set(limits.in_flight)
        metrics.held_bytes.set(limits.held_bytes)
        metrics.relegated.set(len(self.proxy.deferred))
        for server in self.fleet.servers:
            metrics.up.labels(server.url, server.role).set(server.up)
            metrics.running.labels(server.url, server.role).set(len(server.attempts))
        for prefill in self.fleet.prefills:
            metrics.owed.labels(prefill.url).set(prefill.owed_s)
        return metrics.render()


class RouterApp:
    """The ASGI app: serving endpoints go straight to the proxy, everything else to Starlette."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._rest = _fleet_app(router)
        options = router.options
        self._key, self._admin_key = options.client_api_key, options.admin_api_key
        self._id_headers = [name.encode("latin-1") for name in options.id_headers]
        self._outer: Any = None
        if options.cors_origins:
            # As SGLang's own server answers web pages.
            self._outer = CORSMiddleware(
                self._serve,
                allow_origins=options.cors_origins,
                allow_credentials=True,
                allow_methods=["*"],
                allow_headers=["*"],
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if self._outer is None:
            await self._serve(scope, receive, send)
        elif scope["type"] == "http" and not any(name == b"origin" for name, _ in scope["headers"]):
            # The middleware adds nothing but this to what is no web page's, at a price per event.
            await self._serve(scope, receive, functools.partial(_vary, send))
        else:
            await self._outer(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if self._id_headers:
                scope = self._named(scope)
            if self._key and not is_open(path) and not self._may(scope):
                text = "a valid API key is required as a bearer token"
                await refuse(send, path, 401, text, "Unauthorized")
                return
            if path in SLO_PATHS and scope["method"] in ("POST", "PUT"):
                await self.router.proxy(scope, receive, send)
                return
        await self._rest(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        """Whether it bears the clients' key, or the administrator's."""
        headers = scope["headers"]
        admin = bool(self._admin_key) and bears(headers, self._admin_key)
        return admin or bears(headers, self._key)

    def _named(self, scope: Scope) -> Scope:
        """With the request's id where everybody looks for it."""
        headers, name = scope["headers"], REQUEST_ID.encode()
        found = {key: value for key, value in headers if key == name or key in self._id_headers}
        if name in found or not found:
            return scope
        first = next(found[key] for key in self._id_headers if key in found)
        return {**scope, "headers": [*headers, (name, first)]}


def _vary(send: Send, message: Message) -> Awaitable[None]:
    """Caches must not give this answer to a web page: it lacks the headers that one gets."""
    if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", ()), (b"vary", b"Origin")]
    return send(message)


def create_app(
    options: RouterOptions, config: KairosConfig, clock: Clock = SYSTEM_CLOCK
) -> RouterApp:
    """The app; its `router` holds everything. ConfigError for unusable SLO classes, OptionError for
    service discovery outside a cluster."""
    return RouterApp(Router(options, config, clock))


def _fleet_app(router: Router) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await router.start()
        try:
            yield
        finally:
            await router.stop()

    def asked(name: str) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            found: Response = await getattr(router.fan_out, name)(request)
            return found

        return endpoint

    def refusing(why: str) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            path = request.scope["path"]
            text = f"{path} is not served over prefill/decode pairs: {why}"
            return error(path, 404, text, _MISSING)

        return endpoint

    async def missing(request: Request, failure: Exception) -> Response:
        assert isinstance(failure, HTTPException)
        path, status = request.scope["path"], failure.status_code
        text, kind = f"no endpoint {path}", _MISSING
        if status == 405:
            text, kind = f"{path} does not take {request.method}", "MethodNotAllowed"
        found = error(path, status, text, kind)
        found.headers.update(failure.headers or {})
        return found

    async def pair(_: Request) -> Response:
        raise AssertionError("served by the proxy")

    asking: dict[str, Endpoint] = {kind: asked(kind) for kind in (ANY, EACH, EVERY)}
    own: dict[str, Endpoint] = {
        "/": router.root,
        "/health": router.health,
        "/ready": router.health,
        "/ping": router.ping,
        "/metrics": router.metrics_text,
        "/health_generate": asked("health_generate"),
        "/server_info": asked("server_info"),
        "/get_server_info": asked("server_info"),
    }
    routes = [Route("/admin/servers", router.admin, methods=["GET", "POST", "DELETE"])]
    served: dict[str, dict[str, Endpoint]] = {}
    for one in ENDPOINTS:
        if one.methods == WEBSOCKET:
            continue
        endpoint: Endpoint = pair
        if one.kind == OWN:
            endpoint = own[one.path]
        elif one.kind == REFUSED:
            endpoint = refusing(one.why)
        elif one.kind in asking:
            endpoint = asking[one.kind]
        served.setdefault(one.path, {}).update(dict.fromkeys(one.methods, endpoint))
    served["/abort_request"] = {"POST": router.abort_request}
    routes += [_route(path, by_method) for path, by_method in served.items()]
    return Starlette(
        routes=routes, lifespan=lifespan, exception_handlers={404: missing, 405: missing}
    )


def _route(path: str, by_method: dict[str, Endpoint]) -> Route:
    async def endpoint(request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        return await by_method[method](request)

    return Route(path, endpoint, methods=list(by_method))
