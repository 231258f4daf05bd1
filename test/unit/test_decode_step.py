"""Which decodes run: single steps as tables, then a whole server in a small simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.policy.decode_step import (
    MOST_RESERVE,
    StepChoice,
    choose_step,
    longest_full_step_s,
    reserve_of,
)
from sglang_kairos.policy.load import largest_fitting, step_costs
from sglang_kairos.predict.online_decode import StepTimeModel

TPOT, CAP = 0.030, 2.0


def step_s(batch: Any, kv_tokens: Any) -> Any:
    """The step law of the decode server of upstream/seams.md, section 0."""
    return 3.5e-3 + 0.22e-3 * batch + 0.65e-6 * kv_tokens


def choose(context: Any, slack: Any = 0.06, silent: Any = 0.0, **kw: Any) -> StepChoice:
    n = len(context)
    tpot = kw.pop("tpot", TPOT)
    return choose_step(
        np.broadcast_to(slack, n).astype(float),
        np.broadcast_to(tpot, n).astype(float),
        np.asarray(context, float),
        np.broadcast_to(silent, n).astype(float),
        kw.pop("step", step_s),
        max_itl_s=kw.pop("max_itl_s", CAP),
        **kw,
    )


HEAVY = 16_000  # 10.6 ms a step; about 55 requests of 400 tokens fit 30 ms


@pytest.mark.parametrize(
    ("name", "got", "run", "reason"),
    [
        ("nobody runs", choose([]), [], "all"),
        ("one always runs, however slow", choose([100_000]), [0], "overload"),
        ("everybody fits", choose([400] * 10), list(range(10)), "all"),
        ("the heavy one is parked", choose([HEAVY, *[400] * 50]), list(range(1, 51)), "overload"),
        ("a silent one runs whatever it costs",
         choose([HEAVY, 400, 400], silent=[1.97, 0, 0], slack=[-2, 0.02, 0.02], tpot=0.012),
         [0], "overload"),
        ("a hopeless one slows nobody down, and runs if it does not",
         choose([400, 400], slack=[-9, 0.06]), [0, 1], "all"),
        ("a loose TPOT makes room for a tight one",
         choose([400, 400, HEAVY], slack=[0.02, 0.02, 0.9], tpot=[0.01, 0.01, 0.5]),
         [0, 1], "packed"),
    ],
)  # fmt: skip
def test_choice(name: str, got: StepChoice, run: list[int], reason: str) -> None:
    assert (got.run, got.reason) == (run, reason), name


def test_padding_counts_against_the_step() -> None:
    model = StepTimeModel(3.5e-3, 0.22e-3, 0.65e-6, [16, 32, 64, 128])
    full, padded = choose([400] * 60), choose([400] * 60, step=model.step_s)
    assert len(padded.run) < len(full.run)
    assert padded.predicted_s == pytest.approx(step_s(64, 400 * len(padded.run)))


def test_a_crowd_of_silent_ones_is_fetched_one_a_step_before_they_are_due() -> None:
    context = [400.0] * 50 + [5000.0] * 40
    silent = [0.0] * 50 + [1.0 + i / 1000 for i in range(40)]
    got = choose(context, slack=[0.06] * 50 + [-5.0] * 40, silent=silent)
    assert [i for i in got.run if i >= 50] == [89]


def test_one_who_is_behind_does_not_drag_everybody_to_his_pace() -> None:
    n = 58  # a step of 31.3 ms: about two too many for 30 ms
    slack = [-7 * TPOT, *[TPOT] * (n - 1)]
    got = choose([400] * n, slack=slack, served=np.ones(n, bool))
    assert got.predicted_s >= 0.98 * TPOT
    assert len(got.run) >= n - 5


def test_who_is_served_stays_served_when_one_a_little_lighter_joins() -> None:
    n = 60  # more than can be kept on pace
    first = choose([400] * n, slack=TPOT)
    served = np.array([*first.served, False])
    again = choose([*[400] * n, 390], slack=TPOT, served=served)
    assert again.served.tolist() == [*first.served.tolist(), False]
    fresh = choose([*[400] * n, 390], slack=TPOT)
    assert fresh.served[-1], "without a past the lightest is served first"


@pytest.mark.parametrize("lead", [0.0, 0.5, 5.0])
def test_a_step_that_just_fits_is_stocks_own(lead: float) -> None:
    n = int((TPOT - 3.5e-3) / (0.22e-3 + 0.65e-6 * 400))
    assert 0.98 * TPOT < step_s(n, 400 * n) <= TPOT
    got = choose([400] * n, slack=(1 + lead) * TPOT, served=np.arange(n) < n // 2)
    assert (got.run, got.reason, got.served.all()) == (list(range(n)), "all", True)


def test_where_all_are_given_up_everybody_runs_until_somebody_can_be_kept() -> None:
    context, lost = [400] * 150, -20.0 * TPOT  # 76 ms: 2.5 times what the target allows
    got = choose(context, slack=lost)
    assert (len(got.run), got.reason, got.served.any()) == (150, "overload", False)
    slack = np.full(150, lost)
    slack[7] = TPOT
    held = choose(context, slack=slack)
    assert 7 in held.run and held.served.nonzero()[0].tolist() == [7]
    assert held.predicted_s <= 1.3 * TPOT


def test_a_tpot_out_of_reach_parks_nobody_but_who_is_beside_one_that_can_be_kept() -> None:
    alone = step_s(1, 400.0)
    out_of_reach = choose([400] * 60, tpot=0.95 * alone)
    assert (len(out_of_reach.run), out_of_reach.served.any()) == (60, False)
    assert len(choose([400] * 60, slack=alone, tpot=1.05 * alone).run) < 60, "within reach: packed"
    mixed = choose([400] * 200, tpot=[0.95 * alone] * 100 + [TPOT] * 100, slack=TPOT)
    assert not mixed.served[:100].any(), "a short step is made for who gains from it"
    assert mixed.served.any() and mixed.predicted_s <= 1.3 * TPOT


def bent_s(batch: Any, kv_tokens: Any) -> Any:
    """Flattens, is stepped, and jumps: what looking for the fullest step must cope with."""
    padded = -(-batch // 16) * 16
    return 1e-3 * batch**0.5 + 1e-4 * padded + 0.65e-6 * kv_tokens + 5e-3 * (batch > 40)


@given(st.lists(st.integers(1, 4000), min_size=2, max_size=200), st.floats(0.0, 1.0))
def test_the_fullest_step_is_found_on_any_monotone_law(context: list[int], where: float) -> None:
    tokens = np.cumsum(np.array(context, float))
    n, full = len(context), bent_s(len(context), tokens[-1])
    limit = where * full * 0.999
    steps = [bent_s(size, tokens[size - 1]) for size in range(1, n + 1)]
    found, _ = largest_fitting(lambda size: steps[size - 1], limit, (0, 0.0), (n, full))
    assert found == sum(s <= limit for s in steps)


@given(st.integers(2, 300), st.floats(0.0, 1.2))
def test_costs_are_those_at_the_largest_batch_that_fits(n: int, where: float) -> None:
    mean, full = 100.0, bent_s(n, 100.0 * n)
    fits = [size for size in range(2, n + 1) if bent_s(size, size * mean) <= where * full]
    at = max(fits, default=2)
    base, cost, _ = step_costs(bent_s, np.full(n, mean), where * full)
    assert base + at * cost[0] == pytest.approx(bent_s(at, at * mean)) or base == 0.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 1.0])
def test_a_step_makes_that_share_of_the_tokens_of_everybodys(share: float) -> None:
    n = 150  # 76 ms: 2.5 times what the target allows
    free, held = choose([400] * n), choose([400] * n, min_throughput=share)
    everybody = n / step_s(n, 400 * n)
    assert len(held.run) / held.predicted_s >= share * everybody
    assert set(free.run) <= set(held.run)
    if len(held.run) > len(free.run):
        fewer = len(held.run) - 1
        assert fewer / step_s(fewer, 400 * fewer) < share * everybody, "no fuller than it must be"


requests = st.lists(
    st.tuples(
        st.floats(-3, 3),
        st.sampled_from([0.01, 0.03, 0.1]),
        st.integers(1, 16_000),
        st.floats(0, 2),
    ),
    min_size=1,
    max_size=60,
    unique=True,
)


def decide(rows: Any) -> StepChoice:
    slack, tpot, context, silent = np.array(rows, float).T
    return choose_step(slack, tpot, context, silent, step_s, max_itl_s=CAP)


@settings(max_examples=80, deadline=None)
@given(requests, st.randoms(use_true_random=False))
def test_every_choice_is_sound(rows: Any, random: Any) -> None:
    got = decide(rows)
    assert got.run and got.run == sorted(set(got.run)) and got.run[-1] < len(rows)
    assert got.predicted_s == pytest.approx(step_s(len(got.run), sum(rows[i][2] for i in got.run)))
    parked = set(range(len(rows))) - set(got.run)
    must = max(r[3] for r in rows) + 3.0 > CAP
    tightest = min(rows[i][1] for i in np.flatnonzero(got.served)) if got.served.any() else 0.0
    if parked and not must and len(got.run) > 1 and tightest:
        assert got.predicted_s <= 1.3 * tightest, "a step longer than any served one may see"
    assert all(rows[i][3] + got.predicted_s < CAP for i in parked), "parked past the ITL cap"
    if step_s(len(rows), sum(r[2] for r in rows)) <= 0.7 * min(r[1] for r in rows):
        assert got.reason == "all", "parked although everybody fits"
        assert not parked
    shuffled = list(rows)
    random.shuffle(shuffled)
    again = decide(shuffled)
    if len({r[2] for r in rows}) == len({r[3] for r in rows}) == len(rows):
        assert {shuffled[i] for i in again.run} == {rows[i] for i in got.run}


def serve(
    kairos: bool,
    rate: float,
    seed: int,
    count: int = 200,
    stall_s: float = 0.0,
    noise: float = 0.0,
    reserve_tokens: float = 0.0,
) -> Any:
    """A decode server under Poisson arrivals. Returns (met their TPOT (count,), tokens/s, max ITL).

    First token on arrival; context lognormal (median 400, sigma 1.3, max 16k), output lognormal
    (median 80, sigma 0.7, max 400). `stall_s`: every 150th step takes that much longer, unforeseen.
    `noise`: sigma of a lognormal factor on every step's time, unforeseen.
    """
    rng = np.random.default_rng(seed)
    first = np.cumsum(rng.exponential(1 / rate, count))
    context = np.minimum(16_000, 400 * np.exp(1.3 * rng.standard_normal(count)))
    tokens = np.clip(80 * np.exp(0.7 * rng.standard_normal(count)), 2, 400).astype(int)
    emitted, last = np.ones(count, int), first.copy()
    now, steps, worst = float(first[0]), 0, 0.0
    while (emitted < tokens).any():
        live = np.flatnonzero((first <= now) & (emitted < tokens))
        if live.size == 0:
            now = float(first[first > now].min())
            continue
        reads = context[live] + emitted[live]
        if kairos:
            slack = first[live] + emitted[live] * TPOT - now
            got = choose_step(
                slack,
                np.full(live.size, TPOT),
                reads,
                now - last[live],
                step_s,
                reserve_tokens=reserve_tokens,
                max_itl_s=CAP,
            )
            live, reads = live[got.run], reads[got.run]
        steps += 1
        scatter = float(np.exp(noise * rng.standard_normal()))
        now += scatter * step_s(live.size, reads.sum()) + (stall_s if steps % 150 == 0 else 0.0)
        worst = max(worst, float((now - last[live]).max()))
        emitted[live] += 1
        last[live] = now
    met = (last - first) / (tokens - 1) <= TPOT + 1e-9
    return met, tokens.sum() / (now - first[0]), worst


def test_below_capacity_nothing_is_lost() -> None:
    for seed in range(2):
        stock, kairos = serve(False, 7, seed), serve(True, 7, seed)
        assert not (stock[0] & ~kairos[0]).any(), "a request that stock would have served on pace"
        assert kairos[1] >= 0.999 * stock[1]


@pytest.mark.parametrize(
    ("rate", "least", "gain"), [(12, 0.95, 0.1), (14, 0.9, 0.3), (16, 0.85, 0.4)]
)
def test_above_capacity_far_more_stay_on_pace(rate: float, least: float, gain: float) -> None:
    stock = [serve(False, rate, seed) for seed in range(2)]
    kairos = [serve(True, rate, seed) for seed in range(2)]
    attained = [float(np.mean([run[0].mean() for run in runs])) for runs in (stock, kairos)]
    assert attained[1] >= least
    assert attained[1] >= attained[0] + gain
    assert np.mean([r[1] for r in kairos]) >= 0.97 * np.mean([r[1] for r in stock])
    assert max(r[2] for r in kairos) <= CAP


def test_a_stall_that_sets_everybody_back_is_caught_up_with() -> None:
    stock, kairos = (serve(k, 12, 1, stall_s=0.2)[0].mean() for k in (False, True))
    assert kairos >= stock + 0.1


def test_where_steps_scatter_a_lead_to_end_with_keeps_more_on_pace() -> None:
    def attained(reserve_tokens: float) -> float:
        runs = [serve(True, 16, seed, noise=0.2, reserve_tokens=reserve_tokens) for seed in (1, 2)]
        return float(np.mean([run[0].mean() for run in runs]))

    assert attained(reserve_of(0.16)) >= attained(0.0) + 0.02


def test_nobody_is_silent_past_the_cap_although_steps_scatter() -> None:
    for seed in range(3):
        assert serve(True, 18, seed, noise=0.2, reserve_tokens=3.0)[2] <= CAP


def test_the_reserve_grows_with_the_error_up_to_a_limit_and_shortens_the_room() -> None:
    reserves = [reserve_of(error) for error in (0.0, 0.01, 0.1, 10.0)]
    assert reserves[0] == 0.0 and reserves == sorted(reserves) and reserves[-1] == MOST_RESERVE
    rooms = [longest_full_step_s(TPOT, reserve) for reserve in reserves]
    assert rooms[0] == TPOT and rooms == sorted(rooms, reverse=True) and rooms[-1] > 0.7 * TPOT


def test_with_a_reserve_who_has_no_lead_is_given_shorter_steps() -> None:
    plain, careful = (choose([400] * 70, slack=TPOT, reserve_tokens=r) for r in (0.0, 6.0))
    assert plain.predicted_s <= TPOT and careful.predicted_s <= 0.9 * TPOT
    rich = choose([400] * 70, slack=7 * TPOT, reserve_tokens=6.0)
    assert rich.run == plain.run, "a lead as large as the reserve is enough"
