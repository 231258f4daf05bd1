"""Commands to the whole fleet: how long they may take, what is made of the answers, who may."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from starlette.requests import Request
from starlette.responses import Response

from helpers.fake_pd import Bench, Fake, Handler, bench, free_port, never, until
from sglang_kairos.router.control import fan_out
from sglang_kairos.router.control.fan_out import ranked, together
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.options import RouterOptions

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

FLUSH = "/flush_cache"


def says(status: int, body: Any) -> Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return answer


def fakes(path: str, *answers: Handler) -> tuple[Fake, Fake]:
    first, last = answers[0], answers[-1]
    return Fake("prefill", routes={path: first}), Fake("decode", routes={path: last})


async def info(b: Bench) -> Any:
    async with b.client.get("/server_info") as response:
        assert response.status == 200
        return await response.json()


async def test_a_command_has_as_long_as_a_request_or_as_it_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In place of half a minute: whoever still waits that long only would fail here.
    monkeypatch.setattr(fan_out, "_ASK_TIMEOUT_S", 0.05)

    async def main() -> None:
        done = asyncio.Event()

        async def slow(_: web.Request) -> web.Response:
            await asyncio.sleep(0.3)
            done.set()
            return web.Response(text="done")

        for path in (FLUSH, "/update_weights_from_disk", "/release_memory_occupation"):
            async with bench(*fakes(path, slow)) as b, b.client.post(path) as response:
                assert response.status == 200, await response.text()
        # The request's own time is too short here, its `timeout` is not.
        async with bench(*fakes(FLUSH, slow), request_timeout_s=0.1) as b:
            async with b.client.post(f"{FLUSH}?timeout=60") as response:
                assert response.status == 200
            async with b.client.post(FLUSH) as response:
                assert response.status == 502
                assert "no answer within 0.1 s" in (await response.json())["error"]["message"]

    monkeypatch.setattr(fan_out, "_GRACE_S", 0.0)
    await main()


@pytest.mark.parametrize(
    ("words", "patience_s"),
    [("timeout=60", 65), ("timeout=7", 30), ("timeout=x", 30), ("timeout=inf", 30), ("", 30)],
)
def test_what_a_command_may_take_follows_its_own_timeout(words: str, patience_s: float) -> None:
    options = RouterOptions((), (), request_timeout_s=30.0)
    fan = fan_out.FanOut(Fleet(options), None, options)  # type: ignore[arg-type]
    scope = {"type": "http", "query_string": words.encode(), "headers": []}
    assert fan._patience_s(Request(scope)) == patience_s


async def test_what_all_servers_refuse_alike_is_passed_on_as_it_is() -> None:
    refusal = {"success": False, "message": "Failed to update weights: no such folder"}
    path = "/update_weights_from_disk"
    async with bench(*fakes(path, says(400, refusal))) as b:
        assert await b.post(path, {"model_path": "/none"}) == (400, refusal)


async def test_mixed_answers_say_who_said_what() -> None:
    path = "/load_lora_adapter"
    refusal = {"success": False, "error_message": "too many adapters"}
    async with bench(*fakes(path, says(200, {"success": True}), says(400, refusal))) as b:
        status, answer = await b.post(path, {"lora_name": "a"})
        said = answer["error"]["servers"]
        assert status == 502
        assert said[b.p.url] == {"status": 200, "answer": {"success": True}}
        assert said[b.d.url] == {"status": 400, "answer": refusal}
        assert "1 of 2 servers did it" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("answers", "status"),
    [
        ([(200, "{}"), (200, "Cache flushed.")], 200),
        ([(200, '{"success": false}'), (200, "{}")], 502),
        ([(400, "a"), (400, "b")], 400),
        ([(400, "a"), (401, "b")], 502),
        ([(404, "a")], 404),
        ([], 503),
        ([(500, "a"), (500, "a")], 502),
        ([(200, "a"), (503, "b")], 502),
    ],
)
def test_one_answer_is_made_of_all(answers: list[tuple[int, str]], status: int) -> None:
    urls = list("ab")[: len(answers)]
    found = together(FLUSH, urls, [Response(text, code) for code, text in answers])
    assert found.status_code == status
    if answers and status == answers[0][0] and status >= 400:
        assert bytes(found.body).decode() == answers[0][1]


async def test_server_info_answers_within_a_second_with_what_is_known() -> None:
    hang = asyncio.Event()
    known = {"internal_states": [{"avg_spec_accept_length": 2.5}]}

    async def tell(_: web.Request) -> web.Response:
        if hang.is_set():
            await asyncio.Event().wait()
        return web.json_response(known)

    decode = Fake("decode", routes={"/server_info": tell})
    async with bench(decode=decode, dead_decodes=1) as b:
        await until(lambda: b.router.fleet.decodes[1].info is not None)
        await until(lambda: b.router.fleet.decodes[0].health.gone)
        hang.set()
        async with asyncio.timeout(5.0):
            told = await info(b)
        # What bench_serving reads when its run has ended, its clock still running.
        first, second = told["decode"]
        assert first["internal_states"][0]["avg_spec_accept_length"] == 2.5
        assert first["router_view"]["age_s"] > 0
        assert told["internal_states"] == known["internal_states"]
        assert second["router_view"]["state"] == "gone"
        assert "gone" in second["error"]
        assert told["prefill"][0]["router_view"]["age_s"] == 0


async def test_server_info_of_others_is_not_told_to_a_client_with_a_wrong_key() -> None:
    async def tell(request: web.Request) -> web.Response:
        if request.headers.get("authorization") != "Bearer sk":
            await asyncio.Event().wait()
        return web.json_response({"secret": 1})

    decode = Fake("decode", routes={"/server_info": tell})
    async with bench(decode=decode, api_key="sk") as b:
        await until(lambda: b.router.fleet.decodes[0].info is not None)
        for key, seen in (("sk", True), ("other", False)):
            headers = {"authorization": f"Bearer {key}"}
            async with b.client.get("/server_info", headers=headers) as response:
                told = await response.json()
            assert ("secret" in told["decode"][0]) is seen


async def test_a_client_that_leaves_is_not_waited_for() -> None:
    waiting, left = asyncio.Event(), asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        waiting.set()
        try:
            return await never(_)
        finally:
            left.set()

    async with bench(*fakes(FLUSH, hang)) as b:
        asked = asyncio.create_task(b.client.post(f"{FLUSH}?timeout=600"))
        await waiting.wait()
        asked.cancel()
        await asyncio.wait_for(left.wait(), 10)


async def test_the_routers_key_is_not_lent_for_commands_to_clients_without_one() -> None:
    seen: list[str] = []

    async def look(request: web.Request) -> web.Response:
        seen.append(request.headers.get("authorization", ""))
        return web.json_response({})

    async def keys(sent: str, path: str, **options: str) -> set[str]:
        seen.clear()
        headers = {"authorization": f"Bearer {sent}"} if sent else {}
        async with (
            bench(*fakes(path, look), api_key="sk", **options) as b,
            b.client.post(path, headers=headers),
        ):
            return set(seen)

    assert await keys("", FLUSH) == {""}
    assert await keys("mine", FLUSH) == {"Bearer mine"}
    assert await keys("", "/tokenize") == {"Bearer sk"}
    both = {"client_api_key": "client", "admin_api_key": "root"}
    assert await keys("client", FLUSH, **both) == {"Bearer sk"}
    # Servers with an --admin-api-key take commands with that one only.
    assert await keys("root", FLUSH, **both) == {"Bearer root"}
    assert await keys("", FLUSH, **both) == set()


async def test_a_command_body_has_the_limit_of_a_requests() -> None:
    path = "/update_weights_from_tensor"
    async with bench(*fakes(path, says(200, {})), max_body_bytes=2048) as b:
        status, answer = await b.post(path, {"x": "y" * 4096})
        assert (status, "--max-payload-size" in answer["error"]["message"]) == (413, True)
        assert (await b.post(path, {"x": "y"}))[0] == 200


def test_ranks_of_a_weight_update_group_follow_each_other() -> None:
    body = json.dumps({"rank_offset": 1, "world_size": 8, "group_name": "g"}).encode()
    infos = [{"tp_size": 2, "pp_size": 2}, None, {"tp_size": 2}]
    found = [json.loads(one) for one in ranked(body, infos)]
    assert [one["rank_offset"] for one in found] == [1, 5, 6]
    assert {one["group_name"] for one in found} == {"g"}
    for odd in (b"", b"[]", b'{"group_name": "g"}', b'{"rank_offset": true}'):
        assert ranked(odd, infos) == [odd] * 3


async def test_a_dead_server_is_named_by_a_command() -> None:
    async with bench() as b:
        dead = f"http://127.0.0.1:{free_port()}"
        b.router.fleet.add_decode(dead)
        async with b.client.post(FLUSH) as response:
            said = (await response.json())["error"]["servers"]
        assert (response.status, said[dead]["status"], said[b.p.url]["status"]) == (
            502,
            503,
            200,
        )
