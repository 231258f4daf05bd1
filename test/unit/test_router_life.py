"""Servers that fail, hang, come and go; clients and keys; the end of the router."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_clock import now_s
from helpers.fake_pd import (
    GENERATE,
    Bench,
    Fake,
    bench,
    failing,
    never,
    streaming,
    until,
)
from sglang_kairos.router.cancellation import Cancellation
from sglang_kairos.router.health_rules import HealthRules
from sglang_kairos.router.options import OptionError, parse_options

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

STREAM = {"text": "x", "stream": True}


def torn_once() -> Any:
    """Breaks its first connection off before any answer, then serves."""
    calls = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"text": "second"})

    return answer


async def idle(b: Bench) -> None:
    """Nothing is left on the router's books."""
    fleet, limits = b.router.fleet, b.router.proxy.limits
    await until(
        lambda: (
            all(not server.attempts for server in fleet.servers)
            and all(server.owed == 0 for server in fleet.prefills)
            and all((d.running, d.tokens) == (0, 0) for d in fleet.decodes)
            and (limits.in_flight, limits.held_bytes) == (0, 0)
        )
    )


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
async def test_an_error_answer_is_tried_on_another_pair(status: int) -> None:
    bad = Fake("decode", failing(status, {"error": {"message": "no"}}))
    async with bench(decode=[bad, Fake("decode")]) as b:
        for _ in range(4):
            assert (await b.post(GENERATE, {"text": "x"}))[0] == 200
        assert len(b.decodes[1].bodies) == 4
        rids = [body["rid"] for fake in b.decodes for body in fake.bodies]
        assert len(set(rids)) == len(rids)
        await idle(b)


async def test_an_error_event_before_the_first_token_is_tried_on_another_pair() -> None:
    event = {"error": {"message": "KV transfer failed", "code": 500}}
    bad = Fake("decode", streaming(b"data: " + json.dumps(event).encode() + b"\n\n"))
    good = Fake("decode", streaming(b"data: {}\n\n"))
    async with bench(decode=[bad, good]) as b:
        for _ in range(4):
            async with b.client.post(GENERATE, json=STREAM) as response:
                assert await response.read() == b"data: {}\n\n"


async def test_a_clients_mistake_is_answered_once_and_not_tried_again() -> None:
    decodes = [Fake("decode", failing(400, {"error": {"message": "bad"}})) for _ in range(2)]
    async with bench(decode=decodes) as b:
        assert (await b.post(GENERATE, {"text": "x"}))[0] == 400
        assert sum(len(fake.bodies) for fake in decodes) == 1


async def test_a_torn_connection_is_tried_once_more_on_the_only_pair() -> None:
    async with bench(decode=Fake("decode", torn_once())) as b:
        assert await b.post(GENERATE, {"text": "x"}) == (200, {"text": "second"})
        await idle(b)


