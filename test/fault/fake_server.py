"""A prefill or decode server as a process of its own, so that it can be killed or stopped.

    python fake_server.py prefill|decode PORT TOKENS GAP_S

Prefill answers after GAP_S; decode, once the prefill server named in the request has the prompt's
KV (the bootstrap port is that server's own), with TOKENS events GAP_S apart. If KV does not come,
decode answers 500 only after a long while, as SGLang does. ``/active`` tells how many requests it
is working on and which ids it was told to abort. SIGTERM ends it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from aiohttp import ClientError, ClientSession, web

KV_TIMEOUT_S = 8.0
ROOMS: dict[int, asyncio.Event] = {}
ACTIVE: set[str] = set()
ABORTED: list[str] = []


async def generate(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    rid = body["rid"]
    ACTIVE.add(rid)
    try:
        if request.app["role"] == "prefill":
            await asyncio.sleep(request.app["gap_s"])
            ROOMS.setdefault(body["bootstrap_room"], asyncio.Event()).set()
        elif not await has_kv(body):
            return web.json_response({"error": {"message": "KV transfer failed"}}, status=500)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for count in range(request.app["tokens"]):
            await asyncio.sleep(request.app["gap_s"])
            await response.write(b'data: {"n": %d}\n\n' % count)
        await response.write(b"data: [DONE]\n\n")
        return response
    finally:
        ACTIVE.discard(rid)


async def has_kv(body: dict[str, Any]) -> bool:
    """Wait for the prompt's KV."""
    url = f"http://{body['bootstrap_host']}:{body['bootstrap_port']}/kv"
    try:
        async with (
            asyncio.timeout(KV_TIMEOUT_S),
            ClientSession() as session,
            session.get(url, params={"room": body["bootstrap_room"]}) as response,
        ):
            return response.status == 200
    except (ClientError, TimeoutError):
        await asyncio.sleep(KV_TIMEOUT_S)
        return False


async def kv(request: web.Request) -> web.Response:
    await ROOMS.setdefault(int(request.query["room"]), asyncio.Event()).wait()
    return web.Response()


async def abort(request: web.Request) -> web.Response:
    ABORTED.append((await request.json())["rid"])
    return web.Response()


async def active(_: web.Request) -> web.Response:
    return web.json_response({"active": len(ACTIVE), "aborted": ABORTED})


async def tell(_: web.Request) -> web.Response:
    return web.json_response({})


def main() -> None:
    app = web.Application()
    app["role"], port = sys.argv[1], int(sys.argv[2])
    app["tokens"], app["gap_s"] = int(sys.argv[3]), float(sys.argv[4])
    app.router.add_post("/generate", generate)
    app.router.add_post("/abort_request", abort)
    app.router.add_get("/active", active)
    app.router.add_get("/kv", kv)
    for path in ("/server_info", "/v1/loads", "/health"):
        app.router.add_get(path, tell)
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        handler_cancellation=True,
        print=None,
        shutdown_timeout=0.1,
    )


if __name__ == "__main__":
    main()
