"""The rules of a decode server that need more than one moment: tables, then what always holds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.admission import Occupancy, QueueView
from sglang_kairos.policy.decode_planner import (
    GIVE_UP_S,
    DecodePlanner,
    RunningView,
)
from sglang_kairos.policy.decode_step import choose_step, horizon_of, reserve_of
from sglang_kairos.policy.random_decode import ChaosDecodePlanner
from sglang_kairos.predict.prediction_error import LEARNT_STEPS, PredictError

NOW, TPOT, KV, SLOTS = 1000.0, 0.05, 100_000.0, 100
GOOD = PredictError(0.0, 0.0, LEARNT_STEPS)


class Times:
    """10 ms, 1 ms a request, 1 us a token; wrong by `error` (None: nobody may ask)."""

    def __init__(self, error: PredictError | None = GOOD) -> None:
        self._error = error

    def step_s(self, batch: Any, kv_tokens: Any, /) -> Any:
        return 10e-3 + 1e-3 * batch + 1e-6 * kv_tokens

    @property
    def error(self) -> PredictError:
        assert self._error is not None
        return self._error


def planner(kind: type[DecodePlanner] = DecodePlanner, **settings: Any) -> DecodePlanner:
    return kind(KairosConfig(**settings), Counter())


def running(context: Any, lead: Any = 0.0, tpot: Any = TPOT, served: Any = True) -> RunningView:
    n = len(context)
    paces = np.broadcast_to(tpot, n).astype(float)
    return RunningView(
        NOW,
        NOW + np.broadcast_to(lead, n) - 4.0 * paces,
        np.full(n, 5.0),
        paces,
        np.full(n, NOW - 0.01),
        np.broadcast_to(served, n),
        np.asarray(context, float),
        float(paces.min(initial=np.inf)) if n else 0.0,
    )


def queue(age: Any, prompt: Any = 1000.0, ttft: float = 2.0, **more: Any) -> QueueView:
    """Those who wait since `age` seconds."""
    n = len(age)
    arrival = NOW - np.asarray(age, float)
    tokens = np.broadcast_to(prompt, n).astype(float)
    return QueueView(NOW, arrival, np.full(n, ttft), np.full(n, TPOT), tokens, **more)


def server(view: RunningView, coming: int = 0) -> Occupancy:
    used = float(view.context_tokens.sum()) + 1000.0 * coming
    slots = len(view.tpot_s) + coming
    return Occupancy(np.full(coming, 1000.0), np.full(coming, TPOT), KV, SLOTS, used, slots)


def admit(
    planned: DecodePlanner,
    waiting: QueueView,
    view: RunningView | None = None,
    coming: int = 0,
    error: PredictError = GOOD,
) -> Any:
    view = running([]) if view is None else view
    return planned.admit(waiting, view, server(view, coming), Times(error))


FULL = 40  # requests of 1,000 tokens: 90 ms a step


@pytest.mark.parametrize(
    ("name", "waiting", "starving"),
    [
        ("nobody has waited so long", queue([19.9, 1.0]), -1),
        ("the oldest has", queue([1.0, 20.1, 20.2]), 2),
        ("not one that cannot be reserved yet", queue([30.0, 20.1], ready=np.array([False, True])), 1),
        ("nor one that no server of this size can hold",
         queue([30.0, 20.1], growth_tokens=np.array([KV - 999, KV - 1000])), 1),
        ("nobody can be reserved", queue([30.0], ready=np.array([False])), -1),
    ],
)  # fmt: skip
def test_who_starves(name: str, waiting: QueueView, starving: int) -> None:
    plan = admit(planner(), waiting)
    assert plan.starving == starving, name
    if starving >= 0:
        assert plan.order[0] == starving


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 8000), min_size=1, max_size=60), st.floats(0.0, 0.9))
def test_the_starving_get_their_share_of_the_tokens_and_no_more(
    prompts: list[int], share: float
) -> None:
    planned = planner(late_share=share)
    earned = spent = largest = 0.0
    for tokens in prompts:
        starves = admit(planned, queue([50.0, 0.0], prompt=tokens)).starving == 0
        for starving in ([True] if starves else []) + [False]:
            planned.let_in(tokens, starving)
            earned += tokens
            spent += tokens * starving
        largest = max(largest, tokens)
    assert spent <= share * earned + largest
    assert spent > 0.0 or share == 0.0


OPEN = [
    ("before enough steps were seen", PredictError(0.0, 0.0, LEARNT_STEPS - 1)),
    ("steps are not as predicted and do not follow", PredictError(0.3, 0.5, 999, response=0.1)),
]


@pytest.mark.parametrize(("name", "error"), OPEN)
def test_with_the_breaker_open_everybody_runs_and_comes_in_by_deadline(
    name: str, error: PredictError
) -> None:
    planned, crowd = planner(), running([1000] * FULL)
    assert planned.choose(crowd, Times(error)) is None, name
    assert planned.counters == {"breaker_steps": 1} and planned.breaker == error
    plan = admit(planned, queue([0.5, 1.0, 30.0]), crowd, error=error)
    assert (plan.order, plan.kept, plan.count, plan.starving) == ([1, 0, 2], 3, 3, -1)
    choice = planned.choose(crowd, Times())
    assert choice is not None and len(choice.run) < FULL and planned.breaker is None
    assert admit(planned, queue([0.5, 1.0]), crowd).count == 0, "the gate is closed again"


def test_steps_that_scatter_but_follow_are_trusted_and_aim_at_a_lead() -> None:
    scattered = PredictError(0.3, 0.5, 999, response=0.9)
    crowd = running([1000] * FULL)
    careful, plain = (planner().choose(crowd, Times(error)) for error in (scattered, GOOD))
    assert careful is not None and plain is not None
    assert len(careful.run) < len(plain.run)


@pytest.mark.parametrize(
    ("waited", "order", "pressed"),
    [
        ([10.0, 0.0], [1, 0], 0),
        ([0.49 * GIVE_UP_S, 0.0], [1, 0], 0),
        ([0.51 * GIVE_UP_S, 0.0], [0, 1], 1),
    ],
)  # fmt: skip
def test_whose_time_out_is_half_used_up_goes_first_beyond_the_load(
    waited: list[float], order: list[int], pressed: int
) -> None:
    planned = planner(late_share=0.0)
    waiting = queue([99.0, 0.0], clock_s=NOW - np.array(waited))
    plan = admit(planned, waiting, running([1000] * FULL))
    assert (plan.order, plan.count, planned.counters["pressed"]) == (order, pressed, pressed)
    assert planned.order(waiting) == order


def test_one_ahead_of_its_pace_makes_no_more_room_than_its_target_and_one_behind_makes_less() -> (
    None
):
    """20 of 1,000 tokens fill a TPOT of 50 ms."""
    for lead, room in ((0.0, True), (9.0, True), (-0.9, False)):
        plan = admit(planner(), queue([0.0] * 9, ttft=60.0), running([1000] * 18, lead=lead))
        assert (plan.kept == 1) if room else (plan.kept == 0), lead
    unkept = running([1000] * 18, lead=-0.9, served=False)
    assert admit(planner(), queue([0.0] * 9, ttft=60.0), unkept).kept > 1, "not to be kept: no load"
    assert admit(planner(), queue([0.0] * 9, ttft=60.0), running([]), coming=18).kept == 1


def test_retraction_takes_who_is_given_up_then_who_has_the_longest_lead() -> None:
    assert planner().retract(running([10, 10, 10, 10], lead=[-0.2, -5.0, 0.5, 0.0])) == [0, 3, 2, 1]


rows = st.lists(
    st.tuples(
        st.integers(1, 9000), st.floats(-1, 2), st.sampled_from([0.02, 0.05, 0.2]), st.booleans()
    ),
    min_size=2,
    max_size=40,
)
errors = st.floats(0.0, 0.3)


def view_of(rows: Any) -> RunningView:
    context, lead, tpot, served = (np.array(column) for column in zip(*rows, strict=True))
    return running(context, lead, tpot, served.astype(bool))


@settings(max_examples=100, deadline=None)
@given(rows, errors, st.floats(1.0, 500.0))
def test_the_short_way_leads_where_the_long_one_does(rows: Any, mape: float, output: float) -> None:
    """With a lead, everybody runs without a choice exactly where the choice would be everybody."""
    view = view_of([(context, abs(lead), tpot, served) for context, lead, tpot, served in rows])
    planned = planner()
    planned.statistics.output_tokens = output
    error = PredictError(mape, mape, 999)
    got = planned.choose(view, Times(error))
    wanted = choose_step(
        view.slack_s, view.tpot_s, view.context_tokens, view.silent_s, Times().step_s,
        served=view.served, reserve_tokens=reserve_of(mape), horizon_tokens=horizon_of(output),
        max_itl_s=2.0,
    )  # fmt: skip
    if got is None:
        assert wanted.reason == "all"
    else:
        assert (got.run, got.reason) == (wanted.run, wanted.reason)
        assert got.served.tolist() == wanted.served.tolist()


def test_where_all_have_room_nobody_asks_how_wrong_predictions_are() -> None:
    assert planner().choose(running([10] * 5), Times(None)) is None
    with pytest.raises(AssertionError):
        planner().choose(running([1000] * FULL), Times(None))


@given(rows, st.integers(0, 2**16), st.integers(0, 40))
def test_random_decisions_are_legal(rows: Any, seed: int, ready: int) -> None:
    view, chaos = view_of(rows), planner(ChaosDecodePlanner, chaos_seed=seed)
    count = len(rows)
    choice = chaos.choose(view, Times(None))
    if choice is not None:
        assert choice.run and choice.run == sorted(set(choice.run)) and choice.run[-1] < count
        assert np.flatnonzero(choice.served).tolist() == choice.run
    assert sorted(chaos.retract(view)) == list(range(count))
    mask = np.arange(count) < ready
    plan = admit(chaos, queue([1.0] * count, ready=mask), view)
    assert sorted(plan.order) == list(range(count))
    here = int(mask.sum())
    assert 0 <= plan.kept <= plan.count <= here and bool(plan.count) == bool(here)
    assert mask[plan.order[:here]].all(), "a place for one that cannot be reserved"


def test_random_decisions_differ() -> None:
    chaos, view = planner(ChaosDecodePlanner, chaos_seed=7), running([10] * 6)
    choices = [chaos.choose(view, Times()) for _ in range(50)]
    assert len({None if choice is None else tuple(choice.run) for choice in choices}) > 10
    assert len({tuple(chaos.retract(view)) for _ in range(50)}) > 10