async def test_after_the_first_byte_nothing_is_tried_again() -> None:
    async def breaking(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.abort()
        return response

    decodes = [Fake("decode", breaking), Fake("decode", breaking)]
    async with bench(decode=decodes) as b:
        async with b.client.post(GENERATE, json=STREAM) as response:
            assert b"502" in await response.read()
        assert sum(len(fake.bodies) for fake in decodes) == 1
        await idle(b)


async def test_a_server_that_fails_requests_is_ejected_and_comes_back() -> None:
    bad = Fake("decode", failing(500, {"error": {"message": "no"}}))
    rules = HealthRules(request_failures=2, eject_s=1.0)
    async with bench(decode=[bad, Fake("decode")], policy="round_robin", health=rules) as b:
        for _ in range(8):
            assert (await b.post(GENERATE, {"text": "x"}))[0] == 200
        assert len(bad.bodies) == 2
        assert b.router.fleet.decodes[0].describe()["state"] == "ejected"
        async with b.client.get("/metrics") as response:
            assert 'reason="outlier"' in await response.text()
        bad.answer = None
        await until(lambda: b.router.fleet.decodes[0].up)
        for _ in range(2):
            assert (await b.post(GENERATE, {"text": "x"}))[0] == 200
        assert len(bad.bodies) == 3


async def serves_the_second(request: web.Request) -> web.StreamResponse:
    """As a decode server whose first request's prefill server has gone silent."""
    request.app["calls"] = request.app.get("calls", 0) + 1
    return await never(request) if request.app["calls"] == 1 else web.json_response({})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_who_waits_for_a_silent_server_is_moved_to_another_one(role: str) -> None:
    hung = asyncio.Event()

    async def tell(_: web.Request) -> web.Response:
        if hung.is_set():
            await asyncio.Event().wait()
        return web.json_response({})

    silent = Fake(role, never)
    silent.tell = silent.load = tell  # type: ignore[method-assign]
    fakes: dict[str, Any] = {"prefill": None, "decode": None}
    fakes[role] = [silent, Fake(role)]
    other = "decode" if role == "prefill" else "prefill"
    fakes[other] = Fake("decode", serves_the_second) if role == "prefill" else None
    rules = HealthRules(probe_failures=1)
    async with bench(**fakes, policy="round_robin", health=rules, probe_timeout_s=0.2) as b:
        sending = asyncio.create_task(b.post(GENERATE, {"text": "x"}))
        await until(lambda: bool(silent.bodies))
        hung.set()
        began = now_s()
        status, _ = await asyncio.wait_for(sending, 30)
        assert status == 200
        assert now_s() - began < 5
        assert b.router.fleet.find(silent.url).describe()["state"] == "gone"
        await idle(b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stream", "prefill_answers"), [(True, True), (True, False), (False, True)]
)
async def test_who_has_left_prefill_does_not_care_what_becomes_of_it(
    stream: bool, prefill_answers: bool
) -> None:
    """Its KV has been taken over once prefill has answered, or once decode has a token."""

    hung, hold = asyncio.Event(), asyncio.Event()

    async def tell(_: web.Request) -> web.Response:
        if hung.is_set():
            await asyncio.Event().wait()
        return web.json_response({})

    async def whole(_: web.Request) -> web.Response:
        await hold.wait()
        return web.json_response({})

    events = streaming(b"data: 1\n\n", hold=hold)
    silent = Fake("prefill", None if prefill_answers else never)
    silent.tell = silent.load = tell  # type: ignore[method-assign]
    decode = Fake("decode", events if stream else whole)
    options: dict[str, Any] = {"probe_timeout_s": 0.1, "policy": "round_robin"}
    options["health"] = HealthRules(probe_failures=1)
    async with bench([silent, Fake("prefill")], decode, **options) as b:
        asking = asyncio.create_task(b.client.post(GENERATE, json={"text": "x", "stream": stream}))
        server = b.router.fleet.find(silent.url)
        await until(lambda: bool(silent.bodies))
        if stream:
            assert (await (await asking).content.readany()) == b"data: 1\n\n"
        await until(lambda: stream or server.owed == 0)
        hung.set()
        await until(lambda: server.describe()["state"] == "gone")
        await asyncio.sleep(0.05)
        hold.set()
        response = await asking
        assert response.status == 200
        assert await response.read() == (b"" if stream else b"{}")
        assert len(decode.bodies) == 1, "it was not asked twice"
        await idle(b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_the_only_server_of_its_role_keeps_its_requests_while_it_is_silent(role: str) -> None:
    over = asyncio.Event()

    async def tell(_: web.Request) -> web.Response:
        await over.wait()
        return web.json_response({})

    async def answer(_: web.Request) -> web.StreamResponse:
        await over.wait()
        return web.json_response({})

    fakes = {name: Fake(name, answer) for name in ("prefill", "decode")}
    silent = fakes[role]
    silent.tell = silent.load = tell  # type: ignore[method-assign]
    rules = HealthRules(probe_failures=1)
    async with bench(**fakes, health=rules, probe_timeout_s=0.1) as b:
        sending = asyncio.create_task(b.post(GENERATE, {"text": "x"}))
        await until(lambda: b.router.fleet.find(silent.url).describe()["state"] == "gone")
        assert not sending.done()
        over.set()
        began = now_s()
        status, _ = await asyncio.wait_for(sending, 30)
        assert status == 200
        assert now_s() - began < 5
        assert len(silent.bodies) == 1, "it was not asked twice"
        await until(lambda: b.router.fleet.find(silent.url).up)
        await idle(b)


async def test_a_request_ends_with_504_when_its_time_is_up_and_both_servers_are_told() -> None:
    async with bench(Fake("prefill", never), Fake("decode", never), request_timeout_s=0.2) as b:
        began = now_s()
        status, answer = await b.post(GENERATE, {"text": "x"})
        assert status == 504
        assert "0.2 s" in answer["error"]["message"]
        assert now_s() - began < 1.0
        rid = b.d.bodies[0]["rid"]
        await until(lambda: b.p.aborted == [rid] and b.d.aborted == [rid])
        await idle(b)


async def test_a_stream_whose_time_is_up_ends_with_an_error_event() -> None:
    decode = Fake("decode", streaming(b"data: {}\n\n", hold=asyncio.Event()))
    async with bench(decode=decode, request_timeout_s=0.3) as b:
        async with b.client.post(GENERATE, json=STREAM) as response:
            events = (await response.read()).split(b"\n\n")
        assert json.loads(events[1][6:])["error"]["code"] == 504
        assert events[2] == b"data: [DONE]"


async def test_servers_come_and_go_by_authenticated_admin_calls() -> None:
    async with Fake("decode").run() as extra, bench(admin_api_key="k") as b:
        admin = {"authorization": "Bearer k"}
        body = {"role": "decode", "url": extra.url}
        for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic k"}):
            async with b.client.post("/admin/servers", json=body, headers=headers) as response:
                assert response.status == 401
        for bad in ({"role": "x"}, {"role": "decode", "url": "h:1"}, [], {"role": "prefill"}):
            async with b.client.post("/admin/servers", json=bad, headers=admin) as response:
                assert response.status == 400
        async with b.client.post("/admin/servers", json=body, headers=admin) as response:
            assert response.status == 201
        async with b.client.post("/admin/servers", json=body, headers=admin) as response:
            assert response.status == 409
        b.d.answer = streaming(b"data: {}\n\n", hold=(hold := asyncio.Event()))
        extra.answer = b.d.answer
        running = [asyncio.create_task(b.post(GENERATE, {"text": "x"})) for _ in range(2)]
        await until(lambda: bool(b.d.bodies and extra.bodies))
        params = {"url": b.d.url}
        async with b.client.delete("/admin/servers", params=params, headers=admin) as response:
            assert response.status == 202
        more = asyncio.create_task(b.post(GENERATE, {"text": "x"}))
        await until(lambda: len(extra.bodies) == 2)
        assert len(b.router.fleet.decodes) == 2  # its last request is still running
        hold.set()
        await asyncio.gather(*running, more, return_exceptions=True)
        await until(lambda: [d.url for d in b.router.fleet.decodes] == [extra.url])
        async with b.client.get("/admin/servers", headers=admin) as response:
            assert len((await response.json())["servers"]) == 2
        async with b.client.get("/metrics") as response:
            assert f'server_up{{role="decode",server="{b.d.url}"}}' not in await response.text()


async def test_a_server_removed_by_force_lets_go_of_its_requests_at_once() -> None:
    decodes = [Fake("decode", never), Fake("decode")]
    async with bench(decode=decodes, policy="round_robin", admin_api_key="k") as b:
        sending = asyncio.create_task(b.post(GENERATE, {"text": "x"}))
        await until(lambda: bool(b.d.bodies))
        async with b.client.delete(
            "/admin/servers",
            params={"url": b.d.url, "force": "1"},
            headers={"authorization": "Bearer k"},
        ) as response:
            assert response.status == 202
        assert (await sending)[0] == 200
        await until(lambda: len(b.router.fleet.decodes) == 1)


async def test_without_a_key_there_is_no_admin() -> None:
    async with bench() as b, b.client.get("/admin/servers") as response:
        assert response.status == 403


async def test_draining_is_told_by_health_and_ends_what_is_left_with_an_error() -> None:
    decode = Fake("decode", streaming(b"data: {}\n\n", hold=asyncio.Event()))
    async with bench(decode=decode) as b:
        async with b.client.post(GENERATE, json=STREAM) as response:
            await response.content.readany()
            b.router.draining = True
            async with b.client.get("/health") as health:
                assert health.status == 503
                assert (await health.json())["status"] == "draining"
            async with b.client.get("/ping") as alive:
                assert alive.status == 200
            b.router.proxy.interrupt_all()
            assert b"shutting down" in await response.content.read()
        await idle(b)


async def test_an_interruption_is_raised_where_the_task_waits_or_at_the_next_wait() -> None:
    cancellation = Cancellation()
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, cancellation.interrupt, KeyError("a"))
    loop.call_later(0.01, cancellation.interrupt, KeyError("late"))
    with pytest.raises(KeyError, match="a"):
        async with cancellation:
            await asyncio.sleep(5)
    cancellation.interrupt(ValueError("b"))
    cancellation.forget((KeyError,))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="b"):
        async with cancellation:
            raise AssertionError
    cancellation.interrupt(ValueError("c"))
    cancellation.forget((ValueError,))
    async with cancellation:
        await asyncio.sleep(0)


