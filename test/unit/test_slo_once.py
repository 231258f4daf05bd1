"""One SLO through router, prefill and decode: how often it is parsed, and how old it gets."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import orjson
import pytest

from helpers.fake_scheduler import Req, make_state
from sglang_kairos.engine.hooks.slo_middleware import SloMiddleware
from sglang_kairos.router.clock import Clock
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request import context
from sglang_kairos.slo import body as slo_body
from sglang_kairos.slo import targets
from sglang_kairos.slo.targets import Slo, SloError, SloTable

pytestmark = pytest.mark.anyio

GENERATE, COMPLETIONS = "/generate", "/v1/completions"
WIRE = {"ttft_ms": 700.0, "tpot_ms": 30.0, "class": "chat", "weight": 1.0, "age_ms": 5.0}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each table was parsed with. Every process has one of its own."""
    count: Counter[int] = Counter()
    of_wire, of_request = targets.from_wire, slo_body.request_slo

    def from_wire(wire: Any, table: SloTable) -> Any:
        count[id(table)] += 1
        return of_wire(wire, table)

    def request_slo(body: Any, headers: Any, table: SloTable, notes: Any = None) -> Any:
        count[id(table)] += 1
        return of_request(body, headers, table, notes)

    monkeypatch.setattr(targets, "from_wire", from_wire)
    monkeypatch.setattr(slo_body, "request_slo", request_slo)
    return count


TABLES: list[SloTable] = []  # kept, or an id would come again


def new_table() -> SloTable:
    TABLES.append(SloTable(Slo(2000.0, 100.0), {"chat": Slo(500.0, 50.0, "chat")}))
    return TABLES[-1]


class Router:
    """Reads a request as the router does; `send` gives the body of an attempt."""

    def __init__(self) -> None:
        self.now_s, self.table = 100.0, new_table()
        self.options = RouterOptions(prefills=(("http://p", 1),), decodes=("http://d",))
        self.fleet = Fleet(self.options, Clock(lambda: self.now_s, lambda: self.now_s))

    def accept(self, path: str, body: Any, headers: dict[str, str]) -> context.RequestContext:
        lines = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "path": path, "headers": lines}
        raw, came_s = orjson.dumps(body), self.now_s - 0.002
        return context.accept(raw, scope, came_s, self.fleet, self.table, self.options, True)


async def serve(path: str, raw: bytes, headers: dict[str, str]) -> tuple[SloTable, Any]:
    """Through the middleware of a server; its table, and the body that SGLang gets."""
    got: list[bytes] = []
    table = new_table()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(app=SloMiddleware(app, table, clock=lambda: 0.0))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await client.post(path, content=raw, headers=headers)
    return table, json.loads(got[0])


def schedule(path: str, body: Any, prompts: int) -> tuple[SloTable, list[tuple[Slo, float]]]:
    """As the scheduler sees it, a request per prompt with a copy of the parameters; the SLO and the
    age in milliseconds of each."""
    kairos = make_state()
    kairos.table = new_table()
    params = body["sampling_params"] if path == GENERATE else body
    listed = params if isinstance(params, list) else [params] * prompts
    reqs = []
    for index, item in enumerate(listed):
        req = Req(f"r{index}", 10, 0.0)
        req.sampling_params.custom_params = json.loads(json.dumps(item.get("custom_params")))
        reqs.append(req)
    states = [(req, kairos.promise(req)) for req in [*reqs, *reqs]]
    ages = [1e3 * (req.time_stats.scheduler_recv_time - it.arrival_s) for req, it in states]
    return kairos.table, [(it.slo, age) for (_, it), age in zip(states, ages, strict=True)]


CASES: list[tuple[str, Any, dict[str, str], int]] = [
    (GENERATE, {"text": "a", "ttft_ms": 700, "tpot_ms": 30, "slo_class": "chat"}, {}, 1),
    (GENERATE, {"text": "a", "slo": {"class": "chat", "ttft_ms": 700, "tpot_ms": 30}}, {}, 1),
    (
        COMPLETIONS,
        {"prompt": "a"},
        {"x-slo-ttft-ms": "700", "x-slo-tpot-ms": "30", "x-slo-class": "chat"},
        1,
    ),
    (GENERATE, {"text": ["a"] * 5, "ttft_ms": 700, "tpot_ms": 30, "slo_class": "chat"}, {}, 5),
    (
        GENERATE,
        {"text": ["a"] * 3, "sampling_params": [{"custom_params": {"kairos": WIRE}}] * 3},
        {},
        3,
    ),
    (COMPLETIONS, {"prompt": ["a"] * 4, "custom_params": {"kairos": WIRE}}, {}, 4),
    (
        GENERATE,
        {"text": ["a"] * 2, "sampling_params": [{"n": 3, "custom_params": {"kairos": WIRE}}] * 2},
        {},
        6,
    ),
]


