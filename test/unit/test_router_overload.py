"""Overload: who is shed, who waits, who is served late; and the router's own limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_clock import now_s
from helpers.fake_pd import CHAT, GENERATE, Bench, Fake, bench, streaming, until
from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.overload import Overload, OverloadOutcome, retry_after_s, verdict
from sglang_kairos.router.options import OptionError, parse_options
from sglang_kairos.router.request.context import Full, Limits, TooLarge
from sglang_kairos.router.request.deferred_queue import DeferredQueue

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

# 1 ms a token, and 1 ms a step for each request running.
PREFILL = {"a_s": 0.0, "b_s": 1e-3, "c_s": 0.0}
DECODE = {"a_s": 0.0, "b_s": 1e-3, "c_s": 0.0}
SHED, RELEGATE = Overload.SHED, Overload.RELEGATE


def told(role: str, law: dict[str, float]) -> dict[str, Any]:
    return {"internal_states": [{"kairos": {role: law}}]}


def slow_prefill(kairos: bool = True) -> Fake:
    async def answer(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.3)
        return web.json_response({"meta_info": {"prompt_tokens": 1000}})

    return Fake("prefill", answer, told("prefill", PREFILL) if kairos else {})


def slow_decode() -> Fake:
    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.35)
        return await streaming(b"data: {}\n\n")(request)

    return Fake("decode", answer, told("decode", DECODE))


async def known(b: Bench) -> None:
    fleet = b.router.fleet
    await until(lambda: fleet.prefills[0].known and fleet.decodes[0].known)


def one_s(token: int = 1, **slo: float | str) -> dict[str, Any]:
    """A second of prefill; another `token`, another prefix."""
    params = {"max_new_tokens": 2}
    return {"input_ids": [token] * 1000, "stream": True, "sampling_params": params, **slo}


async def test_who_cannot_be_on_time_is_shed_with_the_prediction_and_when_to_come_back() -> None:
    async with bench(slow_prefill(), slow_decode(), overload=SHED) as b:
        await known(b)
        first = asyncio.create_task(b.post(GENERATE, one_s(ttft_ms=1500)))
        await until(lambda: bool(b.p.bodies))
        for path, body in (
            (GENERATE, one_s(2, ttft_ms=1400)),
            (CHAT, {"messages": [{"content": "x" * 9000}], "ttft_ms": 1400}),
        ):
            async with b.client.post(path, json=body) as response:
                error = (await response.json())["error"]
                assert response.status == 429
                assert 1 <= int(response.headers["retry-after"]) <= 2
                assert response.headers["x-request-id"]
                assert error["code"] == 429
                assert 1400 < error["predicted_ttft_ms"] < 4500
                assert error["ttft_ms"] == 1400
        assert len(b.p.bodies) == 1
        first.cancel()
        async with b.client.get("/metrics") as response:
            text = await response.text()
        assert 'overloaded_total{action="shed",slo_class="default"} 2.0' in text


async def test_who_would_push_an_accepted_request_past_its_deadline_is_shed_too() -> None:
    async with bench(slow_prefill(), slow_decode(), overload=SHED) as b:
        await known(b)
        first = asyncio.create_task(b.post(GENERATE, one_s(ttft_ms=1600)))
        await until(lambda: bool(b.p.bodies))
        # On time itself, as it goes first; but then the one accepted would be late.
        urgent = one_s(2, ttft_ms=1550)
        async with b.client.post(GENERATE, json=urgent) as response:
            assert response.status == 429
        first.cancel()


async def test_a_tpot_that_cannot_be_kept_is_shed() -> None:
    async with bench(slow_prefill(), slow_decode(), overload=SHED) as b:
        await known(b)
        status, answer = await b.post(GENERATE, one_s(tpot_ms=0.5))
        assert status == 429
        assert answer["error"]["predicted_tpot_ms"] == pytest.approx(1.0)


async def test_nobody_is_shed_on_a_first_guess_of_a_servers_speed() -> None:
    async with bench(overload=SHED) as b:
        body = {"input_ids": [1] * 50_000, "ttft_ms": 1, "tpot_ms": 0.1}
        assert (await b.post(GENERATE, body))[0] == 200


async def test_each_class_has_its_own_way() -> None:
    async def main(tmp: str) -> None:
        classes = (("batch", RELEGATE), ("free", SHED))
        config = KairosConfig(slo_classes=tmp)
        async with bench(
            slow_prefill(), slow_decode(), overload_classes=classes, config=config
        ) as b:
            await known(b)
            for name, status in (("free", 429), ("batch", 200)):
                async with b.client.post(GENERATE, json=one_s(slo_class=name)) as response:
                    assert response.status == status, name
                    await response.read()
            async with b.client.post(GENERATE, json=one_s(ttft_ms=100)) as response:
                assert response.status == 200  # the default: serve
                await response.read()

    import json
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"batch": {"ttft_ms": 100}, "free": {"ttft_ms": 100}}, file)
        file.flush()
        await main(file.name)


async def test_a_relegated_request_is_served_after_those_that_are_on_time() -> None:
    # A stock server takes requests as they come: the router has to hold them back.
    async with bench(slow_prefill(kairos=False), slow_decode(), overload=RELEGATE) as b:
        server = b.router.fleet.prefills[0]
        server._estimate.batches = 5
        first = asyncio.create_task(b.post(GENERATE, one_s(ttft_ms=1500)))
        await until(lambda: bool(b.p.bodies))
        server._works[0] = 1.0
        second = asyncio.create_task(b.post(GENERATE, one_s(2, ttft_ms=50)))
        await until(lambda: len(b.router.proxy.deferred) == 1)
        await asyncio.sleep(0.1)
        assert len(b.p.bodies) == 1
        await until(lambda: len(b.p.bodies) == 2)
        assert not server._works or server._works[0] <= 0.1
        for task in (first, second):
            task.cancel()


async def test_waiting_is_bounded_and_in_turn() -> None:
    later, went = DeferredQueue(), []

    async def one(name: str, until_s: float, may: bool) -> None:
        await later.wait(lambda: may, now_s() + until_s)
        went.append(name)

    began = now_s()
    await asyncio.gather(one("blocked", 0.1, False), one("a", 9.0, True), one("b", 9.0, True))
    assert went == ["blocked", "a", "b"]
    assert len(later) == 0
    assert now_s() - began < 1.0


async def test_in_flight_and_bytes_are_bounded_and_given_back() -> None:
    go_on = asyncio.Event()
    decode = Fake("decode", streaming(b"data: {}\n\n", hold=go_on), told("decode", DECODE))
    async with bench(decode=decode, max_in_flight=2, max_body_bytes=5000, max_held_bytes=6000) as b:
        assert (await b.post(GENERATE, {"text": "x" * 6000}))[0] == 413
        running = [asyncio.create_task(b.post(GENERATE, {"text": "x" * 100})) for _ in range(2)]
        await until(lambda: len(b.d.bodies) == 2)
        async with b.client.post(GENERATE, json={"text": "x"}) as response:
            assert response.status == 429
            assert response.headers["retry-after"] == "1"
            assert "--max-concurrent-requests" in (await response.json())["error"]["message"]
        go_on.set()
        await asyncio.gather(*running, return_exceptions=True)
        limits = b.router.proxy.limits
        assert (limits.in_flight, limits.held_bytes) == (0, 0)
        go_on.clear()
        big = [asyncio.create_task(b.post(GENERATE, {"text": "x" * 4000})) for _ in range(2)]
        await asyncio.wait(big, return_when=asyncio.FIRST_COMPLETED)  # the one without room
        go_on.set()
        found = await asyncio.gather(*big, return_exceptions=True)
        assert any(isinstance(one, tuple) and one[0] == 429 for one in found)
        await until(lambda: (limits.in_flight, limits.held_bytes) == (0, 0))


def test_limits_say_what_is_full() -> None:
    limits = Limits(1, 10, 15)
    limits.enter()
    with pytest.raises(Full, match="max-concurrent"):
        limits.enter()
    limits.hold(10, 0)
    with pytest.raises(TooLarge, match="max-payload"):
        limits.hold(1, 10)
    with pytest.raises(Full, match="max-held"):
        limits.hold(6, 0)
    limits.leave(10)
    assert (limits.in_flight, limits.held_bytes) == (0, 0)


@pytest.mark.parametrize("policy", list(Overload))
def test_a_kept_promise_is_served_and_a_broken_one_goes_by_policy(policy: Overload) -> None:
    assert verdict(policy, OverloadOutcome(1.0, True, True)) is Overload.SERVE
    assert verdict(policy, OverloadOutcome(1.0, False, True)) is policy
    assert verdict(policy, OverloadOutcome(1.0, True, False)) is policy


@pytest.mark.parametrize(
    ("ttft", "target", "seconds"),
    [(2.0, 1.5, 1), (9.2, 1.0, 9), (1.0, 5.0, 1), (1e9, 1.0, 60), (float("inf"), 1.0, 60)],
)
def test_retry_after_is_the_time_missing_in_bounds(
    ttft: float, target: float, seconds: int
) -> None:
    assert retry_after_s(ttft, target) == seconds


def test_overload_flags_are_a_default_and_classes() -> None:
    words = "--pd-disaggregation --prefill http://a --decode http://b".split()
    options = parse_options([*words, "--overload", "shed", "--overload", "batch=relegate"])
    assert options.overload_of("batch") is RELEGATE
    assert options.overload_of("chat") is SHED
    assert parse_options(words).overload_of("chat") is Overload.SERVE
    for bad in ("drop", "=shed", "a=drop"):
        with pytest.raises(OptionError, match="--overload"):
            parse_options([*words, "--overload", bad])
