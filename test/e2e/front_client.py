"""A client before a front end, which also looks at what arrives at the servers behind it."""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp

from helpers.front_ends import COMPLETIONS, GENERATE, STRAIGHT, FrontEnd, Way
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.local_http import open_url

CHUNK = 256  # tokens of a prefill step
BLOCKER = 5000  # tokens of a prompt behind which others queue: seconds on a busy machine


def body_of(path: str, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    if path == GENERATE:
        return {"text": prompt, "sampling_params": {"max_new_tokens": tokens}, **more}
    body = {"model": "m", "max_tokens": tokens, **more}
    if path == COMPLETIONS:
        return {"prompt": prompt, **body}
    return {"messages": [{"role": "user", "content": prompt}], **body}


def joined(body: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Both; of objects in both, the keys of both."""
    return body | {
        key: joined(body[key], value) if isinstance(body.get(key), dict) else value
        for key, value in more.items()
    }


class Front:
    """Sends requests through a front end and looks at what arrives at the servers."""

    def __init__(self, front_end: FrontEnd, cluster: Cluster, url: str) -> None:
        self.front_end, self.cluster, self.url = front_end, cluster, url
        self.pair = cluster.prefill_urls[0], cluster.decode_urls[0]

    def waits_until_it_serves(self) -> None:
        """A gateway may be healthy before it knows its servers."""
        deadline = time.monotonic() + 60
        while (status := asyncio.run(self.post(COMPLETIONS, body_of(COMPLETIONS, "x", 1)))) != 200:
            assert time.monotonic() < deadline, f"{self.front_end.title} answers {status}"
            time.sleep(0.2)

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str] | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> int:
        """The status; `first` is called at the first event of a stream. No front end: to both."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:

            async def one(base: str, body: dict[str, Any], watched: bool) -> int:
                async with session.post(base + path, json=body, headers=headers) as answer:
                    seen = False
                    async for line in answer.content:
                        if watched and not seen and line.startswith(b"data:"):
                            seen = True
                            first()
                    return answer.status

            if self.url:
                return await one(self.url, body, True)
            both = body | {
                "bootstrap_host": "127.0.0.1",
                "bootstrap_port": self.cluster.bootstrap_ports[0],
                "bootstrap_room": random.getrandbits(62),
            }
            legs = [one(base, both, base == self.pair[1]) for base in self.pair]
            return max(await asyncio.gather(*legs))

    def reports(self) -> list[dict[str, Any]]:
        """Kairos' own report of both servers."""

        def ask(base: str) -> dict[str, Any]:
            with open_url(urllib.request.Request(base + "/server_info"), timeout=30) as answer:
                found: dict[str, Any] = json.load(answer)["internal_states"][0]["kairos"]
                return found

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(ask, self.pair))

    def arrives(self, way: Way, path: str) -> bool:
        """Whether both schedulers see what is said so; anything but an answer is a failure."""
        more, headers = way.say(path)
        body = joined(body_of(path, "Once upon", 1), more)
        status = asyncio.run(self.post(path, body, headers))
        assert status == 200, (self.front_end.title, way.name, path)
        return all(way.arrived(report["last_request"]) for report in self.reports())

    def counted(self, name: str) -> int:
        """A counter of the prefill server's."""
        return int(self.reports()[0]["counters"].get(name, 0))

    async def order(self, ways: list[Way], blockers: int) -> list[Way] | None:
        """Ways in the order of their first tokens; None if one came before all were there."""
        straight = Front(STRAIGHT, self.cluster, "")
        first: list[Way] = []
        blocked = {"sampling_params": {"max_new_tokens": 1}, "ttft_ms": 60_000}
        there = self.counted("requests") + blockers + len(ways)
        going = []
        for _ in range(blockers):
            ids = [random.randrange(10, 500) for _ in range(BLOCKER)]
            body = {"input_ids": ids, **blocked}
            going.append(asyncio.create_task(straight.post(GENERATE, body)))
        await asyncio.sleep(0.1)
        for way in ways:
            more, headers = way.say(COMPLETIONS)
            prompt = f"{random.random()} " + "word " * CHUNK
            body = joined(body_of(COMPLETIONS, prompt, 1, stream=True), more)
            going.append(
                asyncio.create_task(
                    self.post(COMPLETIONS, body, headers, lambda way=way: first.append(way))
                )
            )
        while not first and await asyncio.to_thread(self.counted, "requests") < there:
            await asyncio.sleep(0.05)
        early = bool(first)
        assert await asyncio.gather(*going) == [200] * len(going)
        return None if early else first
