"""Who is let in on a decode server: tables first, then what holds for every queue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.policy.admission import (
    PLENTY,
    PRESSED,
    TARGET,
    AdmissionPlan,
    Occupancy,
    QueueView,
    deadline_order,
    plan_admission,
)
from sglang_kairos.policy.load import step_costs
from sglang_kairos.predict.request_statistics import RequestStatistics

KV, SLOTS = 100_000, 100


def step_s(batch: Any, kv_tokens: Any) -> Any:
    """10 ms, 1 ms a request, 1 us a token."""
    return 10e-3 + 1e-3 * batch + 1e-6 * kv_tokens


def server(kept: int, tpot: float = 0.05, used: float = 1.0, slots: float = 1.0) -> Occupancy:
    """`kept` requests of 1,000 tokens, 2 ms each; 20 of them fill a TPOT of 50 ms."""
    return Occupancy(
        np.full(kept, 1000.0), np.full(kept, tpot), KV, SLOTS, used * KV, int(slots * SLOTS)
    )


class FixedStatistics(RequestStatistics):
    """100 ms from the reservation to the first token, 100 tokens a request."""

    def startup_s(self, prompt_tokens: Any, quantile: float = 0.5) -> Any:
        return np.full(len(prompt_tokens), 0.1)


STATISTICS = FixedStatistics()
STATISTICS.output_tokens = 100.0


def queue(prompt: list[float], due: Any, tpot: Any = 0.05, ready: Any = None, **more: Any) -> Any:
    """Those who wait, at time 0, with a TTFT target of two seconds."""
    n = len(prompt)
    arrival = np.broadcast_to(due, n) - 2.0
    mask = None if ready is None else np.array(ready)
    tokens, targets = np.array(prompt, float), np.broadcast_to(tpot, n).astype(float)
    return QueueView(0.0, arrival, np.full(n, 2.0), targets, tokens, ready=mask, **more)


def plan(
    prompt: list[float],
    due: Any,
    occupancy: Occupancy,
    tpot: Any = 0.05,
    min_throughput: float = 0.0,
    starving: int = -1,
    clock: Any = None,
    **more: Any,
) -> AdmissionPlan:
    return plan_admission(
        queue(prompt, due, tpot, **more),
        occupancy,
        step_s,
        STATISTICS,
        starving=starving,
        clock=None if clock is None else np.array(clock, float),
        min_throughput=min_throughput,
    )


K = 1000.0


@pytest.mark.parametrize(
    ("name", "got", "order", "kept", "count"),
    [
        ("nobody waits", plan([], [], server(3)), [], 0, 0),
        ("all fit: earliest deadline first", plan([K, K], [1.9, 1.0], server(3)), [1, 0], 2, 2),
        ("late ones last, shortest first",
         plan([3 * K, K, K], [-1, -1, 1], server(3)), [2, 1, 0], 3, 3),
        ("a full server lets nobody in", plan([K, K], [1.9, 1.0], server(20)), [1, 0], 0, 0),
        ("one place is left", plan([K, K], [1.9, 1.0], server(18)), [1, 0], 1, 1),
        ("an empty one takes somebody, whatever it is", plan([90 * K], 1.0, server(0)), [0], 0, 1),
        ("where no TPOT is within reach there is no gate",
         plan([K, K, K], [-0.5, 1.9, 0.05], server(0, used=0.95), tpot=0.011), [1, 0, 2], 0, 3),
        ("whose TPOT is out of reach comes in behind the others, at once, late or not",
         plan([K, K, K], [-0.5, 1.9, 1.9], server(20, used=0.2, slots=0.2), tpot=[0.011, 0.05, 0.011]),
         [2, 0, 1], 0, 2),
        ("but not where memory is short",
         plan([K, K], 1.9, server(15), tpot=[0.011, 0.05]), [1, 0], 1, 1),
        ("unless it starves, and then first",
         plan([K, K], [-9, 1.9], server(1), tpot=[0.011, 0.05], starving=0), [0, 1], 2, 2),
        ("with memory to spare, who is due comes in unkept, who is not waits",
         plan([K, K, K], [1.9, 0.5, -0.5], server(20, used=0.2, slots=0.2)), [1, 0, 2], 0, 1),
        ("slots alone can be short",
         plan([K], [0.5], server(20, used=0.2)), [0], 0, 0),
        ("a loose TPOT takes a fraction of the steps",
         plan([K] * 4, 1.0, server(18), tpot=[0.1] * 4), [0, 1, 2, 3], 3, 3),
        ("a starving one goes first",
         plan([9 * K, K], [-9, 1], server(3), starving=0), [0, 1], 2, 2),
        ("where all tokens/s are wanted, whoever fits comes in, unkept",
         plan([K] * 9, 1.0, server(20, used=0.2, slots=0.2), min_throughput=1.0),
         list(range(9)), 0, 9),
        ("for nine tenths of them, as many as make those",
         plan([K] * 9, 1.0, server(9, used=0.09, slots=0.09), tpot=0.02, min_throughput=0.9),
         list(range(9)), 1, 3),
        ("slots end it all the same",
         plan([1.0] * 9, 1.0, server(20, used=0.2, slots=0.99), min_throughput=1.0),
         list(range(9)), 0, 1),
        ("nobody comes in who would make it fewer",
         plan([30 * K] * 9, 1.0, server(20, used=0.5, slots=0.2), min_throughput=1.0),
         list(range(9)), 0, 0),
        ("who has used up half of SGLang's clock goes first, beyond the load, least time left first",
         plan([K] * 3, [1.9, -9, -5], server(20, used=0.9), clock=[0.9, 0.3, 0.4]), [1, 2, 0], 0, 2),
        ("and takes its place among the kept",
         plan([K] * 3, [1.0, -9, 0.5], server(18), clock=[0.9, 0.3, 0.6]), [1, 2, 0], 1, 1),
        ("whose time is up goes behind those who still have some",
         plan([K] * 3, [1.0, -9, -8], server(20, used=0.9), clock=[0.9, 0.0, 0.4]), [2, 1, 0], 0, 2),
        ("before a starving one, and where no TPOT is within reach",
         plan([K] * 3, 1.0, server(0), tpot=0.011, starving=0, clock=[1, 1, 0.5]),
         [2, 0, 1], 0, 3),
        ("whom no server of this size can hold goes last, starving or not",
         plan([K, 99 * K, K], [1.0, -9, 0.5], server(0), starving=1,
              clock=[1, 0.1, 1], growth_tokens=np.array([0, 2 * K, 0])), [2, 0, 1], 2, 2),
        ("who is not ready is not planned with",
         plan([K] * 3, [0.1, 1.9, 1.0], server(0), ready=[False, True, True]), [2, 1, 0], 2, 2),
        ("nor does it take the place that an empty server has for somebody",
         plan([K, 90 * K], [1.0, 1.9], server(0), tpot=[0.05, 0.02], ready=[False, True]), [1, 0], 0, 1),
        ("nobody is ready", plan([K, K], 1.0, server(0), ready=[False, False]), [0, 1], 0, 0),
    ],
)  # fmt: skip
def test_plan(name: str, got: AdmissionPlan, order: list[int], kept: int, count: int) -> None:
    assert (got.order, got.kept, got.count) == (order, kept, count), name


queues = st.lists(
    st.tuples(st.integers(1, 20_000), st.floats(-3, 3), st.sampled_from([0.02, 0.05, 0.2])),
    min_size=1,
    max_size=40,
)


@given(queues, st.integers(0, 30), st.floats(0, 1), st.floats(0, 1))
def test_every_plan_is_sound(rows: Any, kept: int, used: float, slots: float) -> None:
    prompt, due, tpot = (list(column) for column in zip(*rows, strict=True))
    there = server(kept, used=used, slots=slots)
    got = plan(prompt, due, there, tpot)
    assert sorted(got.order) == list(range(len(rows)))
    assert 0 <= got.kept <= got.count <= len(rows)
    assert got.count or kept, "an empty server must not stand idle"
    reach = [step_s(1, p) <= t for p, _, t in rows]
    if not kept and not any(reach):
        assert (got.kept, got.count) == (0, len(rows)), "held back for targets nobody can meet"
        return
    assert got.kept or kept, "somebody can be kept, and nobody is"
    assert all(reach[i] for i in got.order[: got.kept]), "kept although out of reach"
    chosen = [rows[i] for i in got.order[: got.kept]]
    load = sum(2e-3 / 0.05 for _ in range(kept)) + sum((1e-3 + 1e-6 * p) / t for p, _, t in chosen)
    within = [t for t, near in zip(tpot, reach, strict=True) if near]
    tightest = min([*within, *([0.05] if kept else [])])
    if kept > 1 and chosen:
        assert 10e-3 / tightest + load <= TARGET + 1e-6, "steps too long for somebody kept"
    more = [rows[i] for i in got.order[got.kept : got.count]]
    late = [i for i in got.order[got.kept : got.count] if reach[i] and rows[i][1] <= 0]
    assert not late, "let in beyond the load although late anyway"
    if more:
        tokens = there.used_tokens + sum(p for p, *_ in (*chosen, *more))
        assert tokens <= PLENTY * KV
        assert there.used_slots + got.count <= PLENTY * SLOTS


clocks = st.lists(st.floats(0, 1), min_size=40, max_size=40)
masks = st.lists(st.booleans(), min_size=40, max_size=40)


@given(queues, clocks, masks, st.integers(0, 30), st.floats(0, 1), st.floats(0, 1))
def test_nobody_whose_clock_is_half_used_up_waits_behind_another(
    rows: Any, clock: list[float], ready: list[bool], kept: int, used: float, slots: float
) -> None:
    prompt, due, tpot = (list(column) for column in zip(*rows, strict=True))
    clock, ready = clock[: len(rows)], ready[: len(rows)]
    there = server(kept, used=used, slots=slots)
    got = plan(prompt, due, there, tpot, clock=clock, ready=ready)
    assert sorted(got.order) == list(range(len(rows)))
    pressed = [i for i in range(len(rows)) if ready[i] and clock[i] <= PRESSED]
    first = got.order[: len(pressed)]
    assert sorted(first) == pressed
    # Who of two with equal clocks comes first is a matter of urgency.
    used_up = [clock[i] or 1.0 for i in first]
    assert used_up == sorted(used_up)
    assert got.count >= len(pressed), "the gate keeps somebody out until SGLang gives it up"


@given(queues, masks, st.integers(0, 30), st.floats(0, 1))
def test_who_is_not_ready_changes_nothing_for_who_is(
    rows: Any, ready: list[bool], kept: int, used: float
) -> None:
    prompt, due, tpot = (list(column) for column in zip(*rows, strict=True))
    ready = ready[: len(rows)]
    there = server(kept, used=used)
    got = plan(prompt, due, there, tpot, ready=ready)
    here = [i for i in range(len(rows)) if ready[i]]
    alone = plan([prompt[i] for i in here], [due[i] for i in here], there, [tpot[i] for i in here])
    assert (got.kept, got.count) == (alone.kept, alone.count)
    assert got.order[: len(here)] == [here[i] for i in alone.order]
    assert got.count or kept or not here, "an empty server must not stand idle"


@given(queues, clocks)
def test_without_a_gate_the_clock_comes_before_the_deadline(rows: Any, clock: list[float]) -> None:
    prompt, due, _ = (list(column) for column in zip(*rows, strict=True))
    waiting = queue(prompt, due)
    order = deadline_order(waiting, np.array(clock[: len(rows)]))
    due = waiting.due_s.tolist()

    def key(i: int) -> tuple[int, float]:
        if clock[i] <= PRESSED:
            return -1, clock[i] or 1.0
        return (0, due[i]) if due[i] > 0 else (1, prompt[i])

    assert order == sorted(range(len(rows)), key=key)


@given(queues, st.integers(2, 30), st.integers(1, 10))
def test_more_load_never_keeps_more(rows: Any, kept: int, added: int) -> None:
    prompt, due, tpot = (list(column) for column in zip(*rows, strict=True))
    few, many = (plan(prompt, due, server(n), tpot).kept for n in (kept, kept + added))
    # The order depends on the load only through shares that are alike: the same queue, less room.
    assert many <= few


def test_costs_add_up_to_the_step_and_the_base_is_that_of_a_full_batch() -> None:
    context = np.array([100.0, 5000.0, 700.0, 1000.0])

    def kneed(batch: Any, kv_tokens: Any) -> Any:
        return 1e-3 + 4e-3 * np.minimum(batch, 2) + 1e-3 * batch + 1e-6 * kv_tokens

    base, cost, more = step_costs(kneed, context, 1.0, np.array([100.0]))
    assert base + cost.sum() == pytest.approx(float(kneed(4, context.sum())))
    assert base == pytest.approx(9e-3), "the knee belongs to the base, not to each request"
    assert more[0] == pytest.approx(cost[0])


@pytest.mark.parametrize("there", [0, 1])
def test_next_to_nobody_a_crowd_still_counts_one_by_one(there: int) -> None:
    got = plan([K] * 60, 1.0, server(there))
    assert got.kept == 19 - there, "all came in: a burst would put everybody behind"


def test_stay_learns_the_lead_and_the_length() -> None:
    statistics = RequestStatistics()
    for turn in range(300):
        prompt = 200 + 97 * turn % 4000
        statistics.started(prompt, 0.2 + 1e-4 * prompt)
        statistics.ended(40)
    assert statistics.startup_s(np.array([1000.0]))[0] == pytest.approx(0.3, rel=0.05)
    assert statistics.output_tokens == pytest.approx(40, rel=0.05)
