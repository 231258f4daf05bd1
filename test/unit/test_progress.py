"""No circular wait between prefill's and decode's KV: a model of both memories and both queues.

Decode plans with the real admission policy. Prefill admits in a random order, another one each
turn, and asks the real policy who gives way. Nothing else is assumed of either side.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.policy import standstill
from sglang_kairos.policy.admission import Occupancy, QueueView, plan_admission
from sglang_kairos.predict.request_statistics import RequestStatistics

PREFILL_KV, DECODE_KV, SLOTS = 600, 500, 24
TURN_S, MANY_TURNS = 0.05, 2000


@dataclass(eq=False)
class Job:
    """`attempts`: how often prefill may still compute it before its reservation."""

    arrival: int
    prompt: int
    output: int
    ttft_s: float
    tpot_s: float
    attempts: int = 0
    reserved: bool = False
    computed: bool = False
    left: int = field(default=0)


class Pair:
    """One prefill and one decode server; `early`: decode reserves before it knows of the prefill."""

    def __init__(self, jobs: list[Job], early: bool, seed: int, ready_only: bool = True) -> None:
        self.jobs, self.early, self.ready_only = jobs, early, ready_only
        self.rng, self.turn = random.Random(seed), 0
        self.uncomputed: list[Job] = []  # the bootstrap queue and the waiting queue of prefill
        self.parked: list[Job] = []
        self.sending: list[Job] = []
        self.asking: list[Job] = []
        self.coming: list[Job] = []
        self.running: list[Job] = []
        self.done = 0

    def finishes(self) -> bool:
        while self.done < len(self.jobs) and self.turn < MANY_TURNS:
            arrived = [job for job in self.jobs if job.arrival == self.turn]
            self.uncomputed += arrived
            self.asking += arrived
            self._decode()
            self._prefill()
            self.turn += 1
        return self.done == len(self.jobs)

    def _decode(self) -> None:
        for job in self.running:
            job.left -= 1
        self.done += sum(job.left <= 0 for job in self.running)
        self.running = [job for job in self.running if job.left > 0]
        if not self.asking:
            return
        now = self.turn * TURN_S
        column = lambda name: np.array([getattr(job, name) for job in self.asking], float)  # noqa: E731
        ready = np.array([self.early or job.computed for job in self.asking])
        held = [*self.running, *self.coming]
        plan = plan_admission(
            QueueView(
                now,
                column("arrival") * TURN_S,
                column("ttft_s"),
                column("tpot_s"),
                column("prompt"),
                ready=ready if self.ready_only else None,
            ),
            Occupancy(
                np.array([job.prompt for job in held], float),
                np.array([job.tpot_s for job in held], float),
                DECODE_KV,
                SLOTS,
                self._decode_kv(),
                len(held),
            ),
            lambda batch, tokens: 10e-3 + 1e-3 * batch + 1e-6 * tokens,
            RequestStatistics(),
        )
        through = [self.asking[index] for index in plan.order[: plan.count]]
        for job in through:
            if not (self.early or job.computed):
                continue  # as upstream: not ready is passed over, not having room ends it
            if self._decode_kv() + job.prompt + job.output > DECODE_KV or len(held) >= SLOTS:
                break
            job.reserved = True
            self.asking.remove(job)
            self.coming.append(job)
            if job in self.parked:
                self.parked.remove(job)
                self.sending.append(job)

    def _decode_kv(self) -> int:
        return sum(job.prompt + job.output for job in (*self.running, *self.coming))

    def _prefill(self) -> None:
        for job in self.sending:
            self.coming.remove(job)
            job.left = job.output
            self.running.append(job)
        self.sending = []
        room = PREFILL_KV - sum(job.prompt for job in self.parked)
        eligible = [j for j in self.uncomputed if j.reserved or j.attempts or not self.early]
        self.rng.shuffle(eligible)
        batch: list[Job] = []
        for job in eligible:
            if job.prompt > room:
                break
            room -= job.prompt
            batch.append(job)
        for job in batch:
            self.uncomputed.remove(job)
            job.computed = True
            (self.sending if job.reserved else self.parked).append(job)
        parked_due_s = [job.ttft_s + (job.arrival - self.turn) * TURN_S for job in self.parked]
        due = sum(job.reserved for job in self.uncomputed)
        chosen = standstill.who_gives_way(bool(batch), len(self.sending), due, parked_due_s)
        if chosen >= 0:
            job = self.parked.pop(chosen)
            job.computed, job.attempts = False, job.attempts - 1
            self.uncomputed.append(job)


sizes = st.tuples(
    st.integers(0, 30),
    st.integers(1, 450),
    st.integers(1, 50),
    st.sampled_from([0.05, 0.5, 5.0, 60.0]),
    st.sampled_from([0.005, 0.012, 0.02, 0.1]),
)
loads = st.lists(sizes, min_size=1, max_size=30)


def made(rows: Any, attempts: int) -> list[Job]:
    return [Job(*row, attempts=attempts) for row in rows]


def crowd(seed: int) -> list[Any]:
    """A burst that neither memory holds, tight targets."""
    rng = random.Random(seed)
    return [(0, rng.randint(20, 300), rng.randint(1, 30), 0.5, 0.012) for _ in range(30)]


@settings(deadline=None, max_examples=60)
@given(loads, st.integers(0, 3), st.booleans(), st.integers(0, 2**16))
def test_every_request_finishes_whatever_the_orders_sizes_and_deadlines(
    rows: Any, attempts: int, early: bool, seed: int
) -> None:
    assert Pair(made(rows, attempts), early, seed).finishes()


@pytest.mark.parametrize("seed", range(3))
def test_the_model_of_optimistic_prefill_hangs_if_nobody_gives_way(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Pair(made(crowd(seed), 3), True, seed).finishes()
    monkeypatch.setattr(standstill, "who_gives_way", lambda *a: -1)
    assert not Pair(made(crowd(seed), 3), True, seed).finishes()


def test_the_model_of_prefill_complete_hangs_if_the_gate_counts_on_who_is_not_ready() -> None:
    for seed in range(3):
        assert Pair(made(crowd(seed), 0), False, seed).finishes()
        assert not Pair(made(crowd(seed), 0), False, seed, ready_only=False).finishes()


@pytest.mark.parametrize(
    ("launched", "sending", "due", "parked", "chosen"),
    [
        (False, 0, 1, [3.0, 9.0, -1.0], 1),
        (False, 0, 1, [3.0, 3.0], 1),
        (True, 0, 1, [3.0], -1),
        (False, 1, 1, [3.0], -1),
        (False, 0, 0, [3.0], -1),
        (False, 0, 1, [], -1),
    ],
    ids=["latest due", "tie", "a step runs", "KV will be free", "nobody is due", "nobody parked"],
)
def test_who_gives_way(
    launched: bool, sending: int, due: int, parked: list[float], chosen: int
) -> None:
    assert standstill.who_gives_way(launched, sending, due, parked) == chosen
