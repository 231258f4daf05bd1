"""Servers of the wrong role, and servers that do not take the router's key."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_pd import GENERATE, Bench, Fake, bench, never, until
from sglang_kairos.router.fleet.server_info import misplaced, roles

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

ADMIN = {"admin_api_key": "root"}


def of(mode: Any, *ranks: Any) -> dict[str, Any]:
    return {
        "disaggregation_mode": mode,
        "internal_states": [{"disaggregation_mode": rank} for rank in ranks],
    }


async def health(b: Bench) -> tuple[int, Any]:
    async with b.client.get("/health") as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("info", "said", "usable"),
    [
        ({}, set(), ("prefill", "decode")),
        (of("prefill"), {"prefill"}, ("prefill",)),
        (of("decode", "decode", "decode"), {"decode"}, ("decode",)),
        # After a role switch the ranks know, and the start-up arguments do not.
        (of("prefill", "decode"), {"decode"}, ("decode",)),
        (of("prefill", "decode", "prefill"), {"decode", "prefill"}, ()),
        (of("null", "null"), {"null"}, ()),
        (of(None, 3, ["decode"]), set(), ("prefill", "decode")),
        ({"disaggregation_mode": "decode", "internal_states": "odd"}, {"decode"}, ("decode",)),
        ({"disaggregation_mode": "encode"}, set(), ("prefill", "decode")),
    ],
)
def test_the_ranks_say_which_role_a_server_has_now(
    info: dict[str, Any], said: set[str], usable: tuple[str, ...]
) -> None:
    assert roles(info) == said
    found = [role for role in ("prefill", "decode") if misplaced(role, roles(info)) is None]
    assert tuple(found) == usable


async def test_exchanged_servers_are_down_and_everybody_is_told_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        prefill, decode = Fake("prefill", info=of("decode")), Fake("decode", info=of("prefill"))
        async with bench(prefill, decode, **ADMIN) as b:
            status, told = await health(b)
            assert status == 503
            assert "is a decode server" in told["problems"][b.p.url]
            assert "exchange --prefill and --decode" in told["problems"][b.d.url]
            status, answer = await b.post(GENERATE, {"text": "x"})
            assert status == 503
            assert "exchange --prefill and --decode" in answer["error"]["message"]
            assert not b.p.bodies and not b.d.bodies
            async with b.client.get("/server_info") as response:
                about = (await response.json())["router_manager"]
            key = {"authorization": "Bearer root"}
            async with b.client.get("/admin/servers", headers=key) as response:
                listed = (await response.json())["servers"]
            for server in (*about["prefill"], *listed):
                assert (server["state"], server["up"]) == ("misplaced", False)
                assert "it says it is" in server["problem"]
            seen = b.router.fleet.prefills[0].info_at_s
            await until(lambda: b.router.fleet.prefills[0].info_at_s > seen)
        lines = [r.getMessage() for r in caplog.records if " is down: " in r.getMessage()]
        assert len(lines) == 2  # once for each server, though looked at more often

    with caplog.at_level(logging.WARNING):
        await main()


async def test_a_wrong_role_is_said_of_a_server_that_came_later_than_the_router_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        late = Fake("decode", info=of("null"))
        async with bench(dead_decodes=1) as b:
            server = b.router.fleet.decodes[0]
            await until(lambda: server.health.gone)
            async with late.run():
                server.url = late.url
                await until(lambda: bool(server.misplaced))
                await until(lambda: "is down: it says it is a unified server" in caplog.text)

    with caplog.at_level(logging.WARNING):
        await main()


@pytest.mark.parametrize("was", ["decode", "null"])
async def test_a_server_that_takes_on_the_right_role_comes_back(was: str) -> None:
    prefill = Fake("prefill", info=of("prefill", was))
    async with bench(prefill) as b:
        assert (await health(b))[0] == 503
        prefill.info = of("null", "prefill")
        server = b.router.fleet.prefills[0]
        await until(lambda: server.up)
        assert (await health(b))[0] == 200
        assert (await b.post(GENERATE, {"text": "x"}))[0] == 200


async def test_a_role_switched_under_a_request_ends_its_wait() -> None:
    prefill = Fake("prefill", never, info=of("prefill"))
    async with bench(prefill, Fake("decode", never, info=of("decode"))) as b:
        asked = asyncio.create_task(b.post(GENERATE, {"text": "x"}))
        await until(lambda: bool(prefill.bodies))
        prefill.info = of("prefill", "decode")
        status, answer = await asyncio.wait_for(asked, 20)
        assert (status, "decode server" in answer["error"]["message"]) == (503, True)


async def test_health_is_not_ok_before_a_pair_has_answered_a_probe() -> None:
    let = asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        await let.wait()
        return web.json_response(of("decode"))

    async with bench(decode=Fake("decode", routes={"/server_info": slow})) as b:
        status, told = await health(b)
        assert (status, told["status"]) == (
            503,
            "no prefill/decode pair has answered a probe yet",
        )
        let.set()
        await until(lambda: b.router.fleet.met)
        assert (await health(b))[0] == 200


@pytest.mark.parametrize("key", ["", "wrong"])
async def test_a_server_that_refuses_the_routers_key_is_named_once_and_still_serves(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        probes = 0

        async def refuse(request: web.Request) -> web.Response:
            nonlocal probes
            probes += 1
            return web.json_response({"error": "Unauthorized"}, status=401)

        prefill = Fake("prefill", routes={"/server_info": refuse, "/v1/loads": refuse})
        async with bench(prefill, api_key=key) as b:
            await until(lambda: probes >= 4)
            status, told = await health(b)
            assert status == 200
            assert "401 to the router's probes" in told["problems"][b.p.url]
            assert "--api-key" in told["problems"][b.p.url]
            async with b.client.get("/server_info") as response:
                about = (await response.json())["router_manager"]["prefill"][0]
            assert about["up"] and "--api-key" in about["problem"]
            assert (await b.post(GENERATE, {"text": "x"}))[0] == 200
        lines = [r for r in caplog.records if "--api-key" in r.getMessage()]
        assert len(lines) == 1

    with caplog.at_level(logging.WARNING):
        await main()
