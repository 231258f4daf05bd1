"""How old a request is by what the gateways before us say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.slo.age import AGE_HEADERS, START_HEADERS, TRACE_HEADER, AgeRule

NOW_S = 1_764_300_000.25
RULE = AgeRule(AGE_HEADERS, 30_000.0)


def age_of(rule: AgeRule = RULE, now_s: float = NOW_S, **headers: str) -> tuple[float, list[str]]:
    """The age in whole milliseconds and the notes; `x_request_start` names the header."""
    notes: list[str] = []
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return round(rule.age_ms(named, now_s, notes)), notes


@pytest.mark.parametrize(
    ("text", "age_ms"),
    [
        ("t=1764299998.250", 2000),  # nginx
        ("1764299998.25", 2000),
        ("t=1764299998", 2250),
        ("1764299998250", 2000),  # Heroku
        ("t=1764299998250", 2000),
        ("t=1764299998250000", 2000),  # Apache
        ("t=1764299998250000000", 2000),
        (" t= 1764299998.250 ", 2000),
        ("t=1764299999.250, t=1764299997.250, nonsense", 3000),  # gateways in a row
        ("t=1764300000.900", 0),  # a clock that is a little ahead
        ("t=1764299970.250", 30_000),
    ],
)
def test_a_start_is_read_in_every_form_of_the_field(text: str, age_ms: int) -> None:
    assert age_of(x_request_start=text) == (age_ms, [])
    assert age_of(x_queue_start=text) == (age_ms, [])


@pytest.mark.parametrize(
    "text",
    ["", "t=", "soon", "nan", "inf", "-5", "0", "t=1e30", "t=1764299970.249", "t=1764300001.5"],
)
def test_a_start_that_cannot_be_is_no_age_and_noted(text: str) -> None:
    assert age_of(x_request_start=text) == (0, ["x-request-start ignored"])


def test_the_earliest_gateway_counts() -> None:
    both = {"x_request_start": "t=1764299999.250", "x_queue_start": "t=1764299996.250"}
    assert age_of(**both) == (4000, [])


def test_nobody_looks_where_the_rule_does_not() -> None:
    assert age_of(AgeRule(), x_request_start="t=1764299999.250") == (0, [])
    assert age_of(AgeRule(START_HEADERS), traceparent=trace(f"{1764299990:08x}" + "a" * 24)) == (
        0,
        [],
    )


def trace(trace_id: str) -> str:
    return f"00-{trace_id}-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("trace_id", "age_ms"),
    [
        # X-Ray's manner: a second, of which the end is taken.
        (f"{1764299990:08x}" + "a" * 24, 9250),
        (f"{1764300000:08x}" + "a" * 24, 0),
        (f"{1764299000:08x}" + "a" * 24, 0),
        # UUID of version 7: milliseconds.
        (f"{1764299998250:012x}7abc8" + "0" * 15, 2000),
        (f"{1764299998250:012x}7abcc" + "0" * 15, 0),  # another variant
        (f"{1764299998250:012x}4abc8" + "0" * 15, 0),  # another version
        ("4bf92f3577b34da6a3ce929d0e0e4736", 0),  # the one of W3C's text: random
        ("not a trace", 0),
    ],
)
def test_a_trace_has_an_age_only_where_its_id_begins_with_a_late_time(
    trace_id: str, age_ms: int
) -> None:
    assert age_of(traceparent=trace(trace_id)) == (age_ms, [])


@given(st.integers(0, 2**128 - 1))
def test_random_trace_ids_have_no_age(number: int) -> None:
    window = range(int(NOW_S) - 32, int(NOW_S) + 3)
    if number >> 96 in window or (number >> 80) // 1000 in window:
        return
    assert age_of(traceparent=trace(f"{number:032x}")) == (0, [])


@given(st.dictionaries(st.sampled_from(AGE_HEADERS), st.text(max_size=60)), st.floats(0, 4e9))
def test_an_age_lies_between_nothing_and_the_most(headers: dict[str, str], now_s: float) -> None:
    notes: list[str] = []
    assert 0.0 <= RULE.age_ms(headers, now_s, notes) <= RULE.most_ms
    assert {note.split()[0] for note in notes} <= set(headers) - {TRACE_HEADER}
