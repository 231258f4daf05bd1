"""A stand-in for llm-d's sidecar before SGLang: body and headers go to both servers unchanged.

It adds the three bootstrap fields and streams what decode answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {"host", "content-length", "connection", "accept-encoding"}


class Sidecar:
    """Between one prefill and one decode server; usable on the event loop that called `start`."""

    def __init__(self, prefill: str, bootstrap_port: int, decode: str) -> None:
        self._prefill, self._decode = prefill, decode
        host = urlsplit(prefill).hostname
        self._bootstrap = {"bootstrap_host": host, "bootstrap_port": bootstrap_port}

    async def start(self) -> int:
        """Serves from now on. Returns the port."""
        self._session = aiohttp.ClientSession()
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/{path:.*}", self._forward)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read()) | self._bootstrap
        raw = json.dumps(body | {"bootstrap_room": random.getrandbits(62)}).encode()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}

        async def prefill() -> None:
            async with self._session.post(
                self._prefill + request.path, data=raw, headers=headers
            ) as leg:
                await leg.read()

        other = asyncio.create_task(prefill())
        async with self._session.post(
            self._decode + request.path, data=raw, headers=headers
        ) as leg:
            answer = web.StreamResponse(
                status=leg.status, headers={"content-type": leg.content_type}
            )
            await answer.prepare(request)
            async for piece in leg.content.iter_any():
                await answer.write(piece)
        await other
        await answer.write_eof()
        return answer


@contextlib.contextmanager
def sidecar(prefill: str, bootstrap_port: int, decode: str) -> Iterator[str]:
    """Runs a sidecar in a thread of its own. Yields its URL."""
    loop, runs = asyncio.new_event_loop(), Sidecar(prefill, bootstrap_port, decode)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        port = asyncio.run_coroutine_threadsafe(runs.start(), loop).result(30)
        yield f"http://127.0.0.1:{port}"
        asyncio.run_coroutine_threadsafe(runs.stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
