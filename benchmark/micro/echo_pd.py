"""Prefill and decode servers that answer at once, and a client to match, for measuring routers.

Neither parses more of HTTP than it must, so that on one core they are several times faster than any
router between them. Not a test of HTTP: `test/helpers/fake_pd.py` is.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import uvloop

EVENTS = 4
_END = b"0\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _events() -> list[bytes]:
    found = []
    for count in range(1, EVENTS + 1):
        meta = {"prompt_tokens": 16, "completion_tokens": count, "finish_reason": None}
        event = {"text": "token " * count, "index": 0, "meta_info": meta}
        found.append(_chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))
    return [*found, _chunk(b"data: [DONE]\n\n") + _END]


_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_PARTS = _events()
_INFO = json.dumps({"internal_states": [{}], "loads": []}).encode()
_PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
    len(_INFO),
    _INFO,
)


class _Echo(asyncio.Protocol):
    """Answers every POST with a stream of EVENTS events, each written on its own."""

    def __init__(self) -> None:
        self._held = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._held += data
        while True:
            head, found, rest = self._held.partition(b"\r\n\r\n")
            if not found:
                return
            at = head.lower().find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(rest) < size:
                return
            self._held = rest[size:]
            assert self._transport is not None
            if head.startswith((b"POST /abort", b"GET")):
                self._transport.write(_PLAIN)
            else:
                self._transport.write(_STREAM + _PARTS[0])
                asyncio.get_running_loop().call_soon(self._more, 1)

    def _more(self, part: int) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(_PARTS[part])
        if part + 1 < len(_PARTS):
            asyncio.get_running_loop().call_soon(self._more, part + 1)


def _serve(listeners: Sequence[socket.socket]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for listener in listeners:
            await loop.create_server(_Echo, sock=listener)
        await asyncio.Event().wait()

    uvloop.run(main())


@contextmanager
def echo_servers(count: int) -> Iterator[list[str]]:
    """URLs of that many echo servers, all in one process."""
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(count)]
    urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(listeners,), daemon=True
    )
    process.start()
    for listener in listeners:
        listener.close()
    try:
        yield urls
    finally:
        process.terminate()
        process.join()


@dataclass
class ClientLoad:
    """What one run of the client saw. `latencies_s`: from sending to the last byte; `firsts_s`: to
    the first event."""

    seconds: float = 0.0
    failed: int = 0
    latencies_s: list[float] = field(default_factory=list)
    firsts_s: list[float] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


def _request(port: int, body: dict[str, object]) -> bytes:
    payload = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json"
    return f"{head}\r\ncontent-length: {len(payload)}\r\n\r\n".encode() + payload


class _Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, load: ClientLoad) -> None:
        self._load = load
        self._tail = b""
        self._sent_s = self._first_s = 0.0
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("closed"))

    def data_received(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-512:] if len(data) < 512 else data
        if not self._first_s and b"data:" in data:
            self._first_s = time.perf_counter()
        if self._tail.endswith(_END) and self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, raw: bytes, due_s: float | None = None) -> None:
        assert self._transport is not None
        self._tail, self._first_s = b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._sent_s = time.perf_counter() if due_s is None else due_s
        self._transport.write(raw)
        try:
            await asyncio.wait_for(self._done, 30)
        except (ConnectionError, TimeoutError):
            self._load.failed += 1
            return
        self._load.latencies_s.append(time.perf_counter() - self._sent_s)
        self._load.firsts_s.append(self._first_s - self._sent_s)


def closed_loop(port: int, seconds: float, connections: int) -> ClientLoad:
    """Every connection sends its next request when the last one is answered."""

    async def main() -> ClientLoad:
        load, raw = ClientLoad(), _request(port, _body())
        loop = asyncio.get_running_loop()
        clients = [await _connected(loop, load, port) for _ in range(connections)]
        began = time.perf_counter()

        async def run(client: _Client) -> None:
            while time.perf_counter() - began < seconds:
                await client.ask(raw)

        await asyncio.gather(*map(run, clients))
        load.seconds = time.perf_counter() - began
        return load

    return uvloop.run(main())


def open_loop(port: int, seconds: float, rate: float, connections: int = 256) -> ClientLoad:
    """Requests leave at their time, one every 1/rate seconds, on connections that are idle."""

    async def main() -> ClientLoad:
        load, raw = ClientLoad(), _request(port, _body())
        loop = asyncio.get_running_loop()
        idle = [await _connected(loop, load, port) for _ in range(connections)]
        running: set[asyncio.Task[None]] = set()
        began = time.perf_counter()

        async def run(client: _Client) -> None:
            await client.ask(raw)
            idle.append(client)

        for number in range(int(seconds * rate)):
            wait = began + number / rate - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if not idle:
                load.failed += 1
                continue
            task = asyncio.create_task(run(idle.pop()))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        load.seconds = time.perf_counter() - began
        return load

    return uvloop.run(main())


async def _connected(loop: asyncio.AbstractEventLoop, load: ClientLoad, port: int) -> _Client:
    _, client = await loop.create_connection(lambda: _Client(load), "127.0.0.1", port)
    return client


def _body() -> dict[str, object]:
    params = {"max_new_tokens": EVENTS, "temperature": 0}
    return {"text": "Tell me something. " * 20, "stream": True, "sampling_params": params}
