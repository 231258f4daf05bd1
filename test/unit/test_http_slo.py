"""The server's SLO middleware: what the app behind it sees, and what passes untouched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sglang_kairos.engine.hooks.slo_middleware import ServerFacts, SloMiddleware, install
from sglang_kairos.slo.age import AGE_HEADERS, AgeRule
from sglang_kairos.slo.body import carry, dump, error_body, mentions_slo
from sglang_kairos.slo.targets import Slo, SloError, SloTable

pytestmark = pytest.mark.anyio

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
TABLE = SloTable(Slo(2000.0, 100.0), {"chat": Slo(500.0, 50.0, "chat", 2.0)})
Message = MutableMapping[str, Any]


class Seen:
    """An ASGI app that records the body and headers it is given."""

    def __init__(self) -> None:
        self.raw: bytes | None = None
        self.headers: dict[str, str] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        raw, more = b"", True
        while more:
            message = await receive()
            raw += message.get("body", b"")
            more = message.get("more_body", False)
        self.raw = raw
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def send_to(
    app: Any, path: str, content: Any, headers: dict[str, str] | None = None, method: str = "POST"
) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.request(method, path, content=content, headers=headers)


async def through(
    path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[httpx.Response, Seen]:
    seen = Seen()
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    app = SloMiddleware(seen, TABLE, clock=lambda: 0.0)
    return await send_to(app, path, content, headers, method), seen


def wire_of(path: str, seen: Seen) -> Any:
    assert seen.raw is not None
    body = json.loads(seen.raw)
    holder = body["sampling_params"] if path == GENERATE else body
    return holder["custom_params"]["kairos"]


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
@pytest.mark.parametrize("by_header", [True, False])
async def test_the_slo_reaches_custom_params_and_leaves_the_body(
    path: str, by_header: bool
) -> None:
    asked = {} if by_header else {"ttft_ms": 300}
    answer, seen = await through(path, {"text": "x", **asked}, {"X-SLO-TTFT-MS": "300"})
    assert answer.status_code == 200
    assert wire_of(path, seen) == {
        "ttft_ms": 300.0,
        "tpot_ms": 100.0,
        "class": "default",
        "weight": 1.0,
        "age_ms": 0.0,
    }
    assert seen.raw is not None
    assert b'"ttft_ms":300,' not in seen.raw
    assert seen.headers["content-length"] == str(len(seen.raw))


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (None, {"kairos": "W"}),
        ({}, {"kairos": "W"}),
        ({"custom_params": None, "n": 2}, {"kairos": "W"}),
        ({"custom_params": {"mine": [1]}}, {"mine": [1], "kairos": "W"}),
    ],
)
async def test_sampling_params_of_any_shape_take_it(given_: Any, expected: Any) -> None:
    _, seen = await through(GENERATE, {"text": "x", "slo": "chat", "sampling_params": given_})
    assert seen.raw is not None
    params = json.loads(seen.raw)["sampling_params"]
    assert params["custom_params"]["kairos"]["class"] == "chat"
    params["custom_params"]["kairos"] = "W"
    assert params["custom_params"] == expected


async def test_a_batch_takes_it_once_per_prompt_and_keeps_their_own() -> None:
    own = {"custom_params": {"kairos": {"ttft_ms": 9}}}
    body = {"text": ["a", "b"], "ttft_ms": 300, "sampling_params": [{"n": 1}, own]}
    _, seen = await through(GENERATE, body)
    assert seen.raw is not None
    first, second = json.loads(seen.raw)["sampling_params"]
    assert first["custom_params"]["kairos"]["ttft_ms"] == 300
    assert second["custom_params"]["kairos"] == {"ttft_ms": 9}


PREFERRED = {"ban": 7, "kairos": 1}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, {"ban": 7}),
        ({}, {"ban": 7}),
        ({"mine": 1}, {"mine": 1}),
        ({"kairos": {"age_ms": 5}}, {"ban": 7}),
        ({"kairos": {"age_ms": 5}, "mine": 1}, {"mine": 1}),
    ],
)
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_an_slo_does_not_cost_the_server_its_preferred_custom_params(
    path: str, own: Any, expected: dict[str, Any]
) -> None:
    holder = {"custom_params": own}
    body = {"text": "x", "prompt": "x", "ttft_ms": 300}
    body |= {"sampling_params": holder} if path == GENERATE else holder
    seen = Seen()
    app = SloMiddleware(seen, TABLE, ServerFacts(preferred=PREFERRED), lambda: 0.0)
    assert (await send_to(app, path, orjson.dumps(body))).status_code == 200
    assert seen.raw is not None
    sent = json.loads(seen.raw)
    params = (sent["sampling_params"] if path == GENERATE else sent)["custom_params"]
    assert params.pop("kairos").keys() >= {"age_ms"}
    assert params == expected


UNTOUCHED: list[tuple[str, bytes]] = [
    ("nothing about SLOs", b'{"text": "slow slo ttft_ms", "n":1 }'),
    ("malformed", b'{"ttft_ms": '),
    ("not an object", b'["ttft_ms"]'),
    ("a null asks for nothing", b'{"ttft_ms" : null}'),
    ("empty", b""),
    ("already carried", b'{"sampling_params": {"custom_params": {"kairos": {"age_ms": 5} } } }'),
    ("sampling_params is SGLang's to refuse", b'{"sampling_params": "\\"kairos\\""}'),
]


@pytest.mark.parametrize(("name", "raw"), UNTOUCHED)
async def test_what_needs_no_change_passes_as_the_bytes_it_was(name: str, raw: bytes) -> None:
    answer, seen = await through(GENERATE, raw)
    assert (answer.status_code, seen.raw) == (200, raw), name


async def test_other_endpoints_and_methods_pass() -> None:
    for path, method in (("/v1/embeddings", "POST"), (GENERATE, "GET"), ("/generate/x", "POST")):
        _, seen = await through(path, {"ttft_ms": -1}, method=method)
        assert seen.raw == b'{"ttft_ms":-1}'
    _, seen = await through(GENERATE, {"ttft_ms": 5}, method="PUT")
    assert wire_of(GENERATE, seen)["ttft_ms"] == 5


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "headers", "param", "text"),
    [
        ({"ttft_ms": -1}, {}, "ttft_ms", "between 1 and 3600000, got -1"),
        ({"slo": {"x": 1}}, {}, "slo", "unknown key"),
        ({"tpot_ms": 0}, {}, "tpot_ms", "between 0.1 and"),
    ],
)
async def test_a_bad_value_is_answered_400_in_the_endpoints_shape(
    path: str, body: Any, headers: dict[str, str], param: str, text: str
) -> None:
    answer, seen = await through(path, body, headers)
    assert (answer.status_code, seen.raw) == (400, None)
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, 400)
    assert param in error["message"]
    assert text in error["message"]
    if path != GENERATE:
        assert answer.json()["object"] == "error"
        assert answer.json()["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (
            {"ttft_ms": 5, "sampling_params": {"custom_params": [1]}},
            "sampling_params.custom_params",
        ),
        (
            {"ttft_ms": 5, "sampling_params": [{}, {"custom_params": 1}]},
            "sampling_params[1].custom_params",
        ),
        (
            {"sampling_params": {"custom_params": {"kairos": {"ttft_ms": "x"}}}},
            "custom_params.kairos.ttft_ms",
        ),
        ({"sampling_params": {"custom_params": {"kairos": 5}}}, "custom_params.kairos"),
    ],
)
async def test_a_place_that_cannot_take_it_is_named(body: Any, param: str) -> None:
    answer, _ = await through(GENERATE, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_carried_slo_keeps_only_what_is_known() -> None:
    wire = {"ttft_ms": 5, "deep": {"er": {"est": 1}}, "tpot_ms": None}
    _, seen = await through(COMPLETIONS, {"custom_params": {"kairos": wire}})
    assert wire_of(COMPLETIONS, seen) == {"ttft_ms": 5}


async def test_a_key_spelt_with_escapes_is_found() -> None:
    _, seen = await through(COMPLETIONS, b'{"\\u0074tft_ms": 5}')
    assert wire_of(COMPLETIONS, seen)["ttft_ms"] == 5


async def test_a_body_nested_deeper_than_orjson_writes_still_arrives() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    raw = json.dumps({"ttft_ms": 5, "deep": deep}).encode()
    answer, seen = await through(COMPLETIONS, raw)
    assert answer.status_code == 200
    assert wire_of(COMPLETIONS, seen)["ttft_ms"] == 5


async def test_a_chunked_body_arrives_whole_with_a_length() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b'{"text": "x", "ttft', b'_ms": 5', b"}"):
            yield part

    seen = Seen()
    app = SloMiddleware(seen, TABLE, clock=lambda: 0.0)
    answer = await send_to(app, GENERATE, parts())
    assert answer.status_code == 200
    assert wire_of(GENERATE, seen)["ttft_ms"] == 5
    assert "transfer-encoding" not in seen.headers
    assert seen.raw is not None
    assert seen.headers["content-length"] == str(len(seen.raw))


async def test_the_app_sees_the_client_leave_after_the_body() -> None:
    incoming: list[Message] = [
        {"type": "http.request", "body": b'{"ttft_', "more_body": True},
        {"type": "http.request", "body": b'ms": 5}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    got: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append(await receive())
        got.append(await receive())

    await run_raw(app, incoming)
    assert json.loads(got[0]["body"])["sampling_params"]["custom_params"]["kairos"]
    assert got[1]["type"] == "http.disconnect"


async def test_a_client_that_leaves_in_its_body_is_passed_on_as_that() -> None:
    incoming: list[Message] = [
        {"type": "http.request", "body": b'{"ttft_ms": 5', "more_body": True},
        {"type": "http.disconnect"},
    ]
    got: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append(await receive())
        got.append(await receive())

    await run_raw(app, incoming)
    assert (got[0]["body"], got[0]["more_body"]) == (b'{"ttft_ms": 5', True)
    assert got[1]["type"] == "http.disconnect"


async def run_raw(app: Any, incoming: list[Message]) -> None:
    queue = iter(incoming)

    async def receive() -> Message:
        return next(queue)

    async def send(_: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": GENERATE, "headers": []}
    await SloMiddleware(app, TABLE)(scope, receive, send)


async def test_websockets_and_lifespan_pass() -> None:
    called: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["type"])

    for kind in ("lifespan", "websocket"):
        await SloMiddleware(app, TABLE)({"type": kind, "path": GENERATE}, None, None)  # type: ignore[arg-type]
    assert called == ["lifespan", "websocket"]


async def test_a_root_path_is_not_part_of_the_endpoint() -> None:
    seen = Seen()
    transport = httpx.ASGITransport(
        app=SloMiddleware(seen, TABLE, clock=lambda: 0.0), root_path="/api"
    )

    async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        answer = await client.post("/api/generate", json={"ttft_ms": -1})
    assert answer.status_code == 400


async def test_install_puts_it_innermost_and_only_once() -> None:
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    app = Starlette(routes=[Route(GENERATE, echo, methods=["POST"])])
    install(app, TABLE)
    install(app, TABLE)
    assert len(app.user_middleware) == 1
    answer = await send_to(app, GENERATE, b'{"ttft_ms": 5}')
    assert answer.json()["sampling_params"]["custom_params"]["kairos"]["ttft_ms"] == 5


def test_age_adds_up_and_an_unasked_request_carries_only_its_age() -> None:
    body: dict[str, Any] = {"text": "x"}
    assert carry(body, GENERATE, {}, TABLE, age_ms=3.0, always=True).slo.slo == TABLE.default
    assert body["sampling_params"]["custom_params"]["kairos"] == {"age_ms": 3.0}
    assert carry(body, GENERATE, {}, TABLE, age_ms=4.0).slo.age_ms == 7.0
    assert body["sampling_params"]["custom_params"]["kairos"] == {"age_ms": 7.0}
    carry(body, GENERATE, {}, TABLE, age_ms=1e12)
    assert body["sampling_params"]["custom_params"]["kairos"] == {"age_ms": 3_600_000.0}


AGED = SloTable(TABLE.default, TABLE.classes, ((0, "chat"),), AgeRule(AGE_HEADERS))


@pytest.mark.parametrize(
    ("wire", "spent_ms", "started_ms_ago", "expected_ms"),
    [
        (None, 0.0, 0.0, None),
        (None, 0.0, 9.0, None),  # not worth a new body
        (None, 0.0, 700.0, 700.0),
        (None, 20.0, 700.0, 700.0),
        (None, 900.0, 700.0, 900.0),
        ({"age_ms": 650.0}, 0.0, 700.0, 700.0),
        ({"age_ms": 695.0}, 0.0, 700.0, 695.0),
        ({"age_ms": 650.0}, 100.0, 700.0, 750.0),  # a router's, which has seen the header too
        ({"age_ms": 1.0}, 0.0, 40_000.0, 1.0),
    ],
)
def test_no_request_is_younger_than_its_first_gateway_says_and_no_time_counts_twice(
    wire: Any, spent_ms: float, started_ms_ago: float, expected_ms: float | None
) -> None:
    body: dict[str, Any] = {"prompt": "x", **({"custom_params": {"kairos": wire}} if wire else {})}
    headers = {"x-request-start": f"t={1_764_300_000 - started_ms_ago / 1e3:.3f}"}
    assert mentions_slo(dump(body), headers, AGED)
    for _ in ("router", "server"):
        carry(body, COMPLETIONS, headers, AGED, age_ms=spent_ms, now_s=1_764_300_000.0)
        spent_ms = 0.0
    found = body.get("custom_params", {}).get("kairos", {}).get("age_ms")
    assert found == pytest.approx(expected_ms)


async def test_a_header_that_is_not_taken_as_written_is_counted() -> None:
    counted: list[str] = []
    app = SloMiddleware(Seen(), AGED, wall_clock=lambda: 1e9, count=counted.append)
    headers = {"x-slo-ttft-ms": "0", "x-llm-d-slo-tpot-ms": "default", "x-request-start": "t=5"}
    await send_to(app, COMPLETIONS, b'{"prompt": "x"}', headers)
    assert counted == [
        "x-slo-ttft-ms clamped",
        "x-llm-d-slo-tpot-ms ignored",
        "x-request-start ignored",
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"priority": 3}, "chat"),
        ({"nvext": {"agent_hints": {"priority": 3}}}, "chat"),
        ({"priority": -3}, None),
    ],
)
async def test_a_priority_stays_in_the_body_and_its_class_travels(
    body: dict[str, Any], expected: str | None
) -> None:
    seen = Seen()
    raw = orjson.dumps({"prompt": "x", **body})
    await send_to(SloMiddleware(seen, AGED), COMPLETIONS, raw)
    assert seen.raw is not None
    passed = json.loads(seen.raw)
    assert {key: passed.get(key) for key in body} == body
    assert passed.get("custom_params", {}).get("kairos", {}).get("class") == expected


keys = st.sampled_from(
    ["ttft_ms", "slo", "slo_class", "sampling_params", "custom_params", "kairos", "text"]
)
leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
values = st.recursive(
    leaves | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(keys, values), st.sampled_from([GENERATE, COMPLETIONS, CHAT]))
def test_carry_raises_only_slo_errors_and_is_idempotent(body: dict[str, Any], path: str) -> None:
    raw = dump(body)
    try:
        changed = carry(body, path, {}, TABLE).changed
    except SloError:
        return
    if changed:
        assert mentions_slo(raw, [], TABLE)
    once = dump(body)
    assert not carry(body, path, {}, TABLE).changed
    assert dump(body) == once


def test_error_bodies_have_both_shapes_where_sglangs_differs() -> None:
    assert json.loads(error_body(GENERATE, 503, "m"))["error"]["message"] == "m"
    openai = json.loads(error_body(CHAT, 400, "m", param="p"))
    assert openai["error"]["param"] == openai["param"] == "p"
