"""What a request of Dynamo's frontend says, and how it gets into SGLang's parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.slo.body import AGE_STEP_MS
from sglang_kairos.slo.dynamo import age_ms, custom_params, native_body
from sglang_kairos.slo.targets import Slo, SloError, SloTable

TABLE = SloTable(
    Slo(2000.0, 100.0), {"chat": Slo(500.0, 50.0, "chat", 2.0)}, priorities=((3, "chat"),)
)
MOST_AGE_MS = TABLE.age_rule.most_ms
NOW_MS = 1.8e12
HINT = "nvext.agent_hints.priority"


def wire(request: dict[str, Any], params: dict[str, Any] | None = None, **more: Any) -> Any:
    found = custom_params(request, params, TABLE, NOW_MS, **more)
    return None if found is None else found.get("kairos")


@pytest.mark.parametrize(
    ("router", "ttft_ms", "tpot_ms"),
    [
        ({"ttft_target": 700, "itl_target": 40.5}, 700.0, 40.5),
        ({"ttft_target": 700}, 700.0, 100.0),
        ({"itl_target": 40, "ttft_target": None}, 2000.0, 40.0),
    ],
)
def test_the_targets_of_the_frontend_are_ours(
    router: dict[str, Any], ttft_ms: float, tpot_ms: float
) -> None:
    found = wire({"router": router, "token_ids": [1, 2]})
    assert (found["ttft_ms"], found["tpot_ms"]) == (ttft_ms, tpot_ms)
    assert found["class"] == "default" and found["age_ms"] == 0.0


@pytest.mark.parametrize("priority", [3, 2**40])
def test_the_hint_of_the_frontend_has_a_class(priority: int) -> None:
    found = wire({"routing": {"priority": priority}})
    assert (found["class"], found["ttft_ms"], found["weight"]) == ("chat", 500.0, 2.0)
    found = wire({"routing": {"priority": priority}, "router": {"ttft_target": 700}})
    assert (found["class"], found["ttft_ms"], found["tpot_ms"]) == ("chat", 700.0, 50.0)
    body = native_body({"routing": {"priority": priority}}, {"text": "x"}, TABLE, NOW_MS)
    assert set(body) == {"text", "sampling_params"}
    hint = {"text": "x", "nvext": {"router": {"ttft_target": 700}}}
    body = native_body({"routing": {"priority": priority}}, hint, TABLE, NOW_MS)
    assert body["sampling_params"]["custom_params"]["kairos"]["ttft_ms"] == 700.0
    assert body["sampling_params"]["custom_params"]["kairos"]["class"] == "chat"
    low = SloTable(TABLE.default, TABLE.classes, priorities=((0, "chat"),))
    assert native_body({"routing": {"priority": 0}}, {"text": "x"}, low, NOW_MS) == {"text": "x"}
    body = native_body({"routing": {"priority": priority}}, {"text": "x"}, TABLE, NOW_MS)
    assert body["sampling_params"]["custom_params"]["kairos"]["class"] == "chat"


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"routing": {"priority": 2}},
        {"router": None},
        {"router": {}},
        {"router": "x"},
        {"routing": {"dp_rank": 0}},
    ],
)
def test_who_says_nothing_stays_as_it_is(request_: dict[str, Any]) -> None:
    assert custom_params(request_, None, TABLE, NOW_MS) is None
    theirs = {"thinking_budget": 5}
    assert custom_params(request_, theirs, TABLE, NOW_MS) == theirs
    payload = {"sampling_params": {"max_new_tokens": 3}}
    assert native_body(request_, payload, TABLE, NOW_MS) == payload


def test_what_dynamo_and_the_server_put_there_stays() -> None:
    request = {"router": {"ttft_target": 700}}
    theirs = {"thinking_budget": 5}
    found = custom_params(request, theirs, TABLE, NOW_MS, {"own": 1})
    assert found is not None and found["thinking_budget"] == 5 and "own" not in found
    found = custom_params(request, None, TABLE, NOW_MS, {"own": 1})
    assert found is not None and found["own"] == 1
    assert theirs == {"thinking_budget": 5}


@pytest.mark.parametrize(
    ("router", "field"),
    [
        ({"ttft_target": 0}, "nvext.router.ttft_target"),
        ({"ttft_target": 1e12}, "nvext.router.ttft_target"),
        ({"ttft_target": 700, "itl_target": float("nan")}, "nvext.router.itl_target"),
        ({"itl_target": "40"}, "nvext.router.itl_target"),
    ],
)
def test_a_bad_target_is_named_as_the_client_wrote_it(router: dict[str, Any], field: str) -> None:
    with pytest.raises(SloError, match="must be a number of milliseconds between") as caught:
        wire({"router": router})
    assert caught.value.field == field
    assert str(caught.value).count(":") == 1


def test_a_native_body_says_all_that_a_server_of_ours_reads() -> None:
    payload: dict[str, Any] = {"slo_class": "chat", "ttft_ms": 300, "sampling_params": {"n": 1}}
    before = copy.deepcopy(payload)
    body = native_body({"routing": {"priority": 3}}, payload, TABLE, NOW_MS)
    found = body["sampling_params"]["custom_params"]["kairos"]
    assert (found["ttft_ms"], found["tpot_ms"], found["class"]) == (300.0, 50.0, "chat")
    assert "slo_class" not in body and body["sampling_params"]["n"] == 1
    assert payload == before
    carried = {"custom_params": {"kairos": {"ttft_ms": 400}}}
    body = native_body({}, {"sampling_params": carried}, TABLE, NOW_MS)
    assert body["sampling_params"]["custom_params"]["kairos"] == {"ttft_ms": 400.0}
    with pytest.raises(SloError, match=r"^ttft_ms: must"):
        native_body({}, {"ttft_ms": 0}, TABLE, NOW_MS)


@pytest.mark.parametrize(
    ("since", "age"),
    [
        (NOW_MS - 500, 500.0),
        (NOW_MS - AGE_STEP_MS + 1, 0.0),
        (NOW_MS - MOST_AGE_MS - 1, 0.0),
        (NOW_MS + 500, 0.0),
        (None, 0.0),
        (True, 0.0),
        ("1", 0.0),
        (float("nan"), 0.0),
    ],
)
def test_a_request_is_as_old_as_the_frontend_says(since: Any, age: float) -> None:
    request = {"request_timestamp_ms": since}
    assert age_ms(request, NOW_MS, MOST_AGE_MS) == age
    assert wire(request) == ({"age_ms": age} if age else None)
    found = wire({**request, "router": {"ttft_target": 700}})
    assert found["age_ms"] == age and found["ttft_ms"] == 700.0


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)


@given(
    request=st.fixed_dictionaries(
        {},
        optional={
            "router": json_like
            | st.fixed_dictionaries(
                {}, optional={"ttft_target": json_like, "itl_target": json_like}
            ),
            "routing": json_like | st.fixed_dictionaries({"priority": json_like}),
            "request_timestamp_ms": json_like,
        },
    )
)
def test_whatever_comes_is_read_or_refused_by_name(request: dict[str, Any]) -> None:
    before = repr(request)
    found, field = None, ""
    try:
        found = wire(request)
    except SloError as error:
        field = error.field
    assert field in ("", "nvext.router.ttft_target", "nvext.router.itl_target", HINT)
    assert found is None or TABLE.read(found).age_ms <= MOST_AGE_MS
    assert repr(request) == before
