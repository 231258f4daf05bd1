"""Every way to say an SLO: which counts, what a body may not say, and what a header may."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.slo.request import SLO_HEADERS, request_slo
from sglang_kairos.slo.targets import LIMITS_MS, Slo, SloError, SloTable

DEFAULT = Slo(2000.0, 100.0)
CHAT = Slo(500.0, 50.0, "chat", 2.0)
BATCH = Slo(9000.0, 900.0, "batch", 0.5)
CLASSES = {"chat": CHAT, "batch": BATCH}
TABLE = SloTable(DEFAULT, CLASSES, ((0, "batch"), (10, "chat")))

# Who says it, from the top; the first that does counts. Dots lead into objects of the body.
TTFT = (
    *("ttft_ms", "slo.ttft_ms", "nvext.router.ttft_target"),
    *("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms", "x-dynamo-slo-ttft-ms", "x-dynamo-meta-slo-ttft-ms"),
)
TPOT = (
    *("tpot_ms", "slo.tpot_ms", "nvext.router.itl_target"),
    *("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
)
CLASS = ("slo_class", "slo.slo_class", "slo.class", "x-slo-class")
PRIORITY = ("priority", "nvext.agent_hints.priority")


def said(ways: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A body and headers in which each of these is said."""
    body: dict[str, Any] = {}
    headers: dict[str, str] = {}
    for way, value in ways.items():
        if way.startswith("x-"):
            headers[way] = str(value)
            continue
        *path, last = way.split(".")
        place = body
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return body, headers


@pytest.mark.parametrize("way", [*TTFT, *TPOT])
def test_each_way_says_its_target_alone(way: str) -> None:
    found = request_slo(*said({way: 77.0}), TABLE)
    assert found == (Slo(77.0, 100.0) if way in TTFT else Slo(2000.0, 77.0))


@pytest.mark.parametrize("way", [*CLASS, "slo"])
def test_each_way_says_its_class_alone(way: str) -> None:
    assert request_slo(*said({way: "chat"}), TABLE) == CHAT
    assert request_slo(*said({way: "default"}), TABLE) == DEFAULT


@pytest.mark.parametrize("way", PRIORITY)
@pytest.mark.parametrize(
    ("priority", "expected"), [(-1, None), (0, BATCH), (9, BATCH), (10, CHAT), (2**31, CHAT)]
)
def test_a_priority_says_a_class_where_the_configuration_does(
    way: str, priority: int, expected: Slo | None
) -> None:
    body, headers = said({way: priority})
    assert request_slo(body, headers, TABLE) == expected
    assert request_slo(body, headers, SloTable(DEFAULT, CLASSES)) is None


def test_it_is_sglangs_affair_what_a_priority_is_where_none_has_a_class() -> None:
    assert request_slo({"priority": "high"}, {}, SloTable(DEFAULT)) is None


targets = st.floats(1.0, 1e5)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys((*TTFT, *TPOT), targets)),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(CLASS, st.sampled_from(["chat", "batch", "default"]))
    ),
    st.fixed_dictionaries({}, optional=dict.fromkeys(PRIORITY, st.integers(-20, 20))),
)
def test_of_all_that_is_said_the_first_counts(
    numbers: dict[str, float], classes: dict[str, str], priorities: dict[str, int]
) -> None:
    found = request_slo(*said({**numbers, **classes, **priorities}), TABLE)
    base: Slo | None = next(
        (CLASSES.get(classes[way], DEFAULT) for way in CLASS if way in classes), None
    )
    if base is None:
        priority = next((priorities[way] for way in PRIORITY if way in priorities), -1)
        base = None if priority < 0 else BATCH if priority < 10 else CHAT
    ttft = next((numbers[way] for way in TTFT if way in numbers), None)
    tpot = next((numbers[way] for way in TPOT if way in numbers), None)
    if base is None and ttft is None and tpot is None:
        assert found is None
        return
    base = base or DEFAULT
    expected = (ttft or base.ttft_ms, tpot or base.tpot_ms, base.name, base.weight)
    assert found is not None
    assert (found.ttft_ms, found.tpot_ms, found.name, found.weight) == expected


@pytest.mark.parametrize("body", [{}, {"ttft_ms": None, "slo": None}, {"slo": {"ttft_ms": None}}])
def test_nulls_ask_for_nothing(body: dict[str, Any]) -> None:
    assert request_slo(body, {}, TABLE) is None
    assert request_slo({"nvext": {"router": None, "agent_hints": {}}}, {}, TABLE) is None


