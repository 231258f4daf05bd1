"""What is refused before any server sees it, and what is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.engine.hooks.http import facts_of
from sglang_kairos.engine.hooks.slo_middleware import ServerFacts, SloMiddleware
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.server_info import request_limits
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.body import TooManySamples, unfold_samples, written_once
from sglang_kairos.slo.body import CHAT, COMPLETIONS, GENERATE, dump
from sglang_kairos.slo.limits import RequestError, RequestLimits, check_request
from sglang_kairos.slo.targets import Slo, SloTable

pytestmark = pytest.mark.anyio

LIMITS = RequestLimits(
    vocabulary=1000, context_tokens=400, kv_tokens=256, reserved_tokens=100, page_tokens=16
)
TABLE = SloTable(Slo(2000.0, 100.0))


def sampled(**params: Any) -> dict[str, Any]:
    return {"text": "a", "sampling_params": params}


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (GENERATE, {"text": ""}, "text", "empty"),
    (GENERATE, {"text": []}, "text", "empty"),
    (GENERATE, {"text": ["a", ""]}, "text[1]", "empty"),
    (GENERATE, {"text": 5}, "text", "a text or a list"),
    (GENERATE, {"input_ids": []}, "input_ids", "empty"),
    (GENERATE, {"input_ids": [[1], []]}, "input_ids[1]", "empty"),
    (GENERATE, {"input_ids": [[1], "a"]}, "input_ids[1]", "all prompts"),
    (GENERATE, {"input_ids": [1, 1000]}, "input_ids[1]", "between 0 and 999, got 1000"),
    (GENERATE, {"input_ids": [-1, 1]}, "input_ids[0]", "between 0 and 999, got -1"),
    (GENERATE, {"input_ids": [1, 2.0]}, "input_ids[1]", "a fraction"),
    (GENERATE, {"input_ids": [1, True]}, "input_ids[1]", "true or false"),
    (GENERATE, {"input_ids": [1, None]}, "input_ids[1]", "null"),
    (GENERATE, {"input_ids": [1, [2]]}, "input_ids[1]", "a list"),
    (GENERATE, {"input_ids": [[1, 2], [3, 5000]]}, "input_ids[1][1]", "between 0 and 999"),
    (GENERATE, {"input_ids": [1] * 145}, "input_ids", "at most 144 tokens"),
    (GENERATE, {"text": "a", "top_logprobs_num": -1}, "top_logprobs_num", "0 and 128, got -1"),
    (GENERATE, {"text": "a", "top_logprobs_num": 129}, "top_logprobs_num", "0 and 128"),
    (GENERATE, {"text": "a", "top_logprobs_num": 1.5}, "top_logprobs_num", "a fraction"),
    (
        GENERATE,
        {"text": ["a", "b"], "top_logprobs_num": [1, -1]},
        "top_logprobs_num[1]",
        "0 and 128",
    ),
    (GENERATE, {"text": "a", "logprob_start_len": -2}, "logprob_start_len", "-1 and"),
    (GENERATE, {"text": "a", "token_ids_logprob": [1000]}, "token_ids_logprob", "0 and 999"),
    (GENERATE, sampled(n=0), "sampling_params.n", "1 and 10000"),
    (GENERATE, sampled(n="2"), "sampling_params.n", "a text"),
    (GENERATE, sampled(n=2.0), "sampling_params.n", "a fraction"),
    (GENERATE, sampled(n=10**5), "sampling_params.n", "1 and 10000"),
    (GENERATE, sampled(n=None), "sampling_params.n", "null"),
    (GENERATE, {"text": ["a"], "sampling_params": []}, "sampling_params", "empty list"),
    (
        GENERATE,
        {"text": ["a", "b"], "sampling_params": [{"n": 2}, {}]},
        "sampling_params",
        "the same",
    ),
    (GENERATE, {"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params", "2 prompts"),
    (GENERATE, {"text": ["a", "b"], "rid": ["x"]}, "rid", "2 prompts, got 1"),
    (GENERATE, {"text": ["a", "b"], "rid": ["x", "x"]}, "rid", "of their own"),
    (GENERATE, {"text": "a", "rid": ["x"]}, "rid", "single prompt"),
    (GENERATE, {"text": "a", "rid": ""}, "rid", "empty"),
    (GENERATE, {"text": "a", "rid": 7}, "rid", "a text"),
    (
        GENERATE,
        sampled(min_new_tokens=3, stop_token_ids=[1000]),
        "sampling_params.stop_token_ids[0]",
        "0 and 999",
    ),
    (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [""]}, "prompt[0]", "empty"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]", "empty"),
    (COMPLETIONS, {"prompt": [1000]}, "prompt[0]", "0 and 999"),
    (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs", "0 and 128"),
    (COMPLETIONS, {"prompt": "a", "n": "3"}, "n", "a text"),
    (COMPLETIONS, {"prompt": "a", "rid": ""}, "rid", "empty"),
    (CHAT, {"messages": [{}], "n": 1.0}, "n", "a fraction"),
    (CHAT, {"messages": [{}], "top_logprobs": 129}, "top_logprobs", "0 and 128"),
    (CHAT, {"messages": [{}], "top_logprobs": -3}, "top_logprobs", "got -3"),
]


@pytest.mark.parametrize(("path", "body", "field", "text"), REFUSED)
def test_what_would_harm_a_scheduler_is_refused_with_field_and_limit(
    path: str, body: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(body, path, LIMITS)
    assert caught.value.field == field
    assert text in str(caught.value)


PASSED: list[tuple[str, dict[str, Any]]] = [
    (GENERATE, {}),
    (GENERATE, {"text": "a"}),
    (GENERATE, {"text": ["a", "b"], "sampling_params": {"n": 2}, "top_logprobs_num": 5}),
    (GENERATE, {"text": "", "image_data": "x"}),
    (GENERATE, {"input_ids": [0, 999]}),
    (GENERATE, {"input_ids": [1] * 144}),
    (GENERATE, {"input_ids": [], "session_params": {"id": "s"}}),
    (GENERATE, {"input_ids": [[1], [2]], "rid": ["x", "y"], "logprob_start_len": [-1, 0]}),
    (GENERATE, {"text": "a", "sampling_params": 5}),
    (GENERATE, sampled(stop_token_ids=[1000])),
    (COMPLETIONS, {"prompt": [1, 2], "logprobs": 5, "n": 3}),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}),
    (CHAT, {"messages": [], "top_logprobs": 20, "logprobs": True, "n": None}),
]


@pytest.mark.parametrize(("path", "body"), PASSED)
def test_what_sglang_serves_or_refuses_itself_passes(path: str, body: dict[str, Any]) -> None:
    check_request(body, path, LIMITS)


def test_without_known_limits_only_what_no_server_takes_is_refused() -> None:
    check_request({"input_ids": [10**6] * 10**5}, GENERATE)
    with pytest.raises(RequestError):
        check_request({"input_ids": [2**31]}, GENERATE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
fields = st.sampled_from(
    "text input_ids prompt messages rid n sampling_params top_logprobs_num logprobs "
    "logprob_start_len token_ids_logprob top_logprobs stop_token_ids min_new_tokens".split()
)


@given(
    st.dictionaries(fields, json_values | st.dictionaries(fields, json_values), max_size=5),
    st.sampled_from([GENERATE, COMPLETIONS, CHAT]),
)
def test_any_body_is_passed_or_refused_with_a_field_that_it_has(
    body: dict[str, Any], path: str
) -> None:
    refusal: RequestError | None = None
    try:
        check_request(body, path, LIMITS)
    except RequestError as error:
        refusal = error
    if refusal is not None:
        assert refusal.field.split("[")[0].split(".")[0] in body
        assert len(str(refusal)) < 300


@given(st.integers(1, 64), st.integers(0, 500), st.integers(1, 4000), st.integers(1, 4000))
def test_the_longest_prompt_is_what_decode_can_reserve(
    page: int, reserved: int, kv: int, tokens: int
) -> None:
    limits = RequestLimits(kv_tokens=kv, reserved_tokens=reserved, page_tokens=page)
    pages = -(-tokens // page)
    longest = limits.longest_prompt
    assert longest is not None
    assert (tokens <= longest) == (pages * page + reserved <= kv)


def server(**facts: Any) -> Any:
    """The middleware of a server in front of an app that says 200."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    return SloMiddleware(app, TABLE, ServerFacts(**facts))


