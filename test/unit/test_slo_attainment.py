"""What the server counts of the promises it kept: pure tables and properties."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.loads.replay import Outcome, measure
from sglang_kairos.slo.attainment import (
    ABORTED,
    FAILED,
    MANY_STEPS,
    OUTCOMES,
    SERVED,
    Attainment,
    Recent,
    Silences,
    judge,
    tpot_of,
)
from sglang_kairos.slo.targets import Slo

SLO = Slo(1000.0, 50.0, "chat")


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "tokens", "met", "late_s"),
    [
        (0.9, 0.04, 11, {"ttft": True, "tpot": True, "both": True}, {}),
        (1.0, 0.05, 11, {"ttft": True, "tpot": True, "both": True}, {}),
        (1.5, 0.04, 11, {"ttft": False, "tpot": True, "both": False}, {"ttft": 0.5}),
        (0.9, 0.07, 11, {"ttft": True, "tpot": False, "both": False}, {"tpot": 0.2}),
        (3.0, 0.06, 2, {"ttft": False, "tpot": False, "both": False}, {"ttft": 2.0, "tpot": 0.01}),
        (0.9, 0.0, 1, {"ttft": True, "tpot": True, "both": True}, {}),
        (0.9, None, 1, {"ttft": True}, {}),
        (1.1, None, 1, {"ttft": False}, {"ttft": 0.1}),
    ],
)
def test_a_verdict(
    ttft_s: float, tpot_s: float | None, tokens: int, met: Any, late_s: dict[str, float]
) -> None:
    verdict = judge(SLO, "chat", ttft_s, tpot_s, tokens, 0.0)
    assert verdict.met == met
    assert verdict.late_s == pytest.approx(late_s)


def test_class_names_that_clients_make_up_count_as_one() -> None:
    tally = Attainment({"chat": SLO})
    for name in ("chat", "default", "other", "x", "chat ", "CHAT", *map(str, range(1000))):
        tally.ended(SERVED, judge(SLO, tally.label(name), 0.1, 0.0, 1, 0.0))
    assert set(tally.classes) == {"chat", "default", "other"}
    assert tally.classes["other"].met["both"] == 1004


def test_the_report_is_plain_and_has_every_request() -> None:
    tally = Attainment({"chat": SLO})
    tally.ended(SERVED, judge(SLO, "chat", 1.25, 0.06, 11, 0.4))
    tally.ended(SERVED, judge(SLO, "chat", 0.25, 0.02, 11, 0.1))
    tally.ended(ABORTED)
    tally.ended(FAILED)
    report = tally.report()
    assert report["requests"] == {"served": 2, "aborted": 1, "failed": 1}
    assert report["max_itl_s"] == report["longest_silence_s"] == 0.4
    assert report["classes"]["chat"] == {
        "met": {"ttft": 1, "tpot": 1, "both": 1},
        "missed": {"ttft": 1, "tpot": 1, "both": 1},
        "ttft": {"count": 2, "sum_s": 1.5, "max_s": 1.25},
        "tpot": {"count": 2, "sum_s": pytest.approx(0.08), "max_s": 0.06},
        "late": {
            "ttft": {"count": 1, "sum_s": 0.25, "max_s": 0.25},
            "tpot": {"count": 1, "sum_s": pytest.approx(0.1), "max_s": pytest.approx(0.1)},
        },
    }


seconds = st.floats(0.0, 10.0, allow_nan=False)


@given(st.lists(st.tuples(seconds, seconds, st.integers(1, 50), st.sampled_from(OUTCOMES))))
def test_the_servers_count_is_the_clients(rows: list[tuple[float, float, int, str]]) -> None:
    """Given the same times, `tools/replay` and the server count the same requests."""
    tally = Attainment({})
    outcomes = []
    for first_s, rest_s, tokens, outcome in rows:
        ok = outcome == SERVED
        last_s = first_s + rest_s
        outcomes.append(
            Outcome(
                0, 0.0, 0.0, 1, 1, SLO.ttft_ms, SLO.tpot_ms, "ok" if ok else "aborted", "",
                first_s, last_s, last_s, tokens,
            )
        )  # fmt: skip
        tpot_s = tpot_of(first_s, last_s, tokens)
        tally.ended(outcome, judge(SLO, "default", first_s, tpot_s, tokens, 0.0) if ok else None)
    client = measure(outcomes, 1.0)
    met = sum((one.met for one in tally.classes.values()), Counter[str]())
    missed = sum((one.missed for one in tally.classes.values()), Counter[str]())
    sent = max(1, len(rows))
    assert met["ttft"] == round(client.ttft_attainment * sent)
    assert met["tpot"] == round(client.tpot_attainment * sent)
    assert met["both"] == round(client.e2e_attainment * sent)
    served = tally.outcomes[SERVED]
    assert all(met[target] + missed[target] == served for target in ("ttft", "tpot", "both"))
    assert sum(tally.outcomes.values()) == len(rows)


@dataclass(eq=False)
class Talker:
    first_token_s: float | None = None
    last_token_s: float | None = None
    silent_s: float = 0.0


steps = st.lists(
    st.tuples(st.integers(1, 40), st.sets(st.integers(0, 5)), st.booleans()), max_size=60
)


@given(steps, st.booleans())
def test_silences_are_those_of_a_watch_on_every_token(
    rows: list[tuple[int, set[int], bool]], spell_out: bool
) -> None:
    talkers = [Talker() for _ in range(6)]
    tokens: dict[int, list[float]] = {index: [] for index in range(6)}
    silences, now_s, before = Silences(), 100.0, None
    for took, who, look in rows:
        now_s += took / 16  # exact in binary
        for index in who:
            tokens[index].append(now_s)
        same = who == before and not spell_out
        silences.step(now_s, None if same else [talkers[index] for index in sorted(who)])
        before = who
        for index in who if look else ():
            silences.settle(talkers[index])
            times, talker = tokens[index], talkers[index]
            gaps = [b - a for a, b in itertools.pairwise(times)]
            assert talker.silent_s == max(gaps, default=0.0)
            assert (talker.first_token_s, talker.last_token_s) == (times[0], times[-1])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_a_stream_that_nobody_settles_before_its_end_has_its_longest_wait(took: list[int]) -> None:
    talker, silences, now_s = Talker(), Silences(), 0.0
    silences.step(now_s, [talker])
    for length in took:
        now_s += length / 16
        silences.step(now_s)
    silences.settle(talker)
    assert talker.silent_s == max(took) / 16


def test_silences_keep_no_more_than_the_living_need() -> None:
    silences, now_s = Silences(), 0.0
    for index in range(10_000):
        now_s += 1.0 / (index + 1)  # each step shorter than all before
        silences.step(now_s, [Talker()])
    assert len(silences._took) <= MANY_STEPS


def test_recent_keys_are_known_and_old_ones_forgotten() -> None:
    recent = Recent(most=3)
    assert [recent.seen(key) for key in "abca"] == [False, False, False, True]
    assert [recent.seen(key) for key in "da"] == [False, False]
