"""How far somebody must go to follow one request through the router: files, and ways back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import sglang_kairos.router
from helpers.fake_pd import GENERATE, Bench, Fake, bench, streaming

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

ROUTER = Path(sglang_kairos.router.__file__).parent
CHUNK = b'data: {"text": "a", "meta_info": {"completion_tokens": 1}}\n\n'


@contextmanager
def entered(files: list[str]) -> Iterator[None]:
    """Writes down the router's file of every function that is called meanwhile.

    A coroutine that goes on after a wait, or a generator, is not called a second time.
    """
    before: set[FrameType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROUTER) and frame not in before:
            before.add(frame)
            files.append(path.relative_to(ROUTER).as_posix())

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


async def ask(b: Bench) -> None:
    """One streamed request, to its last byte."""
    async with b.client.post(GENERATE, json={"text": "x" * 600, "stream": True}) as response:
        assert (await response.read()).endswith(b"[DONE]\n\n")


async def test_a_request_passes_few_files() -> None:
    """Before the rooms: 13 files of the app and request/ in 60 stays; of the router, 23 in 98."""
    files: list[str] = []
    async with bench(decode=Fake("decode", streaming(CHUNK, b"data: [DONE]\n\n"))) as b:
        await ask(b)
        await b.router._poller.stop()
        with entered(files):
            await ask(b)
    way = [name for name in files if name == "app.py" or name.startswith("request/")]
    stays = [name for name, _ in groupby(way)]
    everything = [name for name, _ in groupby(files)]
    assert set(way) == {
        "app.py",
        "request/serving.py",
        "request/context.py",
        "request/body.py",
        "request/attempt.py",
        "request/upstream_stream.py",
        "request/sse.py",
    }
    assert len(stays) <= 38
    assert len(set(files)) <= 19
    assert len(everything) <= 86
