"""How far a reader must go to follow one request through the router: files it passes, and returns."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import sglang_kairos.router
from helpers.fake_pd import GENERATE, Fake, bench, streaming

ROUTER = Path(sglang_kairos.router.__file__).parent


@contextmanager
def entered(files: list[str]) -> Iterator[None]:
    """Writes down the router's file of every function that is called meanwhile."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(ROUTER)):
            files.append(str(Path(name).relative_to(ROUTER)))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def test_way() -> None:
    files: list[str] = []

    async def main() -> None:
        chunk = b'data: {"text": "a", "meta_info": {"completion_tokens": 1}}\n\n'
        async with bench(decode=Fake("decode", streaming(chunk, b"data: [DONE]\n\n"))) as b:
            async with b.client.post(GENERATE, json={"text": "x" * 600, "stream": True}) as r:
                await r.read()
            with entered(files):
                async with b.client.post(GENERATE, json={"text": "x" * 600, "stream": True}) as r:
                    await r.read()

    asyncio.run(main())
    files = [f for f in files if "poller" not in f]
    stays = [name for name, _ in groupby(files)]
    print(len(set(files)), len(stays), len(stays) - len(set(files)))
    print(sorted(set(files)))
    print(stays)
