"""SLOs: what is accepted, what wins over what, and that a refusal is always an SloError."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.slo import (
    LIMITS_MS,
    RequestSlo,
    Slo,
    SloError,
    SloTable,
    check_ms,
    from_wire,
    parse_classes,
    request_slo,
    to_wire,
)

DEFAULT = Slo(2000.0, 100.0)
CHAT = Slo(500.0, 50.0, "chat", 2.0)
TABLE = SloTable(DEFAULT, {"chat": CHAT})

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
names = st.sampled_from(["ttft_ms", "tpot_ms", "slo", "slo_class", "class", "weight", "age_ms"])
bodies = st.dictionaries(names | st.text(max_size=5), anything, max_size=5)
headers = st.dictionaries(
    st.sampled_from(["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-class", "x-dynamo-slo-ttft-ms"]),
    st.text(max_size=80),
)


@pytest.mark.parametrize(
    ("name", "body", "sent", "expected"),
    [
        ("nothing asked", {}, {}, None),
        ("nulls ask for nothing", {"ttft_ms": None, "slo": None}, {}, None),
        ("nulls in the object neither", {"slo": {"ttft_ms": None}}, {}, None),
        ("a number", {"ttft_ms": 300}, {}, Slo(300, 100)),
        ("the default fills the rest", {"tpot_ms": 30.5}, {}, Slo(2000, 30.5)),
        ("a class", {"slo_class": "chat"}, {}, CHAT),
        ("a class by short name", {"slo": "chat"}, {}, CHAT),
        ("default is a class", {"slo": "default"}, {}, DEFAULT),
        ("an object", {"slo": {"ttft_ms": 1, "tpot_ms": 2}}, {}, Slo(1, 2)),
        ("an object naming a class", {"slo": {"class": "chat"}}, {}, CHAT),
        ("top level beats object", {"slo": {"ttft_ms": 1}, "ttft_ms": 9}, {}, Slo(9, 100)),
        ("number beats class", {"slo": "chat", "ttft_ms": 9}, {}, Slo(9, 50, "chat", 2)),
        ("a header", {}, {"x-slo-ttft-ms": "40"}, Slo(40, 100)),
        ("another's header", {}, {"x-dynamo-slo-ttft-ms": "40"}, Slo(40, 100)),
        ("ours first", {}, {"x-slo-ttft-ms": "4", "x-dynamo-slo-ttft-ms": "5"}, Slo(4, 100)),
        ("body beats header", {"ttft_ms": 9}, {"x-slo-ttft-ms": "40"}, Slo(9, 100)),
        ("body class beats header's", {"slo": "default"}, {"x-slo-class": "chat"}, DEFAULT),
        ("header class", {}, {"x-slo-class": "chat", "x-slo-tpot-ms": "7"}, Slo(500, 7, "chat", 2)),
    ],
)
def test_precedence(
    name: str, body: dict[str, Any], sent: dict[str, str], expected: Slo | None
) -> None:
    assert request_slo(body, sent, TABLE) == expected, name


@pytest.mark.parametrize(
    ("body", "sent", "named", "text"),
    [
        ({"ttft_ms": -1}, {}, "ttft_ms", "between 1 and 3600000, got -1"),
        ({"ttft_ms": 0}, {}, "ttft_ms", "between 1"),
        ({"ttft_ms": 3_600_001}, {}, "ttft_ms", "3600000"),
        ({"ttft_ms": "500"}, {}, "ttft_ms", "'500'"),
        ({"ttft_ms": True}, {}, "ttft_ms", "number of milliseconds"),
        ({"ttft_ms": math.nan}, {}, "ttft_ms", "got nan"),
        ({"ttft_ms": 10**400}, {}, "ttft_ms", "too large"),
        ({"ttft_ms": [[1]]}, {}, "ttft_ms", "a list"),
        ({"tpot_ms": 0.01}, {}, "tpot_ms", "between 0.1 and 600000"),
        ({"slo": 5}, {}, "slo", "class name or an object"),
        ({"slo": {"ttft": 5}}, {}, "slo", "unknown key 'ttft'"),
        ({"slo_class": "gold"}, {}, "slo_class", "known: chat, default"),
        ({"slo_class": 5}, {}, "slo_class", "name of an SLO class"),
        ({"slo_class": "x" * 9999}, {}, "slo_class", "..."),
        ({}, {"x-slo-class": "gold"}, "x-slo-class", "unknown class"),
    ],
)
def test_a_refusal_names_the_field_and_the_range(
    body: dict[str, Any], sent: dict[str, str], named: str, text: str
) -> None:
    with pytest.raises(SloError) as caught:
        request_slo(body, sent, TABLE)
    assert caught.value.field == named
    assert text in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.sampled_from(sorted(LIMITS_MS)), anything)
def test_check_ms_accepts_a_number_in_range_or_raises_slo_error(key: str, value: Any) -> None:
    low, high = LIMITS_MS[key]
    named = ""
    try:
        found = check_ms(key, value)
    except SloError as error:
        found, named = low, error.field
    assert low <= found <= high
    assert named in ("", key)


def test_a_value_too_deep_to_print_is_refused_like_any_other() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(SloError):
        check_ms("ttft_ms", deep)


@given(bodies, headers)
def test_request_slo_raises_nothing_but_slo_error(
    body: dict[str, Any], sent: dict[str, str]
) -> None:
    try:
        found = request_slo(body, sent, TABLE)
    except SloError:
        return
    if found is not None:
        assert LIMITS_MS["ttft_ms"][0] <= found.ttft_ms <= LIMITS_MS["ttft_ms"][1]
        assert LIMITS_MS["tpot_ms"][0] <= found.tpot_ms <= LIMITS_MS["tpot_ms"][1]


@given(anything | bodies)
def test_from_wire_raises_nothing_but_slo_error(wire: Any) -> None:
    named = "custom_params.kairos"
    try:
        found = from_wire(wire, TABLE)
    except SloError as error:
        found, named = RequestSlo(DEFAULT), error.field
    assert named.startswith("custom_params.kairos")
    assert found.age_ms >= 0
    assert 0.001 <= found.slo.weight <= 1000


slos = st.builds(
    Slo,
    ttft_ms=st.floats(*LIMITS_MS["ttft_ms"]),
    tpot_ms=st.floats(*LIMITS_MS["tpot_ms"]),
    name=st.text(max_size=9),
    weight=st.floats(0.001, 1000),
)


@given(slos, st.floats(0, 3_600_000))
def test_the_wire_brings_back_what_was_put_on_it(slo: Slo, age: float) -> None:
    back = from_wire(to_wire(slo, age), TABLE)
    assert back.slo.ttft_ms == slo.ttft_ms
    assert back.slo.tpot_ms == slo.tpot_ms
    assert back.slo.weight == slo.weight
    assert back.slo.name == (slo.name or "default")
    assert back.age_ms == pytest.approx(age, abs=1e-3)


def test_an_empty_wire_is_the_default() -> None:
    assert from_wire(None, TABLE) == from_wire({}, TABLE) == RequestSlo(DEFAULT)
    assert from_wire({"class": "chat", "age_ms": 5}, TABLE) == RequestSlo(CHAT, 5.0)


@pytest.mark.parametrize("weight", [0, -1, 1001, math.nan, True, "2", 10**400])
def test_a_weight_out_of_range_is_refused(weight: Any) -> None:
    with pytest.raises(SloError, match=r"weight.*between 0\.001 and 1000"):
        from_wire({"weight": weight}, TABLE)
    with pytest.raises(SloError, match=r"slo_classes\.a\.weight"):
        parse_classes({"a": {"weight": weight}}, DEFAULT)


def test_classes_take_what_they_omit_from_the_default() -> None:
    found = parse_classes({"a": {"ttft_ms": 5}, "b": {"tpot_ms": 9, "weight": 3}}, DEFAULT)
    assert found == {"a": Slo(5, 100, "a"), "b": Slo(2000, 9, "b", 3)}


@pytest.mark.parametrize("raw", [[], 5, {"a": 5}, {"a": {"ttft": 5}}, {"a": {"ttft_ms": 0}}])
def test_unusable_classes_are_refused(raw: Any) -> None:
    with pytest.raises(SloError, match="slo_classes"):
        parse_classes(raw, DEFAULT)


@pytest.mark.parametrize(
    ("headers", "ttft_ms", "notes"),
    [
        ({"x-slo-ttft-ms": "86400000"}, 3_600_000.0, ["x-slo-ttft-ms clamped"]),
        ({"x-slo-ttft-ms": "0"}, 1.0, ["x-slo-ttft-ms clamped"]),
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
    ],
)
def test_what_infrastructure_puts_into_headers_is_clamped_or_ignored_and_noted(
    headers: dict[str, str], ttft_ms: float | None, notes: list[str]
) -> None:
    noted: list[str] = []
    asked = request_slo({}, headers, TABLE, noted)
    assert (None if asked is None else asked.ttft_ms) == ttft_ms
    assert noted == notes


def test_a_number_in_a_refusal_reads_as_it_was_written() -> None:
    with pytest.raises(SloError, match=r"between 1 and 3600000, got 3600001$"):
        check_ms("ttft_ms", 3_600_001)


def test_a_class_that_nobody_knows_is_carried_if_its_name_is_short() -> None:
    table = SloTable(Slo(1000.0, 50.0), {"x" * 100: Slo(1.0, 1.0, "x" * 100)})
    assert table.read({"class": "y" * 64}).slo.name == "y" * 64
    assert table.read({"class": "x" * 100}).slo.ttft_ms == 1.0
    with pytest.raises(SloError, match=r"custom_params.kairos.class: must have at most 64 char"):
        table.read({"class": "y" * 65})
