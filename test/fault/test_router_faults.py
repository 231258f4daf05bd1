"""Processes killed, stopped and restarted under load: every request ends, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from helpers.fake_pd import free_port
from helpers.timing import once_undisturbed, promptly

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_server.py")
TOKENS, GAP_S = 10, 0.05
# Finds a silent server within about a second.
QUICK = ["--health-check-timeout-secs", "0.4", "--health-failure-threshold", "2"]
DONE, LATE = "done", 10.0


@dataclass(eq=False)
class Part:
    """A server or a router, and how to start it again."""

    argv: list[str]
    port: int
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        paths = filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH")))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen([sys.executable, *self.argv], env=env)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Bed:
    """Two prefill and two decode servers behind `routers`."""

    prefills: list[Part]
    decodes: list[Part]
    routers: list[Part]
    client: aiohttp.ClientSession
    tokens: int

    async def ask(self, router: int = 0, **extra: Any) -> str:
        """One stream: ``done``, or how it ended. Never longer than LATE seconds."""
        body = {"text": "x", "stream": True, **extra}
        try:
            async with (
                asyncio.timeout(LATE),
                self.client.post(self.routers[router].url + "/generate", json=body) as response,
            ):
                raw = await response.read()
        except TimeoutError:
            return "hung"
        except aiohttp.ClientError as error:
            return f"torn: {type(error).__name__}"
        if response.status != 200:
            return f"{response.status}: {json.loads(raw)['error']['message']}"
        events = [line[6:] for line in raw.decode().split("\n") if line.startswith("data: ")]
        errors = [event for event in events if '"error"' in event]
        if errors:
            return f"event {json.loads(errors[0])['error']['code']}"
        assert len(events) == self.tokens + 1
        return DONE

    async def load(self, seconds: float, router: int = 0) -> list[str]:
        """How forty requests a second end that are sent for so long."""
        tasks = []
        for _ in range(int(40 * seconds)):
            tasks.append(asyncio.create_task(self.ask(router)))
            await asyncio.sleep(1 / 40)
        return await asyncio.gather(*tasks)

    async def active(self, part: Part) -> int:
        async with self.client.get(part.url + "/active") as response:
            return int((await response.json())["active"])

    async def up(self, part: Part, router: int = 0) -> bool:
        async with self.client.get(self.routers[router].url + "/health") as response:
            return bool((await response.json())["servers"][part.url])

    async def router_is_idle(self, router: int = 0) -> bool:
        async with self.client.get(self.routers[router].url + "/metrics") as response:
            text = await response.text()
        lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
        names = ("router_in_flight", "router_held_bytes", "server_running", "owed_seconds")
        left = {name: value for name, value in lines if any(n in name for n in names)}
        return bool(left) and all(float(value) == 0.0 for value in left.values())


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)


@asynccontextmanager
async def bed(
    routers: int = 1, *flags: str, tokens: int = TOKENS, gap_s: float = GAP_S
) -> AsyncIterator[Bed]:
    async with AsyncExitStack() as stack:

        def part(argv: list[str], port: int) -> Part:
            found = Part(argv, port)
            stack.callback(lambda: found.kill())
            return found

        def fake(role: str, count: int) -> Part:
            port = free_port()
            return part([str(FAKE), role, str(port), str(count), str(gap_s)], port)

        prefills = [fake("prefill", 1) for _ in range(2)]
        decodes = [fake("decode", tokens) for _ in range(2)]
        wiring = [word for p in prefills for word in ("--prefill", p.url, str(p.port))]
        wiring += [word for d in decodes for word in ("--decode", d.url)]
        found = []
        for _ in range(routers):
            port = free_port()
            argv = ["-m", "sglang_kairos.launch_router", "--pd-disaggregation", *wiring]
            argv += ["--port", str(port), "--log-level", "warning", *QUICK]
            # Nobody kills these servers by a request.
            argv += ["--protect-last-server", "off", *flags]
            found.append(part(argv, port))
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        here = Bed(prefills, decodes, found, client, tokens)
        for server in (*prefills, *decodes, *found):
            await eventually(lambda server=server: _answers(client, server.url), 20.0)
        yield here


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url + "/health") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def test_a_prefill_server_killed_under_load_costs_no_request() -> None:
    async def main() -> None:
        async with bed() as b:
            loading = asyncio.create_task(b.load(2.0))
            await asyncio.sleep(0.6)
            b.prefills[0].kill()
            assert set(await loading) == {DONE}
            assert not await b.up(b.prefills[0])
            for server in (b.prefills[1], *b.decodes):
                await eventually(lambda server=server: _idle(b, server))
            await eventually(b.router_is_idle)
            b.prefills[0].start()
            await eventually(lambda: b.up(b.prefills[0]))

    run(main())


def test_a_prefill_server_killed_behind_streams_that_run_costs_none_of_them() -> None:
    """Nobody asks it for anything any more: it is a probe that finds out."""

    async def main() -> None:
        async with bed(tokens=40) as b:
            streams = [asyncio.create_task(b.ask()) for _ in range(8)]
            await asyncio.sleep(0.1)
            for server in b.prefills:
                await eventually(lambda server=server: _idle(b, server))
            b.prefills[0].kill()
            await eventually(lambda: _down(b, b.prefills[0]))
            assert set(await asyncio.gather(*streams)) == {DONE}

    run(main())


def test_a_decode_server_killed_mid_stream_ends_its_streams_with_an_error_and_no_others() -> None:
    async def main() -> None:
        async with bed() as b:
            loading = asyncio.create_task(b.load(2.0))
            await asyncio.sleep(0.8)
            running = await b.active(b.decodes[0])
            b.decodes[0].kill()
            ends = await loading
            assert set(ends) == {DONE, "event 502"}
            assert 0 < ends.count("event 502") <= running + 3
            for server in (*b.prefills, b.decodes[1]):
                await eventually(lambda server=server: _idle(b, server))
            await eventually(b.router_is_idle)

    run(main())


@pytest.mark.parametrize("role", ["prefills", "decodes"])
def test_a_server_that_hangs_is_found_and_nobody_hangs_with_it(role: str) -> None:
    async def main() -> None:
        async with bed() as b:
            hung: Part = getattr(b, role)[0]
            loading = asyncio.create_task(b.load(1.5))
            await asyncio.sleep(0.5)
            hung.signal(signal.SIGSTOP)
            try:
                ends = await loading
                assert set(ends) <= {DONE, "event 502"}
                assert ends.count(DONE) > len(ends) / 2
                if role == "prefills":
                    assert set(ends) == {DONE}
                assert set(await b.load(0.3)) == {DONE}
                for server in {*b.prefills, *b.decodes} - {hung}:
                    await eventually(lambda server=server: _idle(b, server))
                await eventually(b.router_is_idle)
            finally:
                hung.signal(signal.SIGCONT)
            await eventually(lambda: b.up(hung))
            await eventually(lambda: _idle(b, hung))

    run(main())


def test_a_killed_router_leaves_nothing_behind_and_its_peer_does_not_notice() -> None:
    async def main() -> None:
        async with bed(2) as b:
            loads = [asyncio.create_task(b.load(1.5, router)) for router in (0, 1)]
            await asyncio.sleep(0.7)
            b.routers[0].kill()
            mine, others = await asyncio.gather(*loads)
            assert set(others) == {DONE}
            assert all(end == DONE or end.startswith("torn") for end in mine)
            assert any(end != DONE for end in mine)
            for server in (*b.prefills, *b.decodes):
                await eventually(lambda server=server: _idle(b, server))
            await eventually(lambda: b.router_is_idle(1))

    run(main())


def test_sigterm_lets_what_is_in_flight_end_and_takes_nothing_new() -> None:
    async def main() -> None:
        async with bed() as b:
            running = [asyncio.create_task(b.ask()) for _ in range(10)]
            await asyncio.sleep(0.2)
            began = time.monotonic()
            b.routers[0].signal(signal.SIGTERM)
            await asyncio.sleep(0.15)
            assert (await b.ask()).startswith("torn")
            assert set(await asyncio.gather(*running)) == {DONE}
            assert b.routers[0].process.wait(30) == 0
            promptly(began, 4)

    once_undisturbed(lambda: run(main()))


def test_sigterm_with_a_delay_takes_new_requests_while_health_says_no() -> None:
    async def main() -> None:
        async with bed(1, "--drain-delay-secs", "1") as b:
            b.routers[0].signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            async with b.client.get(b.routers[0].url + "/health") as response:
                assert response.status == 503
            assert await b.ask() == DONE
            began = time.monotonic()
            assert b.routers[0].process.wait(30) == 0
            promptly(began, 5)

    once_undisturbed(lambda: run(main()))


def test_what_outlasts_the_grace_period_ends_with_an_error_and_is_aborted() -> None:
    async def main() -> None:
        async with bed(1, "--shutdown-grace-period-secs", "0.3", tokens=200) as b:
            running = [asyncio.create_task(b.ask()) for _ in range(4)]
            await asyncio.sleep(0.4)
            b.routers[0].signal(signal.SIGTERM)
            assert set(await asyncio.gather(*running)) == {"event 503"}
            began = time.monotonic()
            b.routers[0].process.wait(30)
            promptly(began, 8)
            for server in (*b.prefills, *b.decodes):
                await eventually(lambda server=server: _idle(b, server))

    once_undisturbed(lambda: run(main()))


def test_it_serves_https_when_given_a_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )

    async def main() -> None:
        port = free_port()
        words = "-m sglang_kairos.launch_router --pd-disaggregation --log-level warning"
        words += f" --prefill http://127.0.0.1:9 1 --decode http://127.0.0.1:9 --port {port}"
        router = Part(
            [*words.split(), "--tls-cert-path", str(cert), "--tls-key-path", str(key)], port
        )
        try:
            trusted = ssl.create_default_context(cafile=str(cert))
            async with aiohttp.ClientSession() as client:

                async def pinged() -> bool:
                    try:
                        url = f"https://127.0.0.1:{port}/ping"
                        async with client.get(url, ssl=trusted) as response:
                            return response.status == 200
                    except aiohttp.ClientError:
                        return False

                await eventually(pinged, 20.0)
        finally:
            router.kill()

    run(main())


async def _down(b: Bed, server: Part) -> bool:
    return not await b.up(server)


async def _idle(b: Bed, server: Part) -> bool:
    return await b.active(server) == 0
