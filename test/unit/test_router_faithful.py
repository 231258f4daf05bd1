"""What passes the router and how: keys, ids, log probabilities, endpoints; and what is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_pd import COMPLETIONS, GENERATE, Fake, bench, free_port, streaming
from sglang_kairos.router.request.logprobs import Merger

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

STREAM = {"text": "x", "stream": True}


async def test_a_client_key_is_asked_for_and_not_passed_on() -> None:
    async with bench(client_api_key="mine", api_key="theirs") as b:
        assert (await b.post(GENERATE, {"text": "x"}))[0] == 401
        for path in ("/health", "/metrics", "/ping"):
            async with b.client.get(path) as response:
                assert response.status == 200, path
        async with b.client.get("/server_info") as response:
            assert response.status == 401
        headers = {"authorization": "Bearer mine"}
        assert (await b.post(GENERATE, {"text": "x"}, headers=headers))[0] == 200
        assert b.d.headers[0]["authorization"] == "Bearer theirs"


async def test_every_answer_has_a_request_id_the_clients_own_if_it_sent_one() -> None:
    async with bench() as b:
        for sent in ("mine", None):
            headers = {"x-request-id": sent} if sent else {}
            async with b.client.post(GENERATE, json={"text": "x"}, headers=headers) as answer:
                found = answer.headers["x-request-id"]
            assert found == sent or (sent is None and len(found) == 32)
            assert b.d.headers[-1]["x-request-id"] == found


async def test_prompt_log_probabilities_of_prefill_come_before_those_of_decode() -> None:
    def meta(values: list[int]) -> dict[str, Any]:
        return {"text": "t", "meta_info": {"input_token_logprobs": values}}

    async def prefill(_: web.Request) -> web.Response:
        return web.json_response(meta([1, 2]))

    async def decode(_: web.Request) -> web.Response:
        return web.json_response(meta([3]))

    async with bench(Fake("prefill", prefill), Fake("decode", decode)) as b:
        body = {"text": "x", "return_logprob": True}
        assert await b.post(GENERATE, body) == (200, meta([1, 2, 3]))
        assert await b.post(GENERATE, {"text": "x"}) == (200, meta([3]))
        sse = b"data: " + json.dumps(meta([3])).encode() + b"\n\n"
        b.d.answer = streaming(sse[:10], sse[10:] + sse, b"data: [DONE]\n\n", gap_s=0.01)
        b.p.answer = streaming(b"data: " + json.dumps(meta([1])).encode() + b"\n\n")
        async with b.client.post(GENERATE, json={**body, "stream": True}) as response:
            events = (await response.read()).split(b"\n\n")
        assert [json.loads(event[6:]) for event in events[:2]] == [meta([1, 3])] * 2
        assert events[2:] == [b"data: [DONE]", b""]


def test_a_merger_leaves_what_it_does_not_understand_as_it_is() -> None:
    for stream in (False, True):
        for body in (b"", b"odd", b"data: odd\n\n", b"[1]", b"data: 5\n\n"):
            merger = Merger(body, stream)
            assert merger.feed(b"data: x\n\nrest") + merger.end() == b"data: x\n\nrest"


async def test_endpoints_that_any_server_can_answer_are_passed_on_with_their_body() -> None:
    async def tokenize(request: web.Request) -> web.Response:
        return web.json_response({"got": await request.json()})

    app = web.Application()
    app.router.add_post("/tokenize", tokenize)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    async with bench() as b:
        b.router.fleet.prefills[0].url = f"http://127.0.0.1:{port}"
        async with b.client.post("/tokenize", json={"prompt": "x"}) as response:
            assert await response.json() == {"got": {"prompt": "x"}}
    await runner.cleanup()


async def test_metrics_tell_what_was_promised_and_kept_per_class_and_server() -> None:
    token = b'data: {"meta_info": {"completion_tokens": %d}}\n\n'
    decode = Fake("decode", streaming(token % 1, token % 5, b"data: [DONE]\n\n", gap_s=0.04))
    async with bench(decode=decode) as b:
        for ttft, tpot in ((5000, 500), (1, 0.1)):
            body = {**STREAM, "ttft_ms": ttft, "tpot_ms": tpot}
            async with b.client.post(GENERATE, json=body) as response:
                await response.read()
        async with b.client.post(COMPLETIONS, json={"prompt": "x"}) as response:
            await response.read()  # not asked for as a stream: says nothing about TTFT
        async with b.client.get("/metrics") as response:
            text = await response.text()
    for line in (
        'slo_total{met="yes",slo_class="default",target="ttft"} 1.0',
        'slo_total{met="no",slo_class="default",target="ttft"} 1.0',
        'slo_total{met="yes",slo_class="default",target="tpot"} 1.0',
        'slo_total{met="no",slo_class="default",target="tpot"} 1.0',
        f'ttft_miss_seconds_count{{server="{b.p.url}"}} 2.0',
        f'tpot_miss_seconds_count{{server="{b.d.url}"}} 2.0',
        'tpot_seconds_bucket{le="0.015",slo_class="default"} 2.0',
    ):
        assert line in text, line
