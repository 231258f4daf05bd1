"""Prefill order, the plan of a step, and the starvation bound."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.policy.prefill_step import PrefillPlan, PrefillQueue, plan_prefill
from sglang_kairos.policy.urgency import LateShare, moore_hodgson, urgency_order

# Quarters add up exactly, so that a sum equal to a deadline is on time in any order of addition.
works = st.integers(1, 40).map(lambda q: q / 4)
dues = st.integers(-20, 160).map(lambda q: q / 4)
jobs = st.lists(st.tuples(works, dues), min_size=0, max_size=30)


def met(order: Any, work: Any, due: Any) -> int:
    now, count = 0.0, 0
    for index in order:
        now += work[index]
        count += now <= due[index]
    return count


def split(rows: Any) -> tuple[list[float], list[float]]:
    return [w for w, _ in rows], [d for _, d in rows]


@pytest.mark.parametrize(
    ("name", "work", "due", "order", "on_time"),
    [
        ("nothing waits", [], [], [], 0),
        ("all fit: earliest deadline first", [1, 1, 1], [9, 3, 5], [1, 2, 0], 3),
        ("the longest is dropped, not the last", [5, 1, 1], [5, 5.5, 6], [1, 2, 0], 2),
        ("a passed deadline is late", [1, 1], [-1, 9], [1, 0], 1),
        ("one that cannot make it alone pushes nobody out", [9, 1], [8, 10], [1, 0], 1),
        ("late ones go shortest first", [3, 2, 1], [0, 0, 0], [2, 1, 0], 0),
        ("late and equally long: earlier deadline first", [2, 2], [-1, -5], [1, 0], 0),
        ("full ties keep their index", [1, 1, 1], [3, 3, 3], [0, 1, 2], 3),
        ("exactly at the deadline is on time", [2, 3], [2, 5], [0, 1], 2),
    ],
)
def test_order(name: str, work: Any, due: Any, order: list[int], on_time: int) -> None:
    got = urgency_order(work, due)
    assert (got.order, got.on_time) == (order, on_time), name


def test_starving_goes_first_and_the_rest_is_planned_behind_it() -> None:
    # 0 is on time by itself, but not behind the 5 s of the starving request 1.
    got = urgency_order([1, 5, 1], [2, -9, 7], starving=[False, True, False])
    assert got.order == [1, 2, 0]
    assert got.on_time == 1


def test_several_starving_go_oldest_deadline_first() -> None:
    assert urgency_order([1, 1, 1], [-1, -7, 5], starving=[True, True, False]).order == [1, 0, 2]


def test_weight_decides_who_is_dropped() -> None:
    assert moore_hodgson([3, 2], [3, 4]).tolist() == [False, True]
    assert moore_hodgson([3, 2], [3, 4], [10, 1]).tolist() == [True, False]


@settings(max_examples=60, deadline=None)
@given(jobs)
def test_at_least_as_many_on_time_as_edf_spt_and_fcfs(rows: Any) -> None:
    work, due = split(rows)
    got = urgency_order(work, due)
    everyone = range(len(work))
    assert sorted(got.order) == list(everyone)
    assert met(got.order, work, due) == got.on_time
    for rival in (lambda i: due[i], lambda i: work[i], lambda i: i):
        assert got.on_time >= met(sorted(everyone, key=rival), work, due)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(works, dues), max_size=8))
def test_equals_brute_force(rows: Any) -> None:
    work, due = split(rows)
    by_due = sorted(range(len(work)), key=lambda i: due[i])
    best = max(
        size
        for size in range(len(work) + 1)
        for subset in itertools.combinations(by_due, size)
        if met(subset, work, due) == size
    )
    assert int(moore_hodgson(work, due).sum()) == best


@settings(max_examples=60, deadline=None)
@given(jobs, st.data())
def test_weighted_set_is_feasible_and_equal_weights_change_nothing(rows: Any, data: Any) -> None:
    work, due = split(rows)
    weight = data.draw(st.lists(st.floats(0.1, 10), min_size=len(work), max_size=len(work)))
    kept = np.flatnonzero(moore_hodgson(work, due, weight))
    assert met(sorted(kept, key=lambda i: due[i]), work, due) == len(kept)
    same = moore_hodgson(work, due, [2.0] * len(work))
    assert same.sum() == moore_hodgson(work, due).sum()


def plan(
    tokens: list[int], partial: list[int] | None = None, due: Any = None, **kw: Any
) -> PrefillPlan:
    """A plan for chunks of 512; work is a second per 1000 tokens, deadlines ascend by index."""
    partials = partial or []
    fixed_s = kw.pop("fixed_s", 0.0)
    queue = PrefillQueue(
        work_s=[t / 1000 + fixed_s * -(-t // 512) for t in tokens],
        deadline_s=list(range(10, 10 + len(tokens))) if due is None else due,
        tokens=tokens,
        partial=[i in partials for i in range(len(tokens))],
        starving=kw.pop("starving", None),
        fixed_s=fixed_s,
    )
    setting: dict[str, Any] = {"chunk_tokens": 512, "current": partials[0] if partials else -1}
    setting |= {"free_tokens": 100_000, "max_paused": 8}
    return plan_prefill(queue, **setting | kw)


@pytest.mark.parametrize(
    ("name", "got", "order", "slot", "limit", "hold"),
    [
        ("nothing to do", plan([]), [], -1, None, []),
        ("short ones fill the chunk, the next starts with the rest", plan([200, 200, 900]),
         [0, 1, 2], -1, None, []),
        ("one that starts takes the whole budget", plan([900, 100]), [0, 1], -1, None, []),
        ("a lone partial runs uncapped", plan([900], [0]), [], 0, None, []),
        ("an urgent short one goes beside the partial", plan([100, 900], [1]), [0], 1, 412, []),
        ("a partial's end leaves room for others", plan([100, 300], [0]), [1], 0, None, []),
        ("a partial's end leaves room for a new long one", plan([100, 900], [0]),
         [1], 0, None, []),
        ("a more urgent long one pauses the partial", plan([900, 900], [1]), [0], -1, None, []),
        ("no crumbs for a partial", plan([500, 900], [1]), [0], -1, None, []),
        ("a short one behind a partial that got no crumb still fits", plan([500, 900, 12], [1]),
         [0, 2], -1, None, []),
        ("no pausing allowed: the partial keeps an eighth", plan([400, 100, 900], [2],
         max_paused=0), [0, 1], 2, 112, []),
        ("no pausing allowed: a long one waits and the partial takes all", plan([900, 900], [1],
         max_paused=0), [0], 1, None, []),
        ("too little KV: the partial runs instead", plan([900, 900], [1], free_tokens=1000),
         [0], 1, None, []),
        ("too little KV and the partial ends: the long one is held", plan([900, 100, 900], [1, 2],
         free_tokens=1000), [], 1, None, [0]),
        ("forced runs whatever its urgency", plan([100, 900, 900], [1, 2], forced=2),
         [0], 2, None, []),
        ("limits are whole pages", plan([100, 900], [1], page_size=64), [0], 1, 384, []),
        ("the paused one takes over when more urgent", plan([900, 900], [0, 1], current=1),
         [], 0, None, []),
        ("at the pause limit a partial must run", plan([900, 900, 900], [1, 2], max_paused=1),
         [0], 1, None, []),
    ],
)  # fmt: skip
def test_plan(
    name: str, got: PrefillPlan, order: list[int], slot: int, limit: int | None, hold: list[int]
) -> None:
    assert (got.order, got.slot, got.chunk_limit, got.hold) == (order, slot, limit, hold), name


def test_late_long_requests_do_not_block_short_ones_behind_them() -> None:
    got = plan([5000, 300, 300], due=[-1, 5, 6])
    assert got.order[:2] == [1, 2]


def test_a_burst_with_one_deadline_runs_shortest_first() -> None:
    """By index each step would begin another one and finish none (partials have the last indices)."""
    assert urgency_order([3, 1, 2], [9, 9, 9]).order == [1, 2, 0]
    assert plan([900, 300], [1], due=[9, 9]).slot == 1


@pytest.mark.parametrize(
    ("name", "got", "order", "slot", "limit", "hold"),
    [
        # A second per 1000 tokens: with 200 done at 0.2, 200 more would end the step at 0.4.
        ("room for both", plan([200, 200], due=[0.4, 1]), [0, 1], -1, None, []),
        ("the second would make the first late", plan([200, 200], due=[0.39, 1]),
         [0], -1, None, [1]),
        ("nor does a shorter one slip in", plan([200, 200, 50], due=[0.39, 1, 1.1]),
         [0], -1, None, [1, 2]),
        ("who is late anyway does not stop the others", plan([200, 200], due=[0.1, 1]),
         [1, 0], -1, None, []),
        ("a partial takes what is in time", plan([200, 900], [1], due=[0.4, 5]),
         [0], 1, 200, []),
        ("and nothing if that is a crumb", plan([200, 900], [1], due=[0.25, 5]),
         [0], -1, None, []),
        ("in whole pages", plan([200, 900], [1], due=[0.45, 5], page_size=64), [0], 1, 192, []),
        ("a new long one waits for its own step", plan([200, 900], due=[0.4, 5]),
         [0], -1, None, [1]),
        ("at the pause limit the partial runs all the same", plan([200, 900, 900], [1, 2],
         due=[0.25, 5, 6], max_paused=1, current=1), [0], 1, 312, []),
        ("the step's fixed cost counts once", plan([200, 200], due=[0.51, 1], fixed_s=0.1),
         [0, 1], -1, None, []),
    ],
)  # fmt: skip
def test_a_step_ends_before_a_member_is_late(
    name: str, got: PrefillPlan, order: list[int], slot: int, limit: int | None, hold: list[int]
) -> None:
    assert (got.order, got.slot, got.chunk_limit, got.hold) == (order, slot, limit, hold), name


def replay(queue: PrefillQueue, got: PrefillPlan, chunk: int, page: int) -> tuple[int, int]:
    """What SGLang makes of a plan: how many requests run, and which starts chunking (or -1)."""
    members, started = members_of(queue, got, chunk, page)
    return len(members), started


def members_of(
    queue: PrefillQueue, got: PrefillPlan, chunk: int, page: int
) -> tuple[dict[int, int], int]:
    """The step's requests with the tokens that they take, and which starts chunking (or -1)."""
    left, started, taken = chunk, -1, False
    members: dict[int, int] = {}
    if got.slot >= 0:
        room = min(left, got.chunk_limit if got.chunk_limit is not None else left)
        taken = queue.tokens[got.slot] > room // page * page
        members[got.slot] = min(int(queue.tokens[got.slot]), room // page * page)
        left -= min(-(-queue.tokens[got.slot] // page) * page, room // page * page)
    for index in got.order:
        if left <= 0:
            break
        need = -(-queue.tokens[index] // page) * page
        if need <= left:
            left -= need
            members[index] = int(queue.tokens[index])
            continue
        if left // page:
            assert not taken, "a second chunked request"
            started, taken = index, True
            members[index] = left // page * page
        break
    return members, started


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_step_is_filled_beyond_what_a_member_can_bear(data: Any) -> None:
    """Walked in order, nobody who comes later makes one late who ends in this step on time.

    Only a partial that has to run, because no more may be paused, may.
    """
    draw = data.draw
    n = draw(st.integers(1, 9))
    count = draw(st.integers(0, min(2, n)))
    page, chunk = draw(st.sampled_from([(1, 64), (1, 512), (16, 512)]))
    fixed_s = draw(st.sampled_from([0.0, 0.02]))
    column = lambda kind: draw(st.lists(kind, min_size=n, max_size=n))  # noqa: E731
    tokens = column(st.integers(1, 1500))
    queue = PrefillQueue(
        work_s=[1e-3 * t + fixed_s * -(-t // chunk) for t in tokens],
        deadline_s=column(st.floats(-0.1, 1.5)),
        tokens=tokens,
        partial=[i < count for i in range(n)],
        fixed_s=fixed_s,
    )
    got = plan_prefill(
        queue,
        chunk_tokens=chunk,
        current=-1,
        free_tokens=10**6,
        max_paused=draw(st.integers(max(1, count - 1), 4)),
        page_size=page,
    )
    members, _ = members_of(queue, got, chunk, page)
    rank = {
        index: at for at, index in enumerate(urgency_order(queue.work_s, queue.deadline_s).order)
    }
    total = fixed_s + sum(1e-3 * taken for taken in members.values())
    for index, taken in members.items():
        due = queue.deadline_s[index]
        before = [i for i in members if rank[i] <= rank[index]]
        alone = fixed_s + sum(1e-3 * members[i] for i in before)
        if taken < tokens[index] or alone > due - 1e-9:
            continue
        spared = 1e-3 * members[got.slot] if got.slot >= 0 and got.slot not in before else 0.0
        assert total - spared <= due + 1e-6


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_plan_is_legal_and_makes_progress(data: Any) -> None:
    draw = data.draw
    n = draw(st.integers(1, 9))
    count = draw(st.integers(0, min(3, n)))
    page = draw(st.sampled_from([1, 16, 64]))
    chunk = draw(st.sampled_from([64, 128, 512]))
    partial = [i < count for i in range(n)]
    current = draw(st.integers(-1, count - 1))
    max_paused = draw(st.integers(max(0, count - (current >= 0)), 4))
    if max_paused == 0 and count:
        current = 0
    forced = draw(st.sampled_from([-1, *range(count)])) if max_paused else -1
    column = lambda kind: draw(st.lists(kind, min_size=n, max_size=n))  # noqa: E731
    queue = PrefillQueue(
        work_s=column(works),
        deadline_s=column(dues),
        tokens=column(st.integers(1, 1500)),
        partial=partial,
        starving=column(st.booleans()),
    )
    free = draw(st.integers(0, 5000))
    got = plan_prefill(
        queue,
        chunk_tokens=chunk,
        current=current,
        free_tokens=free,
        max_paused=max_paused,
        page_size=page,
        forced=forced,
    )
    assert sorted(got.order + got.hold) == [i for i in range(n) if not partial[i]]
    assert got.slot == -1 or partial[got.slot]
    ran, started = replay(queue, got, chunk, page)
    assert ran > 0, "nothing runs although something could"
    finished = got.slot >= 0 and queue.tokens[got.slot] <= (got.chunk_limit or chunk)
    paused = count - (got.slot >= 0)
    assert paused <= max_paused
    if max_paused == 0 and count:
        assert got.slot == current
    if forced >= 0:
        assert got.slot == forced and got.chunk_limit is None
    if got.chunk_limit is not None:
        assert got.chunk_limit % page == 0
        assert got.chunk_limit >= min(chunk // 8 // page * page, queue.tokens[got.slot])
    if started >= 0 and paused:
        owed = sum(queue.tokens[i] for i in range(count)) + queue.tokens[started]
        assert owed <= free
    assert not (started >= 0 and got.slot >= 0 and not finished)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 1), st.lists(st.integers(1, 2000), max_size=200))
def test_late_requests_never_exceed_their_share_by_more_than_one_job(
    share: float, sizes: list[int]
) -> None:
    bucket, earned, spent = LateShare(share, burst_tokens=4000), 0, 0
    for size in sizes:
        if bucket.may_spend():
            bucket.spend(size)
            spent += size
        bucket.earn(size)
        earned += size
        assert spent <= share * earned + max(sizes)


def test_share_zero_never_pays_and_a_quiet_hour_buys_one_burst() -> None:
    assert not LateShare(0.0).may_spend()
    bucket = LateShare(0.5, burst_tokens=100)
    bucket.earn(1e9)
    bucket.spend(101)
    assert not bucket.may_spend()
