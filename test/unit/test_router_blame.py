"""Whose fault a failure is: servers that die, requests that kill, aborts, ids, descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from helpers.fake_pd import GENERATE, Fake, bench, failing, never, streaming, until
from sglang_kairos.router import serve
from sglang_kairos.router.fleet import outliers
from sglang_kairos.router.fleet.outliers import Failures, own_shortage, was_aborted
from sglang_kairos.router.health_rules import HealthRules

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

BODY = {"text": "x"}


async def deadly(*fakes: Fake) -> None:
    """From now on, the first request that one of these gets ends it."""
    for fake in fakes:
        site = next(iter(fake.runner.sites))

        async def die(request: web.Request, site: Any = site) -> web.StreamResponse:
            await site.stop()
            assert request.transport is not None
            request.transport.abort()
            await asyncio.Event().wait()
            raise AssertionError

        fake.answer = die


def alive(*fakes: Fake) -> int:
    return sum(bool(fake.runner.sites) for fake in fakes)


@pytest.mark.parametrize(("retries", "survivors"), [(3, 2), (0, 2)])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_request_under_which_a_server_died_is_not_carried_through_the_fleet(
    role: str, retries: int, survivors: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        fakes: dict[str, Any] = {"prefill": Fake("prefill", never), "decode": Fake("decode", never)}
        fakes[role] = [Fake(role) for _ in range(3)]
        async with bench(**fakes, max_retries=retries) as b:
            servers = b.prefills if role == "prefill" else b.decodes
            await deadly(*servers)
            status, answer = await asyncio.wait_for(b.post(GENERATE, BODY), 20)
            assert status == 502
            assert "broke off" in answer["error"]["message"] or retries == 0
            assert alive(*servers) == (1 if retries else survivors)

    with caplog.at_level(logging.WARNING):
        await main()
    assert any("cut off by" in line and "request " in line for line in caplog.messages)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_last_live_server_of_a_role_is_spared(role: str) -> None:
    fakes: dict[str, Any] = {"prefill": Fake("prefill", never), "decode": Fake("decode", never)}
    fakes[role] = [Fake(role) for _ in range(2)]
    async with bench(**fakes) as b:
        servers = b.prefills if role == "prefill" else b.decodes
        await deadly(*servers)
        status, answer = await asyncio.wait_for(b.post(GENERATE, BODY), 20)
        assert status == 502
        assert "the last one" in answer["error"]["message"]
        assert alive(*servers) == 1
        metrics = await (await b.client.get("/metrics")).text()
        assert f'cut_off_total{{outcome="ended",role="{role}"}} 1.0' in metrics


async def test_with_the_last_server_unprotected_it_is_tried_there() -> None:
    decodes = [Fake("decode"), Fake("decode")]
    async with bench(decode=decodes, protect_last_server=False) as b:
        await deadly(decodes[0])
        for _ in range(2):
            status, _ = await asyncio.wait_for(b.post(GENERATE, BODY), 20)
            assert status == 200


async def test_an_id_used_twice_is_refused_and_the_first_goes_on() -> None:
    go_on = asyncio.Event()
    decode = Fake("decode", streaming(b"data: 1\n\n", b"data: [DONE]\n\n", hold=go_on))
    async with bench(decode=decode) as b:
        body = {"text": "x", "rid": "job-7", "stream": True}
        async with b.client.post(GENERATE, json=body) as first:
            await first.content.readany()
            status, answer = await b.post(GENERATE, {"text": "y", "rid": "job-7"})
            assert (status, answer["error"]["param"]) == (400, "rid")
            assert "job-7" in answer["error"]["message"]
            go_on.set()
            await first.read()
        assert b.d.aborted == b.p.aborted == []
        assert len(b.d.bodies) == 1
        async with b.client.post(GENERATE, json=body) as again:
            assert again.status == 200  # the id is free again


async def test_a_refused_attempt_is_never_aborted_by_its_name() -> None:
    refusal = failing(400, {"error": {"message": "Duplicate request ID detected: job-7"}})
    async with bench(Fake("prefill", never), Fake("decode", refusal)) as b:
        status, _ = await b.post(GENERATE, {"text": "x", "rid": "job-7"})
        assert status == 400
        await b.router.proxy.finish()
        assert b.p.aborted == b.d.aborted == []
        await until(b.p.left.is_set)  # its connection was closed instead


async def test_an_id_that_another_begins_with_is_not_aborted_by_name() -> None:
    async with bench(Fake("prefill", never), Fake("decode", never)) as b:
        short, long_ = (
            asyncio.create_task(b.post(GENERATE, {"text": "x", "rid": rid}))
            for rid in ("job-1", "job-10")
        )
        await until(lambda: len(b.d.bodies) == len(b.p.bodies) == 2)
        short.cancel()
        await until(lambda: b.router.proxy.limits.in_flight == 1)
        await b.router.proxy.finish()
        assert b.d.aborted == []
        long_.cancel()
        await until(lambda: b.d.aborted == ["job-10"])
        for task in (short, long_):
            with suppress(asyncio.CancelledError):
                await task


ABORTED = {"error": {"message": "KVTransferError(bootstrap_room=7): Aborted by AbortReq."}}


@pytest.mark.parametrize("ask", [{"rid": "x1"}, {"abort_all": True}])
async def test_who_was_aborted_through_the_router_is_not_run_again(ask: dict[str, Any]) -> None:
    async def main() -> None:
        go_on = asyncio.Event()

        async def fails_later(_: web.Request) -> web.StreamResponse:
            await go_on.wait()
            return web.json_response({"error": {"message": "it broke"}}, status=500)

        prefills = [Fake("prefill", fails_later), Fake("prefill", fails_later)]
        async with bench(prefills, Fake("decode", never)) as b:
            sending = asyncio.create_task(b.post(GENERATE, {"text": "x", "rid": "x1"}))
            await until(lambda: bool(b.d.bodies))
            async with b.client.post("/abort_request", json=ask) as told:
                await told.read()
            go_on.set()
            status, answer = await asyncio.wait_for(sending, 20)
            assert (status, answer["error"]["message"]) == (500, "it broke")
            assert len(b.d.bodies) == 1

    async def fake_abort(self: Fake, request: web.Request) -> web.Response:
        self.aborted.append((await request.json()).get("rid", "all"))
        return web.Response()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fake, "abort", fake_abort)
        await main()


@pytest.mark.parametrize("stream", [False, True])
async def test_who_was_aborted_at_a_server_is_not_run_again(stream: bool) -> None:
    event = b'data: {"error": {"message": "Aborted by AbortReq.", "code": 500}}\n\n'
    refusal = streaming(event) if stream else failing(500, ABORTED)
    prefills = [Fake("prefill", refusal), Fake("prefill", refusal)]
    async with bench(prefills, Fake("decode", never)) as b:
        status, answer = await b.post(GENERATE, {"text": "x", "stream": stream})
        assert status == 500
        assert "Aborted by AbortReq" in answer["error"]["message"]
        assert len(b.d.bodies) == 1


async def test_an_abort_that_names_nobody_is_refused() -> None:
    async with bench() as b:
        for body in ({}, {"rid": ""}, {"rid": None, "abort_all": False}):
            status, answer = await b.post("/abort_request", body)
            assert (status, answer["error"]["param"]) == (400, "rid")
        assert b.d.aborted == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": "Aborted by AbortReq."}', True),
        (b'{"message": "Aborted", "code": 500}', True),
        (b'{"detail": "Abort in waiting queue"}', True),
        (b'{"message": "Transfer aborted by peer"}', False),
        (b"", False),
    ],
)
def test_an_abort_is_told_from_a_failure_by_what_sglang_says(body: bytes, expected: bool) -> None:
    assert was_aborted(body) is expected


async def test_what_two_servers_say_of_a_request_is_the_requests_fault() -> None:
    broken = failing(500, {"error": {"message": "list index out of range"}})
    decodes = [Fake("decode", broken), Fake("decode", broken)]
    rules = HealthRules(request_failures=3)
    async with bench(decode=decodes, health=rules) as b:
        for _ in range(10):
            status, _ = await b.post(GENERATE, BODY)
            assert status == 500
        assert all(server.up for server in b.router.fleet.servers)
        assert (await b.client.get("/health")).status == 200


async def test_failures_alone_never_empty_a_role() -> None:
    async with bench(
        decode=Fake("decode", failing(500, {})), health=HealthRules(request_failures=2)
    ) as b:
        for _ in range(6):
            await b.post(GENERATE, BODY)
        assert b.router.fleet.decodes[0].up
        assert (await b.client.get("/health")).status == 200


class Named:
    """Stands for a server."""

    def __init__(self, name: str) -> None:
        self.name = name


A, B = Named("a"), Named("b")
SERVED, LEFT = "served", "given up"


@pytest.mark.parametrize(
    ("said", "end", "had_others", "blamed"),
    [
        ([(A, 500)], SERVED, True, [A]),
        ([(A, 500), (B, 500)], LEFT, True, []),
        ([(A, 500), (B, 504)], LEFT, True, [A, B]),
        ([(A, 500), (A, 500)], LEFT, True, [A]),
        ([(A, 500)], LEFT, True, []),
        ([(A, 500)], LEFT, False, [A]),
        ([(A, 500), (B, 500)], SERVED, True, [A, B]),
        ([], LEFT, True, []),
    ],
)
def test_a_server_is_blamed_for_what_another_could_do(
    said: list[tuple[Any, int]], end: str, had_others: bool, blamed: list[Any]
) -> None:
    found: list[Any] = []
    failures = Failures(found.append)
    for server, status in said:
        failures.answered(server, status)
    if end == SERVED:
        failures.served()
    else:
        failures.given_up(had_others)
    assert found == blamed


def out_of_descriptors() -> aiohttp.ClientConnectorError:
    key: Any = None
    return aiohttp.ClientConnectorError(key, OSError(errno.EMFILE, "Too many open files"))


async def test_the_routers_own_shortage_of_descriptors_costs_no_server() -> None:
    async with bench() as b:

        def post(*_: Any, **__: Any) -> Any:
            raise out_of_descriptors()

        session = b.router.proxy._attempts._session
        session.post, whole = post, session.post
        for _ in range(10):
            status, answer = await b.post(GENERATE, BODY)
            assert status == 503
            assert "descriptor" in answer["error"]["message"]
        assert all(server.up for server in b.router.fleet.servers)
        b.router._poller._failed(b.router.fleet.decodes[0], out_of_descriptors())
        assert (await b.client.get("/health")).status == 200
        session.post = whole
        assert (await b.post(GENERATE, BODY))[0] == 200


def test_a_refused_connection_is_no_shortage() -> None:
    key: Any = None
    assert own_shortage(out_of_descriptors())
    assert not own_shortage(aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, "no")))


def test_the_router_takes_as_many_descriptors_as_it_may_and_says_when_they_do_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: taken.append(limits))
    assert serve.raise_descriptor_limit(1000) == ""
    assert taken == [(4096, 4096)]
    text = serve.raise_descriptor_limit(8192)
    assert "--max-concurrent-requests 8192" in text and "from 1344 requests" in text


async def test_a_server_that_only_dropped_a_connection_still_answers() -> None:
    async with bench() as b:
        server = b.router.fleet.decodes[0]
        assert await outliers.answers(server)
        server.url = "http://127.0.0.1:1"
        assert not await outliers.answers(server)