@pytest.mark.parametrize(
    ("body", "named", "text"),
    [
        ({"ttft_ms": -1}, "ttft_ms", "between 1 and 3600000, got -1"),
        ({"ttft_ms": 0}, "ttft_ms", "between 1"),
        ({"ttft_ms": 3_600_001}, "ttft_ms", "3600000"),
        ({"ttft_ms": "500"}, "ttft_ms", "'500'"),
        ({"ttft_ms": True}, "ttft_ms", "number of milliseconds"),
        ({"ttft_ms": math.nan}, "ttft_ms", "got nan"),
        ({"ttft_ms": 10**400}, "ttft_ms", "too large"),
        ({"ttft_ms": [[1]]}, "ttft_ms", "a list"),
        ({"tpot_ms": 0.01}, "tpot_ms", "between 0.1 and 600000"),
        ({"slo": 5}, "slo", "class name or an object"),
        ({"slo": {"ttft": 5}}, "slo", "unknown key 'ttft'"),
        ({"slo": {"tpot_ms": 0}}, "slo.tpot_ms", "between 0.1 and 600000"),
        ({"slo": "gold"}, "slo", "known: batch, chat, default"),
        ({"slo_class": "gold"}, "slo_class", "known: batch, chat, default"),
        ({"slo_class": 5}, "slo_class", "name of an SLO class"),
        ({"slo_class": "x" * 9999}, "slo_class", "..."),
        ({"nvext": 5}, "nvext", "must be an object"),
        ({"nvext": {"router": [5]}}, "nvext.router", "must be an object"),
        ({"nvext": {"router": {"ttft_target": 0}}}, "nvext.router.ttft_target", "between 1 and"),
        ({"nvext": {"router": {"itl_target": "x"}}}, "nvext.router.itl_target", "between 0.1 and"),
        ({"nvext": {"agent_hints": {"priority": 1.5}}}, "nvext.agent_hints.priority", "whole"),
        ({"priority": True}, "priority", "whole number between"),
        ({"priority": 2**63}, "priority", "whole number between"),
    ],
)
def test_a_refusal_names_the_field_and_the_range(
    body: dict[str, Any], named: str, text: str
) -> None:
    with pytest.raises(SloError) as caught:
        request_slo(body, {}, TABLE)
    assert caught.value.field == named
    assert text in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("headers", "ttft_ms", "notes"),
    [
        ({"x-slo-ttft-ms": "86400000"}, 3_600_000.0, ["x-slo-ttft-ms clamped"]),
        ({"x-llm-d-slo-ttft-ms": "0"}, 1.0, ["x-llm-d-slo-ttft-ms clamped"]),
        ({"x-slo-ttft-ms": "-5"}, 1.0, ["x-slo-ttft-ms clamped"]),
        ({"x-slo-ttft-ms": "1e400"}, 3_600_000.0, ["x-slo-ttft-ms clamped"]),
        ({"x-slo-ttft-ms": "default"}, None, ["x-slo-ttft-ms ignored"]),
        ({"x-slo-ttft-ms": ""}, None, ["x-slo-ttft-ms ignored"]),
        ({"x-slo-ttft-ms": "soon"}, None, ["x-slo-ttft-ms ignored"]),
        ({"x-slo-ttft-ms": "nan"}, None, ["x-slo-ttft-ms ignored"]),
        ({"x-slo-ttft-ms": "800"}, 800.0, []),
        (
            {"x-slo-ttft-ms": "default", "x-dynamo-slo-ttft-ms": "700"},
            700.0,
            ["x-slo-ttft-ms ignored"],
        ),
        ({"x-slo-class": ""}, None, ["x-slo-class ignored"]),
        ({"x-slo-class": "gold"}, None, ["x-slo-class ignored"]),
        ({"x-slo-class": "chat"}, 500.0, []),
    ],
)
def test_what_infrastructure_puts_into_headers_is_clamped_or_ignored_and_noted(
    headers: dict[str, str], ttft_ms: float | None, notes: list[str]
) -> None:
    noted: list[str] = []
    asked = request_slo({}, headers, TABLE, noted)
    assert (None if asked is None else asked.ttft_ms) == ttft_ms
    assert noted == notes


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80)
keys = st.sampled_from(
    "ttft_ms tpot_ms slo slo_class class nvext router agent_hints ttft_target priority".split()
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


@given(
    st.dictionaries(keys, anything, max_size=5),
    st.dictionaries(st.sampled_from(sorted(SLO_HEADERS)), st.text(max_size=80)),
)
def test_a_body_is_used_or_refused_and_headers_never_refuse(
    body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert request_slo({}, headers, TABLE, []) is None or headers
    try:
        found = request_slo(body, headers, TABLE)
    except SloError as error:
        with pytest.raises(SloError, match="^" + error.field):
            request_slo(body, {}, TABLE)
        return
    if found is not None:
        assert LIMITS_MS["ttft_ms"][0] <= found.ttft_ms <= LIMITS_MS["ttft_ms"][1]
        assert LIMITS_MS["tpot_ms"][0] <= found.tpot_ms <= LIMITS_MS["tpot_ms"][1]
