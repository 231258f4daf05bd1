"""Which of SGLang's endpoints the router has, what it says of the others, and web pages (CORS)."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_pd import CHAT, GENERATE, Fake, bench, streaming
from sglang_kairos.router.control.endpoints import (
    ANY,
    EACH,
    ENDPOINTS,
    EVERY,
    PAIR,
    REFUSED,
    WEBSOCKET,
)

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

ROOT = Path(__file__).parents[2]
TREES = sorted(ROOT.glob(".venv/sglang-*/sglang")) + sorted(
    ROOT.glob(".venv/lib/python3*/site-packages/sglang")
)
SERVED = ("http_server.py", "v1_loads.py", "elastic_ep.py")
ORIGIN = {"origin": "http://localhost:4200"}
HTTP = [one for one in ENDPOINTS if one.methods != WEBSOCKET]


def routes_of(source: str) -> set[tuple[str, str]]:
    """(method, path) of every route that a module's decorators declare."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for call in node.decorator_list:
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            kind, words = call.func.attr, {word.arg: word.value for word in call.keywords}
            if kind not in ("get", "post", "put", "delete", "patch", "api_route", "websocket"):
                continue
            path: Any = call.args[0]
            if isinstance(path, ast.Call):  # os.environ.get(NAME, DEFAULT)
                path = path.args[1]
            if not isinstance(path, ast.Constant):
                # Only there if somebody names it: SGLANG_OLLAMA_ROOT_ROUTE.
                assert ast.unparse(path) == "_ollama_root_route"
                continue
            methods = [kind.upper()]
            if kind == "api_route":
                methods = ast.literal_eval(words["methods"])
            found |= {(method, path.value) for method in methods}
    return found


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.parent.name)
def test_every_route_of_sglang_is_in_the_table_with_every_method(tree: Path) -> None:
    folder = tree / "srt" / "entrypoints"
    theirs = set().union(*(routes_of((folder / name).read_text()) for name in SERVED))
    assert len(theirs) > 80
    ours = {(method, one.path) for one in ENDPOINTS for method in one.methods}
    assert theirs - ours == set()
    # A router of SGLang's own that is new would hide its routes from this test.
    included = (folder / "http_server.py").read_text().count("app.include_router(")
    assert included == len(SERVED) - 1


def test_the_table_says_each_thing_once_and_gives_a_reason_for_each_refusal() -> None:
    pairs = [(method, one.path) for one in ENDPOINTS for method in one.methods]
    assert len(pairs) == len(set(pairs))
    assert all(bool(one.why) == (one.kind == REFUSED) for one in ENDPOINTS)
    assert len(TREES) >= 1


# What every endpoint takes, or does not mind.
BODY = {"text": "x", "rid": "x1"}


def concrete(path: str) -> str:
    return (
        path.replace("{model:path}", "org/m").replace("{response_id}", "r").replace("{method}", "m")
    )


async def test_every_endpoint_of_the_table_reaches_whom_it_should() -> None:
    reached: list[tuple[str, str, str]] = []

    def note(role: str) -> Any:
        async def answer(request: web.Request) -> web.Response:
            reached.append((role, request.method, request.path))
            return web.json_response({})

        return answer

    asked = {concrete(one.path) for one in HTTP if one.kind in (ANY, EACH, EVERY)} - {"/v1/loads"}
    prefill = Fake("prefill", routes=dict.fromkeys(asked, note("prefill")))
    decode = Fake("decode", routes=dict.fromkeys(asked, note("decode")))
    async with bench(prefill, decode) as b:
        for one in HTTP:
            path = concrete(one.path)
            for method in one.methods:
                reached.clear()
                # A trailing slash is no other endpoint.
                for spelt in (path, path + "/"):
                    async with b.client.request(method, spelt, json=BODY) as response:
                        text = await response.text()
                        status = response.status
                    assert (status == 404) == (one.kind == REFUSED), (method, spelt, text)
                    if one.kind == REFUSED:
                        assert one.why in text
                        assert (await response.json())["error"]["code"] == 404
                    else:
                        assert status == 200, (method, spelt, text)
                roles = sorted(role for role, *_ in reached)
                if path in asked:
                    both = ["decode", "decode", "prefill", "prefill"]
                    assert roles == (["prefill"] * 2 if one.kind == ANY else both), path
                    assert {(m, p) for _, m, p in reached} == {(method, path)}
                else:
                    assert roles == []
        served = [one for one in HTTP if one.kind == PAIR]
        assert len(b.d.bodies) == sum(2 * len(one.methods) for one in served)


async def test_unknown_paths_and_wrong_methods_are_answered_in_json() -> None:
    async with bench() as b:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1", 404),
            ("POST", "/", 405),
            ("GET", GENERATE, 405),
            ("DELETE", "/server_info", 405),
            ("GET", "/v1/embeddings", 405),
            ("PUT", "/admin/servers", 405),
        ):
            async with b.client.request(method, path) as response:
                assert response.status == status, path
                error = (await response.json())["error"]
                assert (error["code"], path in error["message"]) == (status, True)
                assert (status == 405) == ("allow" in response.headers)


@pytest.mark.parametrize("path", [GENERATE, CHAT, "/server_info", "/v1/models", "/v1/nothing"])
async def test_a_web_page_may_call_every_path_as_with_sglangs_own_server(path: str) -> None:
    async def open_to_all(_: web.Request) -> web.Response:
        return web.json_response({}, headers={"access-control-allow-origin": "*"})

    async with bench(decode=Fake("decode", open_to_all), client_api_key="sk") as b:
        asking = {
            **ORIGIN,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,authorization",
        }
        async with b.client.options(path, headers=asking) as response:
            assert response.status == 200
            allowed = response.headers["access-control-allow-headers"]
            assert "authorization" in allowed and "content-type" in allowed
            assert "POST" in response.headers["access-control-allow-methods"]
            assert response.headers["access-control-allow-origin"] == ORIGIN["origin"]
        async with b.client.get("/ready") as response:
            assert response.status == 200  # probes carry no key
        for key in ("sk", "wrong"):
            headers = {**ORIGIN, "authorization": f"Bearer {key}"}
            async with b.client.post(path, json={"text": "x"}, headers=headers) as response:
                assert (response.status == 401) == (key == "wrong")
                assert len(response.headers.getall("access-control-allow-origin")) == 1
                assert response.headers["access-control-allow-credentials"] == "true"


async def test_pages_that_are_not_named_are_not_let_in_even_if_the_servers_would() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await streaming(b"data: {}\n\n")(request)

    async def open_to_all(request: web.Request) -> web.Response:
        return web.json_response({}, headers={"access-control-allow-origin": "*"})

    for origins, let_in in (
        (("http://localhost:4200",), True),
        (("http://b",), False),
        ((), 0),
    ):
        async with bench(decode=Fake("decode", open_to_all), cors_origins=origins) as b:
            async with b.client.post(GENERATE, json={"text": "x"}, headers=ORIGIN) as response:
                assert response.status == 200
                found = response.headers.getall("access-control-allow-origin", [])
                assert found == ([ORIGIN["origin"]] if let_in else [])
            async with b.client.post(GENERATE, json=BODY) as response:
                assert "access-control-allow-origin" not in response.headers
                # Caches must not give it to a web page.
                assert response.headers.getall("vary", []) == (["Origin"] if origins else [])
