"""Begun prefills always find the KV for their rest: a model of a paged pool, run to its end.

The pool has pages, cached prefixes that are evicted when nobody reads them, and transfers that hold
their KV until they are through. Prompts are prefilled in chunks, paused and resumed at random.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kairos.policy.prefill_step import PrefillQueue, plan_prefill
from sglang_kairos.policy.reserve import Reserve, may_begin, reserved

CHUNK = 64


@dataclass(eq=False)
class Job:
    """A prompt whose first `shared` tokens (whole pages) are those of all of its `group`."""

    tokens: int
    group: int
    shared: int
    hit: int = 0
    done: int = 0
    own_pages: int = 0

    @property
    def left(self) -> int:
        return self.tokens - self.done


class OutOfMemory(Exception):
    """What ends SGLang's scheduler."""


@dataclass
class Pool:
    """`pages` of `page` tokens. `cached`: pages of each group's prefix, `readers` of it."""

    pages: int
    page: int
    held: int = 0
    cached: dict[int, int] = field(default_factory=dict)
    readers: dict[int, int] = field(default_factory=dict)

    def ceil(self, tokens: int) -> int:
        return -(-tokens // self.page)

    @property
    def evictable(self) -> int:
        return sum(n for group, n in self.cached.items() if not self.readers.get(group))

    @property
    def free(self) -> int:
        """Tokens that are free or evictable."""
        return (self.pages - self.held - sum(self.cached.values()) + self.evictable) * self.page

    def match(self, job: Job) -> int:
        # The last token is always computed.
        return min(self.cached.get(job.group, 0), (job.tokens - 1) // self.page) * self.page

    def lock(self, job: Job, by: int) -> None:
        if job.hit:
            self.readers[job.group] = self.readers.get(job.group, 0) + by

    def grow(self, job: Job, tokens: int) -> None:
        more = self.ceil(job.done + tokens) - self.ceil(job.done)
        if more * self.page > self.free:
            raise OutOfMemory
        self.held += more
        job.own_pages += more
        job.done += tokens
        for group in list(self.cached):
            if self.held + sum(self.cached.values()) <= self.pages:
                break
            if not self.readers.get(group):
                del self.cached[group]

    def release(self, job: Job) -> None:
        """Its transfer is through: the shared part of what it computed stays, as cache."""
        self.lock(job, -1)
        self.held -= job.own_pages
        fresh = job.shared // self.page - self.cached.get(job.group, 0)
        if fresh > 0 and not job.hit:
            self.cached[job.group] = self.cached.get(job.group, 0) + fresh


class Server:
    """SGLang's prefill scheduler as far as memory goes, its decisions drawn from `rng`."""

    def __init__(self, pool: Pool, jobs: list[Job], rng: random.Random, rule: bool) -> None:
        self.pool, self.rng, self.rule = pool, rng, rule
        self.waiting, self.slot = list(jobs), None
        self.paused: list[Job] = []
        self.transfers: list[Job] = []
        self.max_begun = 0

    def begun(self) -> list[Job]:
        return [*self.paused, *([] if self.slot is None else [self.slot])]

    def step(self, admits: bool = True) -> bool:
        """One scheduling step and its batch; whether anything ran."""
        for job in [job for job in self.transfers if self.rng.random() < 0.15]:
            self.transfers.remove(job)
            self.pool.release(job)
        if admits and self.rng.random() < 0.6:
            self.swap(self.rng.choice([*self.paused, None]))
            self.rng.shuffle(self.waiting)
        ran = self.batch(admits)
        if not ran and self.paused:  # prefills that have begun are the way forward
            self.swap(self.paused[0])
            ran = self.batch(admits)
        self.max_begun = max(self.max_begun, len(self.begun()))
        return ran

    def swap(self, chosen: Job | None) -> None:
        if self.slot is not None:
            self.paused.append(self.slot)
        if chosen is not None:
            self.paused.remove(chosen)
        self.slot = chosen

    def batch(self, admits: bool) -> bool:
        """As upstream: the slot's chunk, then who waits, until the budget or the memory is full."""
        left, promised = CHUNK, 0
        runs: list[tuple[Job, int]] = []
        if (job := self.slot) is not None:
            share = CHUNK if self.rng.random() < 0.5 else CHUNK // 2
            runs.append((job, min(job.left, share)))
            left -= runs[0][1]
            promised += reserved(runs[0][1], self.pool.page)
            if job.left == runs[0][1]:
                self.slot = None
        for job in list(self.waiting) if admits else []:
            job.hit = self.pool.match(job)
            self.pool.lock(job, 1)
            new = job.tokens - job.hit
            take = min(new, left // self.pool.page * self.pool.page)
            whole = take == new
            if (
                take <= 0
                or not (whole or self.slot is None)
                or new + self.pool.page >= self.pool.free - promised
                or not self.leaves_enough(new, runs, promised)
            ):
                self.pool.lock(job, -1)
                job.hit = 0
                break
            job.done = job.hit
            self.waiting.remove(job)
            runs.append((job, take))
            left -= take
            promised += reserved(take, self.pool.page)
            if not whole:
                self.slot = job
        for job, tokens in runs:
            self.pool.grow(job, tokens)
            if not job.left:
                self.transfers.append(job)
        return bool(runs)

    def leaves_enough(self, new: int, runs: list[tuple[Job, int]], promised: int) -> bool:
        if not self.rule:
            return True
        launched = dict(runs)
        rest = [job.left - launched.get(job, 0) for job in self.begun()]
        free = self.pool.free - promised
        (may,) = may_begin([new], [0], rest, free_tokens=free, page_size=self.pool.page)
        return may


def server_of(seed: int, page: int, rule: bool) -> Server:
    rng = random.Random(seed)
    pool = Pool(pages=rng.randrange(500, 900) // page, page=page)
    most = (pool.pages - 3) * page
    jobs = []
    for _ in range(rng.randrange(8, 24)):
        group = rng.randrange(3)
        shared = [0, 96, 160][group]
        tokens = min(most, shared + rng.choice([5, 40, 90, 250, 400]) + rng.randrange(60))
        jobs.append(Job(tokens, group, min(shared, tokens // page * page)))
    return Server(pool, jobs, rng, rule)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 16, 32]))
def test_begun_prefills_always_finish(seed: int, page: int) -> None:
    server = server_of(seed, page, rule=True)
    for _ in range(3000):
        ran = server.step()
        if not (server.waiting or server.begun() or server.transfers):
            break
        assert ran or server.transfers, "nothing runs, nothing is under way, somebody waits"
        if server.rng.random() < 0.02:
            # Not a single transfer, not a single admission more: who has begun comes to his end.
            steps = sum(job.left for job in server.begun()) + 1
            for _ in range(steps):
                if server.begun():
                    server.step(admits=False)
            assert not server.begun()
    else:
        pytest.fail("it goes on for ever")
    assert server.pool.held == 0 and not any(server.pool.readers.values())


@pytest.mark.parametrize("page", [1, 16, 32])
def test_without_the_rule_the_same_model_runs_dry(page: int) -> None:
    dry = paused = 0
    for seed in range(60):
        server = server_of(seed, page, rule=False)
        try:
            for _ in range(3000):
                server.step()
        except OutOfMemory:
            dry += 1
        paused += server.max_begun > 1
    assert dry >= 10 and paused >= 10


@pytest.mark.parametrize(
    ("begun", "free", "page", "tokens", "cached", "evictable", "may"),
    [
        ([], 0, 1, [10**9], [0], 0, [True]),  # nobody has begun: upstream decides
        ([100], 302, 1, [200], [0], 0, [True]),  # each with one page for the allocator
        ([100], 301, 1, [200], [0], 0, [False]),
        ([100, 50], 352, 1, [200], [0], 0, [False]),
        ([1], 64, 16, [1], [0], 0, [True]),  # one token is a page
        ([1], 63, 16, [1], [0], 0, [False]),
        ([100], 302, 1, [200], [500], 0, [True]),  # its prefix is locked already
        ([100], 302, 1, [200], [500], 1, [False]),  # and here one token of it is not
        ([100], 602, 1, [100, 100], [200, 200], 200, [True, True]),  # locked once for both
        ([100], 302, 1, [100, 100, 1], [0, 0, 0], 0, [True, False, False]),  # nobody overtakes
    ],
)
def test_who_may_begin(
    begun: list[int],
    free: int,
    page: int,
    tokens: list[int],
    cached: list[int],
    evictable: int,
    may: list[bool],
) -> None:
    got = may_begin(
        tokens, cached, begun, free_tokens=free, evictable_tokens=evictable, page_size=page
    )
    assert got == may


lengths = st.integers(1, 1500)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_plan_admits_nobody_into_kv_that_its_partials_need(data: st.DataObject) -> None:
    draw = data.draw
    count, begun = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    n = count + begun
    page = draw(st.sampled_from([1, 16]))
    column = lambda kind: draw(st.lists(kind, min_size=n, max_size=n))  # noqa: E731
    tokens = column(lengths)
    queue = PrefillQueue(
        work_s=[t / 1000 for t in tokens],
        deadline_s=column(st.floats(-1, 20)),
        tokens=tokens,
        partial=[False] * count + [True] * begun,
        cached=column(st.integers(0, 600)),
    )
    rest = tokens[count:]
    owed = sum(reserved(left, page) for left in rest)
    free = owed + draw(st.integers(-200, 1500))
    evictable = draw(st.integers(0, max(0, free)))
    got = plan_prefill(
        queue,
        chunk_tokens=512,
        current=-1,
        free_tokens=free,
        max_paused=8,
        page_size=page,
        evictable_tokens=evictable,
    )
    reserve = Reserve(rest, free_tokens=free, evictable_tokens=evictable, page_size=page)
    budget = 512 - (0 if got.slot < 0 else min(tokens[got.slot], got.chunk_limit or 512))
    for index in got.order:
        if budget < page:
            break  # only who finds room in the step runs
        assert reserve.fits(tokens[index], queue.cached[index])
        reserve.take(tokens[index], queue.cached[index])
        budget -= -(-tokens[index] // page) * page
    assert got.order or got.slot >= 0, "somebody has begun: there is always somebody to run"