@pytest.mark.parametrize(("path", "body", "headers", "prompts"), CASES)
async def test_an_slo_is_parsed_once_in_each_process(
    parsed: Counter[int],
    path: str,
    body: Any,
    headers: dict[str, str],
    prompts: int,
) -> None:
    router = Router()
    request = router.accept(path, body, headers)
    came_ms = request.carried.slo.age_ms
    for attempt in range(3):  # the first pair, and two retries
        router.now_s += 0.4
        raw = request.payload(router.now_s)
        assert parsed[id(router.table)] == 1
        for _ in ("prefill", "decode"):
            server, passed = await serve(path, raw, headers)
            assert parsed[id(server)] <= 1
            table, states = schedule(path, passed, prompts)
            assert parsed[id(table)] == 1
            assert len(states) == 2 * prompts
            for promised, age_ms in states:
                assert promised == Slo(700.0, 30.0, "chat")
                assert age_ms == pytest.approx(came_ms + 400 * (attempt + 1), abs=0.01)
    assert sum(parsed.values()) <= 1 + 3 * 2 * 2


def test_the_age_that_arrives_is_what_the_router_spent(parsed: Counter[int]) -> None:
    router = Router()
    shared = {"n": 2, "custom_params": {"kairos": WIRE}}
    body = {"text": ["a", "b"], "sampling_params": [shared, {"n": 2}], "ttft_ms": 9}
    request = router.accept(GENERATE, body, {})
    router.now_s += 0.25
    request.payload(router.now_s)
    router.now_s += 0.0001  # too little to write the body for
    passed = json.loads(request.payload(router.now_s))
    wires = [item["custom_params"]["kairos"] for item in passed["sampling_params"]]
    assert [wire["age_ms"] for wire in wires] == [257.0, 257.0, 252.0, 252.0]
    assert [wire["ttft_ms"] for wire in wires] == [700.0, 700.0, 9.0, 9.0]
    router.now_s += 1e9
    last = json.loads(request.payload(router.now_s))["sampling_params"]
    assert {item["custom_params"]["kairos"]["age_ms"] for item in last} == {3_600_000.0}


def test_each_distinct_slo_is_parsed_once_and_like_values_of_other_types_are_not_mixed_up(
    parsed: Counter[int],
) -> None:
    table = new_table()
    for age in (0.0, 3.0, 9.0):
        for ttft in (1, 2, 3):
            read = table.read({"ttft_ms": ttft, "age_ms": age})
            assert (read.slo.ttft_ms, read.age_ms) == (ttft, age)
    assert parsed[id(table)] == 3
    for bad in (True, "1", [1]):
        with pytest.raises(SloError, match=r"custom_params\.kairos\.ttft_ms"):
            table.read({"ttft_ms": bad})
    with pytest.raises(SloError, match=r"custom_params\.kairos\.age_ms"):
        table.read({"ttft_ms": 1, "age_ms": -1.0})
    with pytest.raises(SloError, match="must be an object"):
        table.read("chat")
    before = parsed[id(table)]
    for ttft in range(10, 10 + 2 * targets.MOST_KNOWN):
        table.read({"ttft_ms": ttft})
    assert parsed[id(table)] - before == 2 * targets.MOST_KNOWN
    assert len(table._known) <= targets.MOST_KNOWN


async def test_a_slow_body_makes_the_request_older() -> None:
    """The middleware adds the time that the body took to come, if that is worth a new body."""
    times = iter([1.0, 1.5])
    got: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got.append(orjson.loads((await receive())["body"]))

    async def receive() -> Any:
        body = {"prompt": "a", "custom_params": {"kairos": WIRE}}
        return {"type": "http.request", "body": orjson.dumps(body), "more_body": False}

    async def send(_: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "path": COMPLETIONS, "method": "POST", "headers": []}
    middleware = SloMiddleware(app, new_table(), clock=lambda: next(times))
    await middleware(scope, receive, send)
    assert got[0]["custom_params"]["kairos"] == {**WIRE, "age_ms": 505.0}


@pytest.mark.parametrize(
    ("name", "label"), [("chat", "chat"), ("made up", "other"), (None, "default")]
)
def test_classes_that_clients_make_up_are_one_to_the_router_and_travel_as_they_are(
    name: str | None, label: str
) -> None:
    router = Router()
    wire = {"ttft_ms": 500.0, **({} if name is None else {"class": name})}
    body = {"text": "hi", "sampling_params": {"custom_params": {"kairos": wire}}}
    request = router.accept(GENERATE, body, {})
    assert (request.slo.name, request.slo.ttft_ms) == (label, 500.0)
    sent = orjson.loads(request.payload(router.now_s))["sampling_params"]["custom_params"]["kairos"]
    assert sent.get("class") == name
