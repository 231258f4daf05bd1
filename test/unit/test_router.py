"""The router in front of small fake prefill and decode servers on loopback."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_clock import now_s
from helpers.fake_pd import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    Fake,
    bench,
    failing,
    free_port,
    never,
    streaming,
    until,
)
from sglang_kairos.config import KairosConfig

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]


async def test_both_servers_get_one_body_and_the_client_gets_decodes_answer() -> None:
    async with bench() as b:
        status, answer = await b.post(GENERATE, {"text": "hi", "bootstrap_host": None})
        assert (status, answer["text"]) == (200, "from decode")
        sent = b.d.bodies[0]
        await until(lambda: bool(b.p.bodies))
        assert b.p.bodies[0] == sent
        assert sent["bootstrap_host"] == "127.0.0.1"
        assert sent["bootstrap_port"] == 8998
        assert 0 <= sent["bootstrap_room"] < 2**63
        assert isinstance(sent["rid"], str)


BATCHES: list[tuple[str, dict[str, Any], int | None]] = [
    (GENERATE, {"text": ["a", "b", "c"]}, 3),
    (GENERATE, {"input_ids": [[1, 2], [3]]}, 2),
    (GENERATE, {"input_ids": [1, 2, 3]}, None),
    (COMPLETIONS, {"prompt": ["a"]}, 1),
    (COMPLETIONS, {"prompt": [[1], [2, 3]]}, 2),
    (COMPLETIONS, {"prompt": [1, 2]}, None),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}]}, None),
]


async def test_a_batch_gets_a_room_of_its_own_for_each_prompt() -> None:
    async with bench() as b:
        for path, body, count in BATCHES:
            await b.post(path, body)
            sent = b.d.bodies[-1]
            if count is None:
                assert isinstance(sent["bootstrap_room"], int)
                continue
            assert len(set(sent["bootstrap_room"])) == count
            assert sent["bootstrap_host"] == ["127.0.0.1"] * count
            assert sent["bootstrap_port"] == [8998] * count
            assert len(set(sent["rid"])) == count


async def test_the_slo_rides_in_custom_params_with_its_age_and_leaves_the_body() -> None:
    async with bench() as b:
        await b.post(GENERATE, {"text": "hi", "ttft_ms": 500, "sampling_params": {"n": 1}})
        await b.post(CHAT, {"messages": []}, headers={"x-slo-tpot-ms": "20"})
        await b.post(COMPLETIONS, {"prompt": "x", "custom_params": {"mine": 1}})
        native, chat, plain = b.d.bodies
        wire = native["sampling_params"]["custom_params"]["kairos"]
        assert wire["ttft_ms"] == 500
        assert wire["tpot_ms"] == 100
        assert 0 <= wire["age_ms"] < 1000
        assert "ttft_ms" not in native
        assert chat["custom_params"]["kairos"]["tpot_ms"] == 20
        assert "x-slo-tpot-ms" not in b.d.headers[1]
        assert plain["custom_params"]["mine"] == 1
        assert list(plain["custom_params"]["kairos"]) == ["age_ms"]


async def test_age_counts_the_time_spent_on_a_retry() -> None:
    async with bench(dead_prefills=2) as b:
        for _ in range(6):
            await b.post(GENERATE, {"text": "x", "sampling_params": {}})
        for body in b.d.bodies:
            assert body["sampling_params"]["custom_params"]["kairos"]["age_ms"] >= 0


async def test_an_slo_out_of_range_is_answered_400_naming_field_and_range() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"ttft_ms": -1}, "ttft_ms"),
        ({"tpot_ms": "fast"}, "tpot_ms"),
        ({"slo": {"ttft": 5}}, "slo"),
        ({"slo_class": "gold"}, "slo_class"),
    ]

    async with bench() as b:
        for path in (GENERATE, COMPLETIONS, CHAT):
            for extra, name in bad:
                status, answer = await b.post(path, {"text": "x", "prompt": "x", **extra})
                assert status == 400
                assert answer["error"]["param"] == name
                assert answer["error"]["code"] == 400
                assert name in answer["error"]["message"]
                if name == "ttft_ms":
                    assert "between 1 and 3600000" in answer["error"]["message"]
        assert not b.d.bodies


async def test_malformed_json_is_answered_400_and_the_router_lives() -> None:
    async with bench() as b:
        for raw in (b"{", b"", b"[1]", b'"x"', b"\xff"):
            async with b.client.post(GENERATE, data=raw) as response:
                assert response.status == 400
                assert "malformed" in (await response.json())["error"]["message"]
        assert (await b.post(GENERATE, {"text": "x"}))[0] == 200


async def test_chunks_reach_the_client_as_they_come() -> None:
    hold = asyncio.Event()
    decode = Fake("decode", streaming(b"data: 1\n\n", hold=hold))
    body = {"text": "x", "stream": True}
    async with bench(decode=decode) as b, b.client.post(GENERATE, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        began = now_s()
        first = await asyncio.wait_for(response.content.readany(), 30)
        assert first == b"data: 1\n\n"
        assert now_s() - began < 2
        hold.set()
        assert await response.content.read() == b""


@pytest.mark.parametrize("status", [400, 500])
async def test_decodes_error_reaches_the_client_and_prefill_is_aborted(status: int) -> None:
    error = {"error": {"message": "no"}}
    async with bench(Fake("prefill", never), Fake("decode", failing(status, error))) as b:
        assert await b.post(GENERATE, {"text": "x"}) == (status, error)
        await until(b.p.left.is_set)
        await until(lambda: b.p.aborted == [b.p.bodies[0]["rid"]])


@pytest.mark.parametrize("stream", [True, False])
async def test_prefills_error_reaches_the_client_at_once_and_decode_is_aborted(
    stream: bool,
) -> None:
    error = {"error": {"message": "queue full", "code": 503}}
    async with bench(Fake("prefill", failing(503, error)), Fake("decode", never)) as b:
        began = now_s()
        got = await asyncio.wait_for(b.post(GENERATE, {"text": "x", "stream": stream}), 30)
        assert got == (503, error)
        assert now_s() - began < 2
        await until(b.d.left.is_set)
        await until(lambda: b.d.aborted == [b.d.bodies[0]["rid"]])


@pytest.mark.parametrize(
    ("event", "status"),
    [
        ({"error": {"message": "too long", "code": 400}}, 400),
        ({"error": {"message": "odd", "code": "x"}}, 500),
        (
            {"meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": "q"}}},
            503,
        ),
    ],
)
async def test_an_error_inside_prefills_stream_becomes_a_real_status(
    event: dict[str, Any], status: int
) -> None:
    data = b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n"
    async with bench(Fake("prefill", streaming(data, gap_s=0.05)), Fake("decode", never)) as b:
        got, answer = await b.post(GENERATE, {"text": "x", "stream": True})
        assert got == status
        assert answer["error"]["message"]
        await until(b.d.left.is_set)


@pytest.mark.parametrize("stream", [True, False])
async def test_when_the_client_leaves_both_servers_see_it_and_are_told_the_id(stream: bool) -> None:
    async with bench(Fake("prefill", never), Fake("decode", never)) as b:
        sending = asyncio.create_task(b.post(GENERATE, {"text": "x", "stream": stream}))
        await until(lambda: bool(b.p.bodies and b.d.bodies))
        sending.cancel()
        await until(lambda: b.p.left.is_set() and b.d.left.is_set())
        rid = b.p.bodies[0]["rid"]
        await until(lambda: b.p.aborted == [rid] and b.d.aborted == [rid])
        fleet = b.router.fleet
        assert fleet.prefills[0].owed == 0
        assert (fleet.decodes[0].running, fleet.decodes[0].tokens) == (0, 0)


async def test_when_the_client_leaves_mid_stream_decode_sees_it() -> None:
    hold = asyncio.Event()
    async with bench(decode=Fake("decode", streaming(b"data: 1\n\n", hold=hold))) as b:
        response = await b.client.post(GENERATE, json={"text": "x", "stream": True})
        await response.content.readany()
        response.close()
        await until(b.d.left.is_set)
        await until(lambda: b.router.fleet.decodes[0].running == 0)


async def test_a_refused_connection_moves_the_request_to_another_pair() -> None:
    async with bench(dead_prefills=1, dead_decodes=1) as b:
        for _ in range(8):
            assert (await b.post(GENERATE, {"text": "x"}))[0] == 200
        rooms = [body["bootstrap_room"] for body in b.d.bodies]
        rids = [body["rid"] for body in b.d.bodies]
        assert len(set(rooms)) == len(rooms)
        assert len(set(rids)) == len(rids)


async def test_with_nobody_to_serve_the_answer_is_503_and_says_so() -> None:
    async with bench() as b:
        b.router.fleet.decodes[0].url = f"http://127.0.0.1:{free_port()}"
        status, answer = await b.post(CHAT, {"messages": []})
        assert status == 503
        assert "decode server" in answer["error"]["message"]
        await until(lambda: bool(b.p.aborted))
        assert b.router.fleet.prefills[0].owed == 0


async def test_decode_breaking_off_ends_the_stream_with_an_error_event() -> None:
    async def breaking(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        return response

    async with bench(decode=Fake("decode", breaking)) as b:
        async with b.client.post(GENERATE, json={"text": "x", "stream": True}) as response:
            text = (await response.read()).decode()
        events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        assert events[0] == "1"
        assert json.loads(events[1])["error"]["code"] == 502
        assert events[2] == "[DONE]"


async def test_end_to_end_headers_pass_and_hop_by_hop_ones_do_not() -> None:
    async with bench() as b:
        sent = {
            "Authorization": "Bearer k",
            "X-Request-Id": "r1",
            "Connection": "keep-alive, x-private",
            "X-Private": "1",
            "X-Override-Bootstrap-Host": "evil",
        }
        await b.post(GENERATE, {"text": "x"}, headers=sent)
        for headers in (b.p.headers[0], b.d.headers[0]):
            assert headers["authorization"] == "Bearer k"
            assert headers["x-request-id"] == "r1"
            assert headers["content-type"] == "application/json"
            assert "x-private" not in headers
            assert "x-override-bootstrap-host" not in headers


async def test_a_clients_own_id_is_kept_and_aborted_by() -> None:
    async with bench(Fake("prefill", never), Fake("decode", never)) as b:
        sending = asyncio.create_task(b.post(GENERATE, {"text": "x", "rid": "mine"}))
        await until(lambda: bool(b.p.bodies and b.d.bodies))
        sending.cancel()
        await until(lambda: b.d.aborted == ["mine"] and b.p.aborted == ["mine"])


async def test_fleet_endpoints_answer_for_all_servers() -> None:
    decode = Fake("decode", info={"internal_states": [{"last_gen_throughput": 5.0}]})
    async with bench(decode=decode) as b:
        for path in ("/server_info", "/get_server_info"):
            async with b.client.get(path) as response:
                info = await response.json()
            assert info["internal_states"] == [{"last_gen_throughput": 5.0}]
            assert info["prefill"][0]["role"] == "prefill"
            assert info["decode"][0]["role"] == "decode"
        for path in ("/v1/models", "/model_info", "/health", "/health_generate"):
            async with b.client.get(path) as response:
                assert response.status == 200
        async with b.client.post("/flush_cache") as response:
            assert response.status == 200
        assert (b.p.flushed, b.d.flushed) == (1, 1)
        await b.post(GENERATE, {"text": "x"})
        async with b.client.get("/metrics") as response:
            text = await response.text()
        assert (
            'kairos_router_requests_total{endpoint="/generate",slo_class="default",status="200"} 1.0'
            in text
        )
        assert "kairos_router_in_flight 0.0" in text


async def test_health_is_503_when_a_side_is_gone() -> None:
    async with bench() as b:
        b.router.fleet.prefills[0].draining = True
        async with b.client.get("/health") as response:
            assert response.status == 503


async def test_switched_off_it_neither_reads_nor_sends_slos() -> None:
    async with bench(config=KairosConfig(enabled=False)) as b:
        status, _ = await b.post(GENERATE, {"text": "x", "ttft_ms": -1})
        assert status == 200
        assert "sampling_params" not in b.d.bodies[0]


async def test_many_requests_at_once_leave_no_trace() -> None:
    decode = Fake("decode", streaming(b"data: 1\n\n", b"data: 2\n\n", gap_s=0.01))
    async with bench(decode=decode) as b:

        async def one(index: int) -> None:
            body = {"text": "x" * (1 + index), "stream": True, "ttft_ms": 100 + index % 7}
            async with b.client.post(GENERATE, json=body) as response:
                assert (await response.read()) == b"data: 1\n\ndata: 2\n\n"

        await asyncio.gather(*(one(i) for i in range(100)))
        fleet = b.router.fleet
        await until(lambda: fleet.prefills[0].owed == 0)
        assert (fleet.decodes[0].running, round(fleet.decodes[0].tokens, 6)) == (0, 0)


async def test_several_samples_of_a_chat_are_refused_rather_than_left_hanging() -> None:
    async with bench() as b:
        status, answer = await b.post(CHAT, {"messages": [], "n": 2})
        assert (status, answer["error"]["param"]) == (400, "n")