async def test_cancelling_the_task_from_outside_wins_over_an_interruption() -> None:
    async def work(started: asyncio.Event, box: list[Cancellation]) -> None:
        box.append(Cancellation())
        async with box[0]:
            started.set()
            await asyncio.sleep(5)

    started, box = asyncio.Event(), list[Cancellation]()
    task = asyncio.create_task(work(started, box))
    await started.wait()
    box[0].interrupt(ValueError())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "words",
    [
        "--max-payload-size 3",
        "--cb-failure-threshold 0",
        "--tls-cert-path /nonexistent --tls-key-path /nonexistent",
        "--tls-cert-path x",
        "--shutdown-grace-period-secs -1",
        "--max-concurrent-requests -2",
    ],
)
def test_flags_out_of_range_are_named(words: str) -> None:
    base = "--pd-disaggregation --prefill http://a --decode http://b "
    with pytest.raises(OptionError, match=words.split()[0]):
        parse_options((base + words).split())


def test_upstreams_names_of_flags_and_policies_are_understood() -> None:
    words = "--pd-disaggregation --prefill http://a --decode http://b --policy least-loaded"
    words += " --retry-max-retries 2 --max-concurrent-requests -1 --cb-failure-threshold 7"
    options = parse_options(words.split())
    assert (options.policy, options.max_retries, options.max_in_flight) == ("least_load", 2, 0)
    assert options.health.request_failures == 7
    assert parse_options([*words.split(), "--disable-retries"]).max_retries == 0