async def post(app: Any, path: str, body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(path, content=content)


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_who_comes_straight_to_a_server_is_checked_alike(path: str) -> None:
    refused = await post(server(), path, {"text": "a", "prompt": "a", "rid": ""})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "rid"
    assert (path == GENERATE) != ("object" in refused.json())


async def test_what_only_pythons_reader_takes_for_json_is_checked_as_well() -> None:
    assert (await post(server(), GENERATE, b'{"text": "", "note": NaN}')).status_code == 400
    assert (await post(server(), GENERATE, b'{"text": "a", "note": NaN}')).status_code == 200
    assert (await post(server(), GENERATE, b'{"text": ')).status_code == 200, (
        "SGLang says what is wrong with it"
    )


async def test_a_decode_server_wants_the_address_of_prefill() -> None:
    app = server(needs_bootstrap=True)
    refused = await post(app, GENERATE, {"text": "a", "bootstrap_room": 1, "bootstrap_host": None})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "bootstrap_host")
    body = {"text": ["a", "b"], "bootstrap_room": [1, 2], "bootstrap_host": ["h", "h"]}
    assert (await post(app, GENERATE, body)).status_code == 200


def facts(role: str, **more: Any) -> ServerFacts:
    args = {"disaggregation_mode": role, "num_reserved_decode_tokens": 512, "page_size": 16}
    args |= {"disaggregation_transfer_backend": "mooncake", **more}
    model = SimpleNamespace(vocab_size=1000)
    preferred = {"custom_params": {"ban": 7}, "top_k": 3}
    tokenizer = SimpleNamespace(
        model_config=model, context_len=4096, preferred_sampling_params=preferred
    )
    infos = [{"max_total_num_tokens": 2048}]
    return facts_of(SimpleNamespace(**args), tokenizer, infos)


