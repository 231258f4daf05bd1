"""Real servers behind the router: a prefill and a decode server are killed under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.cpu.zygote import Zygote

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
REQUESTS, TOKENS, ENDS_WITHIN_S = 40, 48, 60.0


@pytest.fixture
def cluster(zygote: Zygote, out_dir: Path) -> Iterator[Cluster]:
    """Two of each role; an idle server checks its memory strictly, and dies of a leak."""
    spec = ClusterSpec(
        prefill=2,
        decode=2,
        server_args=["--max-total-tokens", "30000", "--chunked-prefill-size", "256"],
        router_args=[
            *("--request-timeout-secs", str(ENDS_WITHIN_S), "--seed", "1"),
            *("--protect-last-server", "off"),  # the request is not to blame for a kill
        ],
        env={
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
            "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "2",  # SGLang's default
        },
        log_dir=out_dir / "kill",
        zygote=zygote,
        stop_grace_s=0.0,  # SGLang looks for a SIGTERM every five seconds
    )
    with Cluster(spec) as started:
        yield started


async def load(url: str, count: int, tokens: int = TOKENS) -> list[str]:
    """How each of `count` streams ends, a tenth of a second apart."""

    async def one(session: aiohttp.ClientSession, index: int) -> str:
        await asyncio.sleep(0.1 * index)
        body = {
            "input_ids": [10 + (7 * index + at) % 400 for at in range(100 + 40 * (index % 10))],
            "stream": True,
            "ttft_ms": 20_000,
            "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0},
        }
        async with session.post(url + "/generate", json=body) as response:
            raw = (await response.read()).decode()
        if response.status != 200:
            return f"{response.status}: {raw[:200]}"
        events = [line[6:] for line in raw.split("\n") if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        if "error" in last:
            return "error event"
        assert last["meta_info"]["completion_tokens"] == tokens
        return "done"

    timeout = aiohttp.ClientTimeout(total=ENDS_WITHIN_S + 5)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        return list(await asyncio.gather(*(one(session, index) for index in range(count))))


def kill_when(cluster: Cluster, name: str, holds: Callable[[], bool]) -> None:
    """Kills a server once that `holds`; looks every 10 ms."""
    part = next(part for part in cluster.parts if part.name == name)

    def kill() -> None:
        while not holds():
            time.sleep(0.01)
        os.killpg(part.process.pid, signal.SIGKILL)
        cluster.parts.remove(part)

    threading.Thread(target=kill, daemon=True).start()


def requests_at(url: str, *states: str) -> int:
    """Requests that a server has in these states."""
    with urllib.request.urlopen(url + "/v1/loads", timeout=10) as answer:
        loads = json.load(answer)["loads"]
    return sum(load[f"num_{state}_reqs"] for load in loads for state in states)


def pending(url: str) -> int:
    """Requests that a server still has in any queue."""
    return requests_at(url, "running", "waiting")


def test_killing_a_prefill_and_then_a_decode_server_hangs_nobody_and_leaks_nothing(
    cluster: Cluster,
) -> None:
    assert set(asyncio.run(load(cluster.url, 8))) == {"done"}
    prefill, decode = cluster.prefill_urls[0], cluster.decode_urls[0]
    begun = time.monotonic()
    kill_when(cluster, "p0", lambda: time.monotonic() > begun + 1.5)
    ends = asyncio.run(load(cluster.url, REQUESTS))
    # Whoever was not prefilled moved to the other server. A prompt whose KV was under way when its
    # server died may have lost it after the first byte was promised, and says so.
    assert set(ends) <= {"done", "error event"}
    assert ends.count("done") >= REQUESTS - 5
    # Streams are under way on it when it dies, and far from their ends. What it says of itself may be
    # of the load before, so the present one gets time to reach it.
    begun = time.monotonic()
    kill_when(
        cluster,
        "d0",
        lambda: time.monotonic() > begun + 1.5 and requests_at(decode, "running") >= 2,
    )
    ends = asyncio.run(load(cluster.url, REQUESTS, 8 * TOKENS))
    assert set(ends) == {"done", "error event"}
    assert ends.count("done") >= REQUESTS / 2
    left = {*cluster.prefill_urls, *cluster.decode_urls} - {prefill, decode}
    deadline = time.monotonic() + 30
    while any(pending(url) for url in left):
        assert time.monotonic() < deadline, {url: pending(url) for url in left}
        time.sleep(0.2)
    time.sleep(2.0)  # idle checks run now
    assert set(asyncio.run(load(cluster.url, 8))) == {"done"}
    assert cluster.dead() is None
