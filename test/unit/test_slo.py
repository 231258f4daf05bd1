"""SLOs: what is accepted, what travels, and that a refusal is always an SloError."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.slo.targets import (
    LIMITS_MS,
    RequestSlo,
    Slo,
    SloError,
    SloTable,
    check_ms,
    from_wire,
    parse_classes,
    parse_priorities,
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


def test_a_number_in_a_refusal_reads_as_it_was_written() -> None:
    with pytest.raises(SloError, match=r"between 1 and 3600000, got 3600001$"):
        check_ms("ttft_ms", 3_600_001)


def test_a_class_that_nobody_knows_is_carried_if_its_name_is_short() -> None:
    table = SloTable(Slo(1000.0, 50.0), {"x" * 100: Slo(1.0, 1.0, "x" * 100)})
    assert table.read({"class": "y" * 64}).slo.name == "y" * 64
    assert table.read({"class": "x" * 100}).slo.ttft_ms == 1.0
    with pytest.raises(SloError, match=r"custom_params.kairos.class: must have at most 64 char"):
        table.read({"class": "y" * 65})


@pytest.mark.parametrize(
    ("priority", "name"),
    [(-1, None), (0, "default"), (9, "default"), (10, "chat"), (10**9, "chat")],
)
def test_a_priority_has_the_class_of_the_last_step_it_has_reached(
    priority: int, name: str | None
) -> None:
    steps = parse_priorities({"10": "chat", "0": "default"}, TABLE)
    found = SloTable(DEFAULT, TABLE.classes, steps).of_priority(priority)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ([], "object of priority -> class"),
        ({"high": "chat"}, "priority 'high' must be a whole number"),
        ({"1.5": "chat"}, "priority '1.5' must be a whole number"),
        ({"1": "gold"}, r"priority_classes.1: unknown class 'gold'; known: chat, default"),
        ({"1": 5}, r"priority_classes.1: must be the name"),
        ({"1": "chat", "01": "chat"}, "priority 1 is listed twice"),
    ],
)
def test_unusable_priorities_are_refused(raw: Any, text: str) -> None:
    with pytest.raises(SloError, match=text):
        parse_priorities(raw, TABLE)