def test_a_server_tells_its_middleware_what_it_can_hold() -> None:
    decode = facts("decode")
    assert decode.limits.longest_prompt == 1536
    assert decode.limits.samples == 1 and decode.needs_bootstrap
    assert decode.preferred == {"ban": 7}
    assert facts("prefill").limits.longest_prompt == 4095
    assert facts("null").limits.samples > 1
    assert facts("decode", allow_auto_truncate=True).limits.longest_prompt is None
    assert facts("decode", enable_pd_role_switch=True).limits.longest_prompt == 4095


def test_an_sglang_that_cannot_compute_them_is_not_asked_for_chosen_ids() -> None:
    old = RequestLimits(token_ids_logprob=False)
    for value in ([7], [[7], [8]]):
        asked = {"text": ["a", "b"], "return_logprob": True, "token_ids_logprob": value}
        check_request(asked, GENERATE, RequestLimits())
        with pytest.raises(RequestError, match=r"token_ids_logprob: .*before v0\.5\.21"):
            check_request(asked, GENERATE, old)
    check_request({"text": "a", "token_ids_logprob": None}, GENERATE, old)


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_that_sglang_is_told_by_what_its_results_can_do(version: str) -> None:
    file = sglang_folder(version) / "sglang/srt/layers/logits_processor.py"
    assert ("def finalize_input_logprobs(" in file.read_text("utf-8")) == (version >= "0.5.21")


def info(**more: Any) -> dict[str, Any]:
    kairos = {"vocabulary": 1000, "context_tokens": 4096}
    return {
        "disaggregation_mode": "decode",
        "max_total_num_tokens": 2048,
        "num_reserved_decode_tokens": 512,
        "page_size": 1,
        "internal_states": [{"kairos": kairos}],
        **more,
    }


def test_the_router_learns_the_limits_from_server_info() -> None:
    assert request_limits(info()).longest_prompt == 1536
    assert request_limits(info()).vocabulary == 1000
    assert request_limits(info(allow_auto_truncate=True)).longest_prompt is None
    assert request_limits({"internal_states": 5, "page_size": "x"}) == RequestLimits()


def test_a_prompt_is_refused_only_when_no_decode_server_holds_it_and_goes_to_one_that_does() -> (
    None
):
    fleet = Fleet(RouterOptions(prefills=(("http://p", 1),), decodes=("http://a", "http://b")))
    small, large = fleet.decodes
    small.learn(info())
    fleet.learn_limits()
    assert fleet.limits.longest_prompt is None, "the other one has not told yet"
    large.learn(info(max_total_num_tokens=3000))
    fleet.learn_limits()
    assert fleet.limits.longest_prompt == 2488
    from sglang_kairos.policy.placement import PlacedRequest

    for tokens in (2000, 2400):
        for _ in range(8):
            placed = fleet.reserve(PlacedRequest(tokens=tokens, deadline_s=1e9))
            assert placed is not None and placed.decode is large


def test_samples_are_bounded_before_they_are_made() -> None:
    body = {"text": "x" * 100_000, "sampling_params": {"n": 2000}}
    with pytest.raises(TooManySamples, match="n: 2000 samples"):
        unfold_samples(body, GENERATE, 100_000)
    assert body["text"] == "x" * 100_000


def test_samples_refer_to_one_prompt_and_are_written_as_copies() -> None:
    body: dict[str, Any] = {"text": ["x" * 100, "y"], "sampling_params": {"n": 3}}
    key = unfold_samples(body, GENERATE, 200)
    assert key == "text"
    assert len({id(one) for one in body["text"]}) == 2
    written_once(body, key)
    assert len({id(one) for one in body["text"]}) == 2
    assert orjson.loads(dump(body))["text"] == ["x" * 100] * 3 + ["y"] * 3
