"""The routing policies against each other, on made-up prefill servers that keep to their law.

*Simulated*: servers work chunk by chunk in Kairos' urgency order, the router sees only what it would
see of real ones (completions, and each server's coefficients). Says nothing about any machine.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from sglang_kairos.policy.overload import Overload, verdict
from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.policy.urgency import urgency_order
from sglang_kairos.predict.latency_model import PrefillLatency
from sglang_kairos.router.clock import Clock
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.reservation import Reservation
from sglang_kairos.router.fleet.servers import PrefillServer
from sglang_kairos.router.options import RouterOptions

CHUNK, SLO_S = 512, 1.0
POLICIES = ("random", "round_robin", "least_load", "power_of_two", "cache_aware")


@dataclass
class Job:
    arrived_s: float
    left: float
    reservation: Reservation


@dataclass
class Worker:
    """A prefill server: as fast as its `law`, one chunk at a time, the most urgent first."""

    books: PrefillServer
    law: PrefillLatency
    jobs: list[Job] = field(default_factory=list)
    running: Job | None = None
    until_s: float = 0.0

    def next_chunk(self, now: float) -> None:
        """Start the chunk of whoever is most urgent."""
        works = [self.law.work_s(job.left, 0.0, CHUNK) for job in self.jobs]
        due = [job.reservation.request.deadline_s - now for job in self.jobs]
        self.running = self.jobs[urgency_order(works, due).order[0]]
        self.until_s = now + self.law.work_s(min(CHUNK, self.running.left))


@dataclass
class Run:
    """Fractions of requests: on time of all sent, on time of those accepted, shed."""

    met: float
    accepted_met: float
    shed: float


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


def arrivals(rate: float, count: int, seed: int) -> Iterator[tuple[float, float]]:
    rng, now = random.Random(seed), 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        yield now, max(1.0, min(8000.0, rng.lognormvariate(6.0, 1.3)))


def simulate(
    clock: list[float],
    policy: str,
    slow: float,
    load: float,
    shed: bool = False,
    lies: float = 1.0,
    count: int = 500,
    seed: int = 0,
) -> Run:
    """Two servers, the second at `slow` of the first's speed, at `load` of what both can take.

    The second says of itself that it is `lies` times as fast as it is.
    """
    clock[0] = 0.0
    fleet = Fleet(
        RouterOptions(
            prefills=(("http://p0", 1), ("http://p1", 1)),
            decodes=("http://d",),
            policy=policy,
            seed=1,
        ),
        Clock(lambda: clock[0]),
    )
    laws = [PrefillLatency(4e-3 / s, 150e-6 / s, 20e-9 / s) for s in (1.0, slow)]
    workers = [Worker(b, s) for b, s in zip(fleet.prefills, laws, strict=True)]
    for worker, lie in zip(workers, (1.0, lies), strict=True):
        law = worker.law.scaled(1 / lie).to_json()
        info = {"chunked_prefill_size": CHUNK, "internal_states": [{"kairos": {"prefill": law}}]}
        worker.books.learn(info)
    mean = sum(laws[0].work_s(n, 0.0, CHUNK) for _, n in arrivals(1.0, 3000, 99)) / 3000
    met = refused = accepted = 0
    pending = list(arrivals(load * (1 + slow) / mean, count, seed))
    pending.reverse()
    while pending or any(worker.jobs for worker in workers):
        busy = [(w.until_s, i) for i, w in enumerate(workers) if w.running]
        heapq.heapify(busy)
        if pending and (not busy or pending[-1][0] <= busy[0][0]):
            now, tokens = pending.pop()
            clock[0] = now
            request = PlacedRequest(tokens, now + SLO_S)
            found = fleet.reserve(request)
            assert found is not None
            if shed and verdict(Overload.SHED, found.outcome) is Overload.SHED:
                refused += 1
                continue
            accepted += 1
            worker = workers[fleet.prefills.index(found.prefill)]
            worker.jobs.append(Job(now, tokens, found.take()))
            if worker.running is None:
                worker.next_chunk(now)
            continue
        clock[0], index = busy[0]
        worker = workers[index]
        job = worker.running
        assert job is not None
        job.left -= CHUNK
        if job.left <= 0:
            worker.jobs.remove(job)
            job.reservation.prefilled()
            job.reservation.release()
            met += clock[0] <= job.arrived_s + SLO_S
        worker.running = None
        if worker.jobs:
            worker.next_chunk(clock[0])
    return Run(met / count, met / max(1, accepted), refused / count)


def test_with_unequal_servers_kairos_keeps_clearly_more(clock: list[float]) -> None:
    ours = simulate(clock, "kairos", 0.3, 0.8)
    for policy in POLICIES:
        theirs = simulate(clock, policy, 0.3, 0.8)
        assert ours.met >= theirs.met + 0.02, (policy, ours, theirs)


def test_with_equal_servers_kairos_is_not_worse(clock: list[float]) -> None:
    ours = simulate(clock, "kairos", 1.0, 0.8)
    for policy in POLICIES:
        theirs = simulate(clock, policy, 1.0, 0.8)
        assert ours.met >= theirs.met - 0.003, (policy, ours, theirs)


@pytest.mark.parametrize(("slow", "load"), [(0.3, 1.6), (1.0, 1.2)])
def test_in_overload_what_is_accepted_is_on_time_and_shedding_costs_no_goodput(
    clock: list[float], slow: float, load: float
) -> None:
    shedding = simulate(clock, "kairos", slow, load, shed=True)
    assert shedding.shed > 0.02
    assert shedding.accepted_met >= 0.95, shedding
    serving = simulate(clock, "kairos", slow, load)
    assert shedding.met >= serving.met - 0.02, (shedding, serving)


def test_without_overload_nearly_nobody_is_shed_who_would_have_been_on_time(
    clock: list[float],
) -> None:
    shedding = simulate(clock, "kairos", 1.0, 0.5, shed=True)
    serving = simulate(clock, "kairos", 1.0, 0.5)
    assert shedding.shed <= 1.0 - serving.met + 0.02, (shedding, serving)


def test_a_server_slower_than_it_says_is_found_out(clock: list[float]) -> None:
    honest = simulate(clock, "kairos", 0.3, 0.8)
    lying = simulate(clock, "kairos", 0.3, 0.8, lies=2.5)
    assert lying.met >= honest.met - 0.02, (lying, honest)
    assert simulate(clock, "kairos", 0.3, 1.6, shed=True, lies=2.5).accepted_met >= 0.95
