"""The prefill planner: what it decides from more than one moment, told in columns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy import prefill_planner
from sglang_kairos.policy.prefill_planner import (
    NEVER,
    ChaosPrefillPlanner,
    PrefillPlanner,
    PrefillView,
)
from sglang_kairos.policy.prefill_step import PrefillPlan
from sglang_kairos.predict.online_prefill import PrefillTimeModel

TIMES = PrefillTimeModel(0.0, 1e-3, 0.0)  # a second per 1,000 tokens
CONFIG = KairosConfig(margin=0.0, handoff_ms=0.0)


def view(tokens: list[int], begun: int = 0, **more: Any) -> PrefillView:
    """At time 100 s all have just come with a TTFT target of 10 s; the last `begun` have begun."""
    count = len(tokens)
    facts: dict[str, Any] = {
        "now_s": 100.0,
        "arrival_s": np.full(count, 100.0),
        "ttft_s": np.full(count, 10.0),
        "tokens": np.array(tokens, np.int64),
        "prefix": np.zeros(count, np.int64),
        "chunk_tokens": 512,
        "paused_s": [0.0] * begun,
        "free_tokens": 100_000,
        "max_paused": 8,
    }
    arrays = {name: np.array(value, float) for name, value in more.items() if name in FLOATS}
    return PrefillView(**{**facts, **more, **arrays})


FLOATS = ("arrival_s", "ttft_s", "weight", "work_factor")


@pytest.mark.parametrize(
    ("name", "config", "seen", "order"),
    [
        ("shortest first at one deadline", {}, view([300, 100]), [1, 0]),
        ("the tighter target first", {}, view([300, 100], ttft_s=[1, 10]), [0, 1]),
        ("who cannot make it goes last", {}, view([300, 100], ttft_s=[0.2, 10]), [1, 0]),
        ("the margin counts", {"margin": 1.0}, view([300, 100], ttft_s=[0.5, 10]), [1, 0]),
        ("and the hand-off", {"handoff_ms": 300.0}, view([300, 100], ttft_s=[0.5, 10]), [1, 0]),
        ("and a prediction made wrong", {}, view([300, 100], ttft_s=[0.5, 10], work_factor=[2, 1]),
         [1, 0]),
        ("weights decide who is dropped", {}, view([400, 500], ttft_s=[0.5, 0.5], weight=[1, 9]),
         [1, 0]),
        ("the oldest past the bound goes first", {},
         view([300, 100, 900], arrival_s=[100, 100, -1], ttft_s=[1, 1, 10]), [2, 1, 0]),
        ("not without a late share", {"late_share": 0.0},
         view([300, 100, 900], arrival_s=[100, 100, -1], ttft_s=[1, 1, 10]), [1, 0, 2]),
        ("nor before the bound", {"max_wait": 11.0},
         view([300, 100, 900], arrival_s=[100, 100, -1], ttft_s=[1, 1, 10]), [1, 0, 2]),
    ],
)  # fmt: skip
def test_who_goes_first(
    name: str, config: dict[str, float], seen: PrefillView, order: list[int]
) -> None:
    plan = PrefillPlanner(replace(CONFIG, **config)).plan(seen, TIMES)  # type: ignore[arg-type]
    assert [*plan.order, *plan.hold] == order, name


def test_one_that_starves_is_named_and_pays() -> None:
    planner, seen = PrefillPlanner(CONFIG), view([300, 900], arrival_s=[100, -1])
    assert planner.plan(seen, TIMES).starving == 1
    planner.ran(512, 512)
    assert planner.plan(seen, TIMES).starving == -1
    planner.ran(10 * 512, 0)
    assert planner.plan(seen, TIMES).starving == 1


@pytest.mark.parametrize(
    ("paused_s", "in_slot", "pinned", "slot"),
    [
        ([0.0, 0.0], True, False, 2),  # the more urgent of the two: its rest is shorter
        ([0.0, 60.1], True, False, 3),
        ([60.1, 60.1], True, False, 2),
        ([60.1, 60.1], False, False, 2),
        ([0.0, 60.1], True, True, 2),
    ],
)
def test_who_was_paused_for_too_long_runs(
    paused_s: list[float], in_slot: bool, pinned: bool, slot: int
) -> None:
    seen = view([900, 900, 600, 700], 2, paused_s=paused_s, in_slot=in_slot, pinned=pinned)
    assert PrefillPlanner(CONFIG).plan(seen, TIMES).slot == slot


def test_a_plan_that_loses_somebody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for order, hold in (([0], []), ([0, 0], []), ([0, 1], [1]), ([0, 2], []), ([-1, 0], [])):
        lost = PrefillPlan(order, -1, None, 0, hold)
        monkeypatch.setattr(prefill_planner, "plan_prefill", lambda *a, lost=lost, **k: lost)
        with pytest.raises(ValueError, match="over 2 waiting requests"):
            PrefillPlanner(CONFIG).plan(view([9, 9]), TIMES)


@pytest.mark.parametrize("count", [0, 1, 32, 33, 100, 1000])
def test_every_prompt_is_looked_up_and_never_more_than_32_at_once(count: int) -> None:
    planner, looked_up_at = PrefillPlanner(CONFIG), np.full(count, NEVER)
    for _ in range(-(-count // 32)):
        found = planner.to_look_up(looked_up_at)
        assert len(found) <= 32
        looked_up_at[found] = planner.plans
    assert (looked_up_at > NEVER).all()


def test_the_stalest_are_looked_up_first_and_only_when_stale() -> None:
    planner = PrefillPlanner(CONFIG)
    planner.plans = 99
    assert planner.to_look_up(np.array([100, 99, 90])) == [
        1,
        2,
    ]  # of a short queue, all but the new
    ages = np.array([100 - age for age in [*range(15, 0, -1)] * 3 + [16, 40, 17]])
    planner.plans = 99
    assert planner.to_look_up(ages) == [45, 46, 47]
    planner.plans = 99
    assert planner.to_look_up(np.arange(60))[:3] == [0, 1, 2]


def test_unified_serving_orders_by_urgency_with_its_own_chunk_size() -> None:
    times = PrefillTimeModel(1.0, 1e-3, 0.0)  # a second a step beside a second per 1,000 tokens
    planner = PrefillPlanner(CONFIG)
    tight = {"ttft_s": [4.0, 9.0]}
    assert planner.order(view([1000, 900], **tight, chunk_tokens=512), times) == [0, 1]
    assert planner.order(view([1000, 900], **tight, chunk_tokens=100), times)[0] == 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_chaos_keeps_what_every_plan_must(data: Any) -> None:
    draw = data.draw
    tokens = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=9))
    begun = draw(st.integers(0, min(4, len(tokens))))
    in_slot = begun > 0 and draw(st.booleans())
    seen = view(
        tokens,
        begun,
        in_slot=in_slot,
        pinned=in_slot and draw(st.booleans()),
        max_paused=draw(st.integers(max(0, begun - in_slot), 5)),
        free_tokens=draw(st.integers(0, 9000)),
    )
    plan = ChaosPrefillPlanner(replace(CONFIG, chaos_seed=draw(st.integers(0, 99)))).plan(
        seen, TIMES
    )
    assert sorted([*plan.order, *plan.hold]) == list(range(seen.waiting))
    assert plan.slot == -1 or seen.waiting <= plan.slot < len(tokens)
    assert begun - (plan.slot >= 0) <= seen.max_paused
    if seen.pinned:
        assert plan.slot == seen.slot
