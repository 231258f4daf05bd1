"""Runs fake prefill and decode servers on loopback, and a router in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import uvicorn
from aiohttp import web

from helpers.fake_clock import clock_of
from sglang_kairos.config import KairosConfig
from sglang_kairos.router.app import create_app
from sglang_kairos.router.options import RouterOptions

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Fake:
    """A server that records what it gets. `answer` replaces its serving endpoint."""

    role: str
    answer: Handler | None = None
    info: dict[str, Any] = field(default_factory=dict)
    loads: dict[str, Any] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    flushed: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    # Endpoints besides, or in place of, those below; every method.
    routes: dict[str, Handler] = field(default_factory=dict)
    url: str = ""
    runner: Any = None

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append({key.lower(): value for key, value in request.headers.items()})
        try:
            if self.answer is not None:
                return await self.answer(request)
            return web.json_response({"text": f"from {self.role}", "meta_info": {}})
        except (asyncio.CancelledError, ConnectionResetError):
            self.left.set()
            raise

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def flush(self, _: web.Request) -> web.Response:
        self.flushed += 1
        return web.Response(text="Cache flushed.")

    async def tell(self, _: web.Request) -> web.Response:
        return web.json_response({"role": self.role, **self.info})

    async def load(self, _: web.Request) -> web.Response:
        return web.json_response({"loads": [self.loads]})

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[Fake]:
        app = web.Application()
        served = dict.fromkeys((GENERATE, COMPLETIONS, CHAT), self.serve)
        served |= {"/abort_request": self.abort, "/flush_cache": self.flush}
        asked = dict.fromkeys(
            ("/server_info", "/model_info", "/v1/models", "/health_generate"), self.tell
        )
        asked["/v1/loads"] = self.load
        for path, handler in self.routes.items():
            app.router.add_route("*", path, handler)
        for method, handlers in (("POST", served), ("GET", asked)):
            for path, handler in handlers.items():
                if path not in self.routes:
                    app.router.add_route(method, path, handler)
        self.runner = runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()


@dataclass
class Bench:
    """A running router, its fakes and a client session whose base is the router."""

    client: aiohttp.ClientSession
    router: Any
    prefills: list[Fake]
    decodes: list[Fake]

    @property
    def p(self) -> Fake:
        return self.prefills[0]

    @property
    def d(self) -> Fake:
        return self.decodes[0]

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        async with self.client.post(path, json=body, **kwargs) as response:
            return response.status, await response.json(content_type=None)


@contextlib.asynccontextmanager
async def bench(
    prefill: Fake | list[Fake] | None = None,
    decode: Fake | list[Fake] | None = None,
    *,
    dead_prefills: int = 0,
    dead_decodes: int = 0,
    config: KairosConfig | None = None,
    **options: Any,
) -> AsyncIterator[Bench]:
    prefills = prefill if isinstance(prefill, list) else [prefill or Fake("prefill")]
    decodes = decode if isinstance(decode, list) else [decode or Fake("decode")]
    async with contextlib.AsyncExitStack() as stack:
        for fake in (*prefills, *decodes):
            await stack.enter_async_context(fake.run())
        # Dead ones come first, so that a lower-index tie would pick them.
        gone_p = [f"http://127.0.0.1:{free_port()}" for _ in range(dead_prefills)]
        gone_d = [f"http://127.0.0.1:{free_port()}" for _ in range(dead_decodes)]
        settings = RouterOptions(
            prefills=tuple((url, 8998) for url in [*gone_p, *(f.url for f in prefills)]),
            decodes=(*gone_d, *(f.url for f in decodes)),
            seed=7,
            **options,
        )
        clock = clock_of(asyncio.get_running_loop())
        app = create_app(settings, config or KairosConfig(), clock)
        # asyncio switches Nagle's 40 ms off only for a socket that says it is TCP.
        listener = socket.socket(proto=socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", loop="asyncio"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        base = f"http://127.0.0.1:{port}"
        client = await stack.enter_async_context(aiohttp.ClientSession(base))
        try:
            yield Bench(client, app.router, prefills, decodes)
        finally:
            await client.close()
            server.should_exit = True
            await asyncio.wait_for(serving, 10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.005)


def streaming(*parts: bytes, gap_s: float = 0.0, hold: asyncio.Event | None = None) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await asyncio.sleep(gap_s)
            await response.write(part)
        if hold is not None:
            await hold.wait()
        await response.write_eof()
        return response

    return answer


def failing(status: int, body: Any) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.05)  # so that the other server has been reached as well
        return web.json_response(body, status=status)

    return answer


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError
