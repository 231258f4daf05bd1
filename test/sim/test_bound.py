"""The bound: exact where that can be checked, and above everything that policies attain."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.loads.traces import Request
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.bound.bound import Bound, share_of_bound, ttft_bound
from sglang_kairos.sim.bound.solve import by_intervals, in_order, most_on_time
from sglang_kairos.sim.bound.work import Jobs, charge, floor_law
from sglang_kairos.sim.core.cluster import Setup, SimCluster
from sglang_kairos.sim.hardware.tables import MeasuredSteps, TableTimes
from sglang_kairos.sim.hardware.times import LawTimes, System

pytest.importorskip("scipy")

LAW = LawTimes(PrefillLatency(5e-3, 1e-4, 2e-8), DecodeLatency(3.5e-3, 0.22e-3, 0.65e-6))
SYSTEM = System(
    LAW,
    chunk_tokens=512,
    prefill_kv_tokens=20_000,
    decode_kv_tokens=50_000,
    max_running=64,
    reserved_tokens=8,
    kv_bytes=4096,
    link_bytes_per_s=1e9,
    link_latency_s=2e-3,
)
PADDED = replace(SYSTEM, times=LawTimes(PrefillLatency(5e-3, 1e-4, 2e-8, 1e-8), LAW.decode_law))
BLOCK = 64


def jobs_of(*table: tuple[float, float, float]) -> Jobs:
    columns = np.array(sorted(table), float).reshape(-1, 3).T
    return Jobs(columns[0], columns[1], columns[2])


def edf_meets_all(jobs: list[tuple[float, float, float]]) -> bool:
    """Preemptive earliest deadline first on one server: meets all deadlines if anything does."""
    queue: list[list[float]] = []
    coming, now = sorted(jobs), 0.0
    while coming or queue:
        if not queue:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            _, deadline, work = coming.pop(0)
            heapq.heappush(queue, [deadline, work])
        until = coming[0][0] if coming else float("inf")
        ran = min(queue[0][1], until - now)
        now += ran
        queue[0][1] -= ran
        if queue[0][1] <= 0:
            if heapq.heappop(queue)[0] < now:
                return False
    return True


def by_trying_all(jobs: list[tuple[float, float, float]]) -> int:
    return max(
        count
        for count in range(len(jobs) + 1)
        if any(edf_meets_all(list(some)) for some in itertools.combinations(jobs, count))
    )


whole_jobs = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 6)).map(
        lambda job: (float(job[0]), float(job[0] + job[1]), float(job[2]))
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=50)
@given(whole_jobs)
def test_one_server_is_solved_exactly(table: list[tuple[float, float, float]]) -> None:
    best = by_trying_all(table)
    assert by_intervals(jobs_of(*table), 1, 10.0) == (best, best)
    assert most_on_time(jobs_of(*table), 1, 10.0)[:2] == (best, best)


@given(whole_jobs, st.integers(2, 9))
def test_in_order_is_exact_for_equal_windows(
    table: list[tuple[float, float, float]], window: int
) -> None:
    table = [(release, release + window, work) for release, _, work in table]
    assert in_order(jobs_of(*table)) == by_trying_all(table)


@settings(max_examples=40)
@given(whole_jobs, st.integers(2, 9))
def test_pooling_servers_is_never_below_the_programme(
    table: list[tuple[float, float, float]], window: int
) -> None:
    jobs = jobs_of(*((release, release + window, work) for release, _, work in table))
    assert in_order(jobs, 2) >= by_intervals(jobs, 2, 10.0)[0]


def test_one_job_cannot_use_two_servers_at_once() -> None:
    assert by_intervals(jobs_of((0, 4, 5)), 2, 10.0) == (0, 0)
    # McNaughton: three jobs of 2 s fit two servers in 3 s, though no server takes two whole.
    assert by_intervals(jobs_of((0, 3, 2), (0, 3, 2), (0, 3, 2)), 2, 10.0) == (3, 3)


@settings(max_examples=40)
@given(whole_jobs)
def test_widening_windows_only_raises_the_bound(table: list[tuple[float, float, float]]) -> None:
    jobs = jobs_of(*table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang_kairos.sim.bound.solve.MAX_PAIRS", 2 * len(table))
        bound, found = by_intervals(jobs, 1, 10.0)
    assert bound >= by_trying_all(table) >= found


def test_the_bound_holds_when_the_solver_is_stopped_at_once() -> None:
    rng = np.random.default_rng(1)
    table = [(t, t + w, p) for t, w, p in rng.uniform((0, 1, 0.5), (40, 20, 3), (60, 3)).tolist()]
    bound, found = by_intervals(jobs_of(*table), 1, 1e-6)
    best, _ = by_intervals(jobs_of(*table), 1, 20.0)
    assert found <= best <= bound <= 60


@st.composite
def traces(draw: st.DrawFn) -> list[Request]:
    """Up to 14 requests in bursts, whose prompts share prefixes with earlier and later ones."""
    rows, at, trunk = [], 0.0, tuple(range(12))
    for index in range(draw(st.integers(1, 14))):
        at += draw(st.sampled_from((0.0, 0.0, 0.01, 0.05, 0.2)))
        tokens = draw(st.integers(1, 900))
        shared = draw(st.integers(0, 12))
        family = 100 * draw(st.integers(0, 1))
        own = range(1000 * (index + 1), 1000 * (index + 1) + 20)
        names = (*(family + block for block in trunk[:shared]), *own)[: -(-tokens // BLOCK)]
        rows.append(Request(at, tokens, draw(st.integers(1, 5)), names, BLOCK))
    return rows


@settings(max_examples=40)
@given(
    traces(),
    st.sampled_from(((60.0,), (150.0,), (40.0, 120.0, 400.0))),
    st.integers(1, 2),
    st.sampled_from((SYSTEM, PADDED)),
)
def test_no_policy_exceeds_the_bound(
    rows: list[Request], ttft_ms: tuple[float, ...], prefills: int, system: System
) -> None:
    setup = Setup(system, ttft_ms, prefills=prefills)
    bound = ttft_bound(rows, setup, time_limit_s=10.0)
    for name in ("fcfs", "lpm", "shortest-prefill-first", "edf", "kairos", "kairos-no-pause"):
        metrics = SimCluster(setup, POLICIES[name], rows).run().metrics
        assert metrics.e2e_attainment <= metrics.ttft_attainment <= bound.ttft_attainment
        assert 0 <= share_of_bound(metrics.ttft_attainment, bound) <= 1


@settings(max_examples=25)
@given(traces(), st.integers(1, 2))
def test_more_servers_or_more_time_never_lower_the_bound(
    rows: list[Request], prefills: int
) -> None:
    def at(ttft_ms: tuple[float, ...], servers: int) -> float:
        setup = Setup(SYSTEM, ttft_ms, prefills=servers)
        return ttft_bound(rows, setup, time_limit_s=10.0).ttft_attainment

    assert at((80.0,), prefills) <= at((80.0,), prefills + 1)
    assert at((80.0,), prefills) <= at((120.0,), prefills)
    assert at((40.0, 90.0), prefills) <= at((60.0, 90.0), prefills)


def test_a_request_alone_is_on_time_exactly_if_it_is_simulated_to_be() -> None:
    for tokens in (1, 500, 512, 513, 1500):
        rows = [Request(0.0, tokens, 2)]
        setup = Setup(SYSTEM, (10_000.0,))
        needs_ms = SimCluster(setup, POLICIES["fcfs"], rows).run().outcomes[0].ttft_ms
        # The last chunk might have been one token, a fixed cost and hardly a transfer later.
        for factor, share in ((0.97, 0.0), (1.001, 1.0)):
            tried = replace(setup, ttft_ms=(needs_ms * factor,))
            assert ttft_bound(rows, tried).ttft_attainment == share


def test_a_prefix_is_paid_for_once_and_by_the_first_to_come() -> None:
    first = Request(0.0, 256, 1, (1, 2, 3, 4), BLOCK)
    longer = Request(1.0, 300, 1, (1, 2, 3, 4, 5), BLOCK)
    again = Request(2.0, 256, 1, (1, 2, 3, 4), BLOCK)
    work_s = charge([first, longer, again], Setup(SYSTEM)).work_s
    a, b, c = 5e-3, 1e-4, 2e-8
    fixed_s = a / 512
    assert work_s == pytest.approx(
        [
            256 * (b + fixed_s) + c * 256 * 128,
            44 * (b + fixed_s) + c * 44 * (256 + 22),
            1 * (b + fixed_s) + c * (255 + 0.5),
        ]
    )


def test_a_prefix_brought_by_a_later_request_does_not_break_the_bound() -> None:
    # The first to come waits for the second, which computes what both need, and is on time.
    rows = [
        Request(0.0, 512, 1, tuple(range(8)), BLOCK),
        Request(0.001, 450, 1, tuple(range(7)), BLOCK),
    ]
    jobs = charge(rows, Setup(SYSTEM, (1000.0,)))
    whole_s = charge(rows[:1], Setup(SYSTEM, (1000.0,))).work_s[0]
    assert jobs.work_s[0] == pytest.approx(whole_s) and jobs.work_s[1] < 0.02


def test_what_the_cluster_refuses_is_not_on_time() -> None:
    rows = [Request(0.0, 30_000, 1), Request(0.0, 100, 1)]
    assert ttft_bound(rows, Setup(SYSTEM, (1e6,))).ttft_attainment == 0.5


def test_an_empty_trace_attains_nothing_and_misses_nothing() -> None:
    bound = ttft_bound([], Setup(SYSTEM))
    assert (bound.ttft_attainment, bound.exact, bound.gap) == (0.0, True, 0.0)
    assert share_of_bound(0.0, bound) == 1.0


def test_attaining_more_than_possible_is_refused() -> None:
    assert share_of_bound(0.4, Bound(0.5, "mip", True, 0.0, 0.1)) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="exceeds the bound"):
        share_of_bound(0.6, Bound(0.5, "mip", True, 0.0, 0.1))


def test_a_time_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="time_limit_s"):
        ttft_bound([], Setup(SYSTEM), time_limit_s=0.0)


@cache
def bent_table(seed: int) -> TableTimes:
    """A law's table with every entry off by up to 20 %."""
    rng = np.random.default_rng(seed)
    new, prefix = np.array([1.0, 64, 200, 512]), np.array([0.0, 300, 2000])
    shared = (3e-3 + 1e-4 * new) * rng.uniform(0.8, 1.2, 4)
    attention = 2e-3 + 2e-8 * new * (prefix[:, None] + new / 2)
    context, sizes = np.array([100.0, 1000.0]), (1, 64)
    decode = np.array([[4e-3, 5e-3], [9e-3, 2e-2]])
    table = MeasuredSteps(
        new, prefix, shared, attention * rng.uniform(0.8, 1.2, (3, 4)), sizes, context, decode
    )
    return TableTimes(table, LAW)


@cache
def law_under(seed: int) -> tuple[float, float, float, float]:
    return floor_law(bent_table(seed), 512, 3600)


@given(
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(1, 512), st.integers(0, 3000)), min_size=1, max_size=6),
)
def test_the_law_under_a_table_is_under_every_step(seed: int, batch: list[tuple[int, int]]) -> None:
    times = bent_table(seed)
    a, b, c, d = law_under(seed)
    while sum(new for new, _ in batch) > 512:
        batch = [(max(1, new // 2), prefix) for new, prefix in batch]
    law_s = a + sum(b * n + c * n * (p + n / 2) + d * (p + n) ** 2 for n, p in batch)
    assert min(a, b, c, d) >= 0
    assert law_s <= times.prefill_s(*zip(*batch, strict=True)) * (1 + 1e-9)


def test_the_law_under_a_law_is_that_law() -> None:
    assert floor_law(LAW, 512, 9000) == (5e-3, 1e-4, 2e-8, 0.0)
    probed = floor_law(Disguised(LAW), 512, 9000)
    assert probed == pytest.approx((5e-3, 1e-4, 2e-8, 0.0), rel=1e-3, abs=1e-12)


class Disguised:
    """Step times whose law does not show."""

    def __init__(self, law: LawTimes) -> None:
        self.prefill_s, self.decode_s = law.prefill_s, law.decode_s
        self.prefill_model, self.decode_model = law.prefill_model, law.decode_model
        self.captured_sizes = law.captured_sizes


def test_no_policy_exceeds_the_bound_on_a_table() -> None:
    rows = [Request(0.03 * i, 50 + 37 * i % 700, 3) for i in range(30)]
    setup = Setup(replace(SYSTEM, times=bent_table(1)), (120.0,))
    bound = ttft_bound(rows, setup)
    for name in ("fcfs", "shortest-prefill-first", "kairos"):
        met = SimCluster(setup, POLICIES[name], rows).run().metrics.ttft_attainment
        assert 0 < met <= bound.ttft_attainment
