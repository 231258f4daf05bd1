"""The patch for upstream's Python PD balancer, applied to the released wheel and served through."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from helpers.fake_pd import GENERATE, Fake, free_port, streaming

ROOT = Path(__file__).resolve().parents[2]
PATCH = ROOT / "patches" / "sglang-router-0.3.2" / "0001-mini-lb-kairos-policy.patch"
WHEEL = importlib.util.find_spec("sglang_router")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(WHEEL is None, reason="sglang_router is not installed"),
]


def patched(into: Path) -> Path:
    """A copy of the wheel's Python files, patched; the Rust library is linked."""
    assert WHEEL is not None
    assert WHEEL.origin is not None
    source = Path(WHEEL.origin).parent
    package = into / "sglang_router"
    package.mkdir()
    for file in source.iterdir():
        if file.suffix == ".py":
            shutil.copy(file, package)
        elif file.suffix == ".so":
            (package / file.name).symlink_to(file)
    # Only for tracing, and ten seconds of imports.
    (into / "sglang.py").write_text("raise ImportError\n")
    command = ["git", "apply", "-p5", str(PATCH)]
    subprocess.run(command, cwd=into, check=True, capture_output=True)
    return into


def launch(tree: Path, *words: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join((str(tree), str(ROOT / "python")))
    return subprocess.Popen(
        [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", *words],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
    )


async def test_with_the_policy_requests_go_where_less_is_owed(tmp_path: Path) -> None:
    async def slowly(_: web.Request) -> web.Response:
        await asyncio.sleep(0.6)
        return web.json_response({})

    async def later(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.7)
        if (await request.json())["stream"]:
            return await streaming(b"data: {}\n\n")(request)
        return web.json_response({})

    prefills = [Fake("prefill", slowly), Fake("prefill", slowly)]
    decodes = [Fake("decode", later), Fake("decode", later)]
    async with AsyncExitStack() as stack:
        for fake in (*prefills, *decodes):
            await stack.enter_async_context(fake.run())
        words = ["--mini-lb", "--policy", "kairos", "--port", str(port := free_port())]
        for fake in prefills:
            words += ["--prefill", fake.url, "8998"]
        for fake in decodes:
            words += ["--decode", fake.url]
        process = launch(patched(tmp_path), *words)
        stack.callback(process.wait)
        stack.callback(process.kill)
        client = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))
        async with asyncio.timeout(30):
            while True:
                try:
                    async with client.get("/health"):
                        break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.05)

        texts = (letter * 4000 for letter in "abcdefgh")

        async def one(stream: bool) -> int:
            body = {"text": next(texts), "stream": stream, "ttft_ms": 5000}
            async with client.post(GENERATE, json=body) as response:
                await response.read()
                return response.status

        # Both prefill servers look alike, so the first two requests go to one each, and while
        # they run the third and fourth again.
        found = await asyncio.gather(*(one(stream) for stream in (False, True, False, True)))
        assert set(found) == {200}
        assert len(prefills[0].bodies) == len(prefills[1].bodies) == 2
        assert len(decodes[0].bodies) == len(decodes[1].bodies) == 2


def test_the_rust_router_refuses_the_policy_and_says_what_to_do(tmp_path: Path) -> None:
    process = launch(
        patched(tmp_path), "--policy", "kairos", "--prefill", "http://h:1", "--decode", "http://h:2"
    )
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"add --mini-lb" in error
