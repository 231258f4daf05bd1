"""What the router measures of a stream, when an answer is whole, and what it joins."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_clock import now_s
from helpers.fake_pd import CHAT, COMPLETIONS, GENERATE, Bench, Fake, bench, streaming, until
from sglang_kairos.router.request import attempt
from sglang_kairos.router.request.logprobs import Merger
from sglang_kairos.router.request.sse import (
    Hidden,
    Meter,
    Relayed,
    Splitter,
    ask_for_counts,
    data_of,
    without,
)
from sglang_kairos.router.request.upstream_stream import AnswerRelay, DecodeHead

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

DONE = b"data: [DONE]\n\n"


def sse(row: Any) -> bytes:
    return b"data: " + json.dumps(row, separators=(",", ":")).encode() + b"\n\n"


def usage(tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 5,
        "total_tokens": 5 + tokens,
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
        "reasoning_tokens": 0,
        "completion_tokens_details": None,
    }


def stock(path: str, body: dict[str, Any], counts: list[list[int]]) -> list[bytes]:
    """What SGLang streams: in each round one event per choice that has now so many tokens. The text
    is full of words that look like JSON."""
    options = body.get("stream_options") or {}
    text = 'say "usage":{"completion_tokens":9} "choices":[] "finish_reason":"stop"'
    events = []
    for place, round_ in enumerate(counts):
        ends = "length" if place == len(counts) - 1 else None
        for index, count in enumerate(round_):
            if path == GENERATE:
                meta = {"finish_reason": ends and {"type": ends}, "completion_tokens": count}
                events.append(sse({"text": text, "meta_info": meta, "index": index}))
                continue
            said = {"text": text} if path == COMPLETIONS else {"delta": {"content": text}}
            row: dict[str, Any] = {"id": "x", "model": "m"}
            row["choices"] = [{"index": index, **said, "logprobs": None, "finish_reason": ends}]
            if path == COMPLETIONS:
                row["usage"] = usage(count) if options.get("continuous_usage_stats") else None
            events.append(sse(row))
    if path != GENERATE and options.get("include_usage"):
        events.append(
            sse({"id": "x", "model": "m", "choices": [], "usage": usage(sum(counts[-1]))})
        )
    return [*events, DONE]


def server(path: str, counts: list[list[int]], gap_s: float = 0.0) -> Fake:
    """A decode server that streams as SGLang does, and reads ``stream_options`` as it does."""

    async def answer(request: web.Request) -> web.StreamResponse:
        parts = stock(path, await request.json(), counts)
        return await streaming(*parts, gap_s=gap_s)(request)

    return Fake("decode", answer)


ASKS = {GENERATE: {"text": "x"}, COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": []}}


def ask(path: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", **ASKS[path], "stream": True, **more}


async def stream(b: Bench, path: str, body: dict[str, Any]) -> tuple[bytes, float]:
    """What the client got, and how long it took in seconds."""
    await until(lambda: b.router.fleet.decodes[0].usage_by_default is not None)
    began = now_s()
    async with b.client.post(path, json=body) as response:
        return await response.read(), now_s() - began


async def metric(b: Bench, name: str, **labels: str) -> float:
    async with b.client.get("/metrics") as response:
        text = await response.text()
    rows = re.findall(rf"^kairos_router_{name}(?:\{{([^}}]*)\}})? (\S+)$", text, re.MULTILINE)
    want = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(value) for said, value in rows if all(word in said for word in want))


async def tpot(b: Bench) -> tuple[float, float]:
    """Its sum in seconds and how many there were."""
    return await metric(b, "tpot_seconds_sum"), await metric(b, "tpot_seconds_count")


EIGHTS = [[1], [9], [17], [25], [33], [40]]


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_tpot_counts_tokens_and_not_events_with_a_stream_interval(path: str) -> None:
    async with bench(decode=server(path, EIGHTS, 0.02)) as b:
        body = ask(path)
        got, took = await stream(b, path, body)
        assert got == b"".join(stock(path, body, EIGHTS))
        seconds, count = await tpot(b)
        assert count == 1
        # Gaps of 20 ms lie between the first of 40 tokens and the last (one or two fewer are
        # seen by a router that was late to read the first).
        assert 3 * 0.02 / 39 <= seconds <= took / 39


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_tpot_of_several_samples_is_that_of_each_and_not_of_all_together(
    options: Any,
) -> None:
    counts = [[n] * 4 for n in (1, 2, 3)]
    async with bench(decode=server(COMPLETIONS, counts, 0.01)) as b:
        body = ask(COMPLETIONS, n=4, **({"stream_options": options} if options else {}))
        got, took = await stream(b, COMPLETIONS, body)
        assert got == b"".join(stock(COMPLETIONS, body, counts))
        seconds, count = await tpot(b)
        assert count == 1
        # Between the first and the last token of a sample there are eight gaps (as above).
        assert 6 * 0.01 / 2 <= seconds <= took / 2


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_a_stream_whose_tokens_nobody_counted_has_no_tpot(path: str) -> None:
    rows = [{"choices": [{"index": 0, "text": "a"}]}] * 3
    decode = Fake("decode", streaming(*map(sse, rows), DONE, gap_s=0.01))
    async with bench(decode=decode) as b:
        await stream(b, path, ask(path))
        assert await tpot(b) == (0, 0)
        assert await metric(b, "slo_total", target="tpot") == 0
        assert await metric(b, "slo_total", target="ttft") == 1


async def test_a_server_that_tells_its_usage_unasked_goes_on_telling_the_client() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert "stream_options" not in body
        told = stock(COMPLETIONS, {"stream_options": {"include_usage": True}}, EIGHTS)
        return await streaming(*told)(request)

    decode = Fake("decode", answer, info={"stream_response_default_include_usage": True})
    async with bench(decode=decode) as b:
        got, _ = await stream(b, COMPLETIONS, ask(COMPLETIONS))
        assert b'"completion_tokens":40' in got.split(b"\n\n")[-3]
        assert (await tpot(b))[1] == 1


CUTS = st.lists(st.integers(0, 4000), max_size=12)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(min(place, len(data)) for place in at)})
    return [data[a:b] for a, b in pairwise(places)]


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"data: {}", b": c"])), CUTS)
def test_events_are_the_same_however_reads_cut_them(words: list[bytes], at: list[int]) -> None:
    data = b"".join(words)
    whole, pieces = Splitter(), Splitter()
    events = whole.feed(data)
    assert [event for piece in cut(data, at) for event in pieces.feed(piece)] == events
    assert b"".join(events) + pieces.rest == data
    assert whole.rest == pieces.rest


def test_an_event_of_any_size_is_cut_in_linear_time_and_its_middle_may_go() -> None:
    splitter, piece = Splitter(limit=1000), b"x" * 50
    head, tail = b'data: {"a":"', b'","completion_tokens":7}\n\n'
    assert splitter.feed(head) == []
    for _ in range(20_000):
        assert splitter.feed(piece) == []
    (event,) = splitter.feed(tail)
    assert event.startswith(head) and event.endswith(tail) and len(event) < 5000


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b'event: x\nid: 1\ndata: {"a":\ndata: 1}\n\n', b'{"a":\n1}'),
        (b": ping\n\n", b""),
        (b"\n\n", b""),
    ],
)
def test_the_data_of_an_event_is_its_data_lines(event: bytes, data: bytes) -> None:
    assert data_of(event) == data


@given(
    path=st.sampled_from([COMPLETIONS, CHAT]),
    choices=st.integers(1, 3),
    asked=st.sampled_from(
        [
            None,
            {},
            {"include_usage": True},
            {"include_usage": False},
            {"continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": True},
        ]
    ),
    by_default=st.sampled_from([True, False, None]),
    at=CUTS,
)
def test_what_was_asked_in_the_clients_place_is_never_seen_by_it(
    path: str, choices: int, asked: Any, by_default: bool | None, at: list[int]
) -> None:
    choices = choices if path == COMPLETIONS else 1
    counts = [[n] * choices for n in (1, 4, 9)]

    def told(body: dict[str, Any]) -> bytes:
        options = dict(body.get("stream_options") or {})
        options["include_usage"] = by_default or options.get("include_usage")
        return b"".join(stock(path, {"stream_options": options}, counts))

    body: dict[str, Any] = {"stream": True} | ({} if asked is None else {"stream_options": asked})
    wanted, sent = told(body), dict(body)
    hidden = ask_for_counts(sent, path, choices, asked, by_default)
    splitter, meter, seen = Splitter(), Meter(path, choices), b""
    for piece in cut(told(sent), at):
        for event in splitter.feed(piece):
            meter.event(event, 0.0)
            seen += without(hidden, event)
    assert seen + splitter.rest == wanted
    assert meter.done
    known = by_default is not None or choices > 1 or (asked or {}).get("include_usage")
    assert (meter.tpot_s() == 0.0) or not known
    assert ask_for_counts(sent, path, choices, asked, None) in (hidden, Hidden.NOTHING)


def told_by(*rows: tuple[float, Any], path: str = COMPLETIONS, choices: int = 1) -> float | None:
    meter = Meter(path, choices)
    for at_s, row in rows:
        meter.event(sse(row) if not isinstance(row, bytes) else row, at_s)
    return meter.tpot_s()


def native(count: int, finish: Any = None, index: int = 0) -> dict[str, Any]:
    meta = {"finish_reason": finish, "completion_tokens": count}
    return {"text": "t", "meta_info": meta, "index": index}


def choice(finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {}, "finish_reason": finish}], **more}


LAST = {"choices": [], "usage": usage(11)}
TPOTS: dict[str, tuple[float | None, str, int, list[tuple[float, Any]]]] = {
    "an event that only ends": (0.5, GENERATE, 1, [
        (0, native(1)), (1, native(3)), (9, native(3, {"type": "length"}))]),
    "events before the first token": (0.5, GENERATE, 1, [
        (0, native(0)), (4, native(1)), (5, native(3, {"type": "stop"}))]),
    "all tokens at once": (None, GENERATE, 1, [(0, native(5, {"type": "stop"}))]),
    "one token": (None, GENERATE, 1, [(0, native(1)), (3, native(1, {"type": "stop"}))]),
    "the slowest of a batch": (2.0, GENERATE, 2, [
        (0, native(1)), (0, native(1, index=1)), (1, native(3, {"type": "stop"})),
        (8, native(5, {"type": "stop"}, index=1))]),
    "an uncounted one of a batch": (None, GENERATE, 2, [
        (0, native(1)), (0, {"index": 1, "text": "t"}), (1, native(3))]),
    "aborted": (None, GENERATE, 1, [
        (0, native(1)), (1, native(3)), (2, native(3, {"type": "abort", "message": "m"}))]),
    "an error": (None, CHAT, 1, [(0, choice()), (1, {"error": {"message": "m"}}), (2, LAST)]),
    "role, tool and finish events": (1.0, CHAT, 1, [
        (0, choice()), (2, choice()), (3, choice()), (10, choice("tool_calls")), (10, LAST)]),
    "hidden states behind the end": (0.5, CHAT, 1, [
        (0, choice()), (5, choice("stop")), (90, choice()), (90, LAST)]),
    "extension events": (0.5, CHAT, 1, [
        (0, choice()), (5, choice("stop")), (90, {"choices": [], "sglext": {}}), (91, LAST)]),
    "comments, multi-line data, CR LF": (0.5, CHAT, 1, [
        (0, sse(choice())), (5, b'data: {"choices":\r\ndata: [{"index": 0}]}\r\n\r\n'),
        (90, b": ping\n\n"), (91, sse(LAST))]),
    "each event counted": (0.5, COMPLETIONS, 1, [
        (0, choice(usage=usage(1))), (5, choice(usage=usage(11))), (9, choice("stop", usage=usage(11)))]),
    "one count for several": (None, COMPLETIONS, 2, [
        (0, choice()), (0, choice(index=1)), (5, choice()), (5, choice(index=1)), (5, LAST)]),
}  # fmt: skip


@pytest.mark.parametrize("case", TPOTS)
def test_tpot_is_the_servers_count_over_the_times_of_its_tokens(case: str) -> None:
    want, path, choices, rows = TPOTS[case]
    assert told_by(*rows, path=path, choices=choices) == want


async def leave_at(b: Bench, path: str, body: dict[str, Any], word: bytes) -> None:
    """A client that closes its connection when it has read `word`."""
    await until(lambda: b.router.fleet.decodes[0].usage_by_default is not None)
    async with b.client.post(path, json=body) as response:
        got = b""
        while word not in got:
            got += await response.content.readany()
        response.close()


async def answered(b: Bench, status: str) -> None:
    async with asyncio.timeout(30):
        while not await metric(b, "requests_total", status=status):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (COMPLETIONS, b"[DONE]"),
        (CHAT, b"[DONE]"),
        (GENERATE, b"[DONE]"),
        (GENERATE, b'"type":"length"'),
        (CHAT, b'"finish_reason":"length"}'),
    ],
)
@pytest.mark.parametrize("prefill_is_done", [True, False])
async def test_a_client_that_closes_when_it_has_its_answer_has_been_served(
    path: str, word: bytes, prefill_is_done: bool
) -> None:
    over = asyncio.Event()
    ended: list[str] = []

    async def decode(request: web.Request) -> web.StreamResponse:
        *parts, done = stock(path, await request.json(), EIGHTS)
        last = [] if word == b"[DONE]" else [parts.pop()] if path == CHAT else []
        now = [*parts, done] if word == b"[DONE]" else parts
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in now:
            await response.write(part)
        await over.wait()
        for part in last:
            await response.write(part)
        await response.write_eof()
        ended.append("decode")
        return response

    async def prefill(_: web.Request) -> web.StreamResponse:
        if not prefill_is_done:
            await over.wait()
        ended.append("prefill")
        return web.json_response({})

    async with bench(Fake("prefill", prefill), Fake("decode", decode)) as b:
        await leave_at(b, path, ask(path), word)
        await answered(b, "200")
        assert not await metric(b, "requests_total", status="499")
        over.set()
        await until(lambda: sorted(ended) == ["decode", "prefill"])
        async with asyncio.timeout(30):
            while (await tpot(b))[1] != 1:
                await asyncio.sleep(0.005)
        # Nobody was told to stop, and nobody's connection was cut.
        assert not (b.p.aborted or b.d.aborted or b.p.left.is_set() or b.d.left.is_set())


async def test_a_client_that_closes_before_the_last_token_has_left() -> None:
    hold = asyncio.Event()
    parts = stock(COMPLETIONS, {}, EIGHTS)[:3]
    async with bench(decode=Fake("decode", streaming(*parts, hold=hold))) as b:
        await leave_at(b, COMPLETIONS, ask(COMPLETIONS), b"data")
        await answered(b, "499")
        await until(lambda: bool(b.d.aborted))


async def test_what_happens_behind_the_end_of_an_answer_changes_nothing_of_it() -> None:
    parts = stock(GENERATE, {}, EIGHTS)
    decode = Fake("decode", streaming(*parts, hold=asyncio.Event()))
    async with bench(decode=decode, request_timeout_s=0.3) as b:
        got, _ = await stream(b, GENERATE, ask(GENERATE))
        assert got == b"".join(parts)
        await answered(b, "200")
        assert not b.d.aborted


# Answers of SGLang 0.5.23 on a pair of tiny models: prefill's, decode's, and a unified server's.
def lists(probs: list[float | None], tokens: list[str], top: list[Any]) -> dict[str, Any]:
    return {
        "text_offset": [-1] * len(tokens),
        "token_logprobs": probs,
        "tokens": tokens,
        "top_logprobs": top,
    }


PROMPTS = [
    lists(
        [None, -14.270028114318848, -13.727058410644531],
        ["th", "e", " water"],
        [
            None,
            {" liv": -1.692678451538086, " reques": -2.081761360168457},
            {" work": -2.191648244857788, " schedules": -2.493849992752075},
        ],
    ),
    lists([None, -14.965538024902344], ["a", " s"], [None, {" withed": -0.547, "eed": -2.008}]),
]
FIRST = [
    lists([-1.022499918937683], [" poin"], [{" poin": -1.022499918937683, " landing": -2.53}]),
    lists([-1.7396107912063599], [" so"], [{" so": -1.7396107912063599, " network": -2.698}]),
]
SECOND = [
    lists([-1.1402548551559448], [" ar"], [{" ar": -1.1402548551559448, " liv": -2.098}]),
    lists([-1.3880870342254639], ["ying"], [{"ying": -1.3880870342254639, " do": -1.989}]),
]


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    return {key: [item for part in parts for item in part[key]] for key in parts[0]}


def completion(index: int, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "text": "t", "logprobs": joined(*parts), "finish_reason": None}


@pytest.mark.parametrize("prompts", [1, 2])
async def test_the_prompts_log_probabilities_of_a_completion_are_a_unified_servers(
    prompts: int,
) -> None:
    each = range(prompts)
    whole = {
        "prefill": {"choices": [completion(i, PROMPTS[i], FIRST[i]) for i in each]},
        "decode": {"choices": [completion(i, FIRST[i], SECOND[i]) for i in each]},
        "unified": {"choices": [completion(i, PROMPTS[i], FIRST[i], SECOND[i]) for i in each]},
    }
    events = {
        "prefill": [{"choices": [completion(i, PROMPTS[i], FIRST[i])]} for i in each],
        "decode": [{"choices": [completion(i, part[i])]} for part in (FIRST, SECOND) for i in each],
        "unified": [{"choices": [completion(i, PROMPTS[i], FIRST[i])]} for i in each]
        + [{"choices": [completion(i, SECOND[i])]} for i in each],
    }

    def fake(role: str) -> Fake:
        async def answer(request: web.Request) -> web.StreamResponse:
            if (await request.json()).get("stream"):
                return await streaming(*map(sse, events[role]), DONE)(request)
            return web.json_response(whole[role])

        return Fake(role, answer)

    async with bench(fake("prefill"), fake("decode")) as b:
        prompt = ["the water", "a s"][:prompts]
        body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 2}
        assert await b.post(COMPLETIONS, body) == (200, whole["unified"])
        got, _ = await stream(b, COMPLETIONS, {**body, "stream": True})
        rows = [json.loads(event[6:]) for event in got.split(b"\n\n")[:-2]]
        assert rows == events["unified"]
        for other in ({**body, "echo": False}, {**body, "logprobs": 0}):
            assert await b.post(COMPLETIONS, other) == (200, whole["decode"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            GENERATE,
            {"text": "x", "return_logprob": True, "logprob_start_len": 0},
            "top_logprobs_num",
        ),
        (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 1}, "logprobs"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_log_probabilities_too_long_to_join_are_an_error_and_never_left_out(
    monkeypatch: pytest.MonkeyPatch, path: str, body: Any, param: str, stream: bool
) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"text": "x" * 5000, "meta_info": {}})

    async def main() -> None:
        async with bench(Fake("prefill", answer), Fake("decode")) as b:
            status, got = await b.post(path, {**body, "stream": stream})
            assert (status, got["error"]["param"]) == (413, param)
            assert "shorter prompts" in got["error"]["message"]
            assert len(b.d.bodies) == 1, "another pair would say the same"
            # Who asks for those of the answer only gets them.
            only = {"text": "x", "return_logprob": True}
            assert (await b.post(GENERATE, only))[0] == 200

    monkeypatch.setattr(attempt, "KEEP_LOGPROBS_BYTES", 4096)
    await main()


@pytest.mark.parametrize("first", [[None], []], ids=["0.5.23", "0.5.16"])
def test_flat_log_probabilities_and_those_of_chosen_tokens_are_joined_as_well(first: Any) -> None:
    flat = {"input_top_logprobs_val_flat": [-1.0], "input_top_logprobs_shape": [1, 1]}
    none = {"input_top_logprobs_val_flat": [], "input_top_logprobs_shape": [0, 1]}
    rows = [[[-7.0, 300, None]], [[-8.0, 300, None]]]
    prefill = {**flat, "completion_tokens": 1, "output_token_ids_logprobs": rows[:1]}
    decode = {**none, "completion_tokens": 2, "output_token_ids_logprobs": [*first, rows[1]]}
    merger = Merger(json.dumps({"meta_info": prefill}).encode(), stream=False)
    merger.feed(json.dumps({"meta_info": decode}).encode())
    want = {**flat, "completion_tokens": 2, "output_token_ids_logprobs": rows}
    assert json.loads(merger.end()) == {"meta_info": want}


class Content:
    """A body's chunks; with the last one its end is known, unless it is told `apart`."""

    def __init__(self, chunks: list[bytes], apart: bool) -> None:
        self.chunks, self.apart = chunks, apart

    def at_eof(self) -> bool:
        return not self.chunks and not self.apart

    async def readany(self) -> bytes:
        if not self.chunks:
            self.apart = False
            return b""
        return self.chunks.pop(0)


class Answered:
    """A response of decode's."""

    status = 200

    def __init__(self, content: Content, kind: str) -> None:
        self.content, self.headers = content, {"content-type": kind}


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
@pytest.mark.parametrize("hidden", [Hidden.NOTHING, Hidden.LAST])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_answer_is_ended_once_and_with_its_last_bytes_where_they_are_known(
    kind: str, hidden: Hidden, apart: bool, count: int
) -> None:
    events = [b'data: {"text": "%d", "meta_info": {}}\n\n' % number for number in range(count)]
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    response: Any = Answered(Content(events[1:], apart), kind)
    seen = Relayed()
    passage = AnswerRelay(DecodeHead(response, events[0]), seen, send, Meter(GENERATE, 1), hidden)
    assert asyncio.run(passage.relay([])) is None
    bodies = sent[1:]
    assert b"".join(message["body"] for message in bodies) == b"".join(events)
    assert [message.get("more_body", False) for message in bodies] == [True] * (len(bodies) - 1) + [
        False
    ]
    held = hidden is not Hidden.NOTHING and kind == "text/event-stream"
    assert len(bodies) == count + (apart or held)
    assert seen.whole and seen.ended
