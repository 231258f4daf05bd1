"""Upstream's policies against upstream's own source, wherever an SGLang is installed."""

from __future__ import annotations

import ast
import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.loads.traces import Request
from sglang_kairos.sim.baselines.order import ORDERS, deprioritised
from sglang_kairos.sim.baselines.orders.shortest_prefill_first import chunk_limit
from sglang_kairos.sim.core.request import SimRequest

WANTED = (
    "_shortest_prefill_work",
    "_sort_by_shortest_prefill",
    "shortest_prefill_chunk_limit",
    "_sort_by_longest_prefix",
    "_uncached_len",
    "_sort_by_hrrn",
    "_sort_by_priority_and_fcfs",
)


@pytest.fixture(scope="module")
def upstream() -> Any:
    """Those methods of SGLang's SchedulePolicy, cut out of its source: importing it takes long."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        pytest.skip("SGLang is not installed")
    path = Path(package.origin).parent / "srt" / "managers" / "schedule_policy.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    policy = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "SchedulePolicy"
    )
    policy.body = [
        node for node in policy.body if isinstance(node, ast.FunctionDef) and node.name in WANTED
    ]
    if {node.name for node in policy.body if isinstance(node, ast.FunctionDef)} != set(WANTED):
        pytest.skip("this SGLang lacks some of the policies")
    future = ast.parse("from __future__ import annotations").body
    helpers = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_ceil_div"
    ]
    shortest = SimpleNamespace(SHORTEST_PREFILL_FIRST="shortest-prefill-first")
    scope: dict[str, Any] = {"CacheAwarePolicy": shortest}
    module = ast.Module([*future, *helpers, policy], [])
    exec(compile(ast.fix_missing_locations(module), str(path), "exec"), scope)
    return scope["SchedulePolicy"]


def queue_of(seed: int, size: int) -> list[SimRequest]:
    rng = random.Random(seed)
    queue = []
    for index in range(size):
        prompt = rng.randint(1, 3000)
        blocks = tuple(rng.randint(0, 9) for _ in range(prompt // 64))
        req = SimRequest(index, Request(index / 7, prompt, 5), 1.0, 0.1, blocks)
        req.matched = min(prompt - 1, 64 * rng.choice((0, 0, 0, 1, 9)))
        req.arrival_processed_tokens = rng.randint(0, 50_000)
        req.priority = float(rng.randint(0, 3))
        queue.append(req)
    rng.shuffle(queue)
    return queue


def as_upstream(req: SimRequest) -> Any:
    return SimpleNamespace(
        rid=req.index,
        origin_input_ids=range(req.prompt),
        output_ids=(),
        num_matched_prefix_tokens=req.matched,
        arrival_processed_tokens=req.arrival_processed_tokens,
        priority=req.priority,
        full_untruncated_fill_ids=range(req.prompt),
        prefix_len=req.matched,
        time_stats=SimpleNamespace(wait_queue_entry_time=req.arrival_s),
    )


@pytest.mark.parametrize("name", ["lpm", "hrrn", "shortest-prefill-first", "priority"])
@pytest.mark.parametrize("seed", range(10))
def test_orders_are_upstreams(upstream: Any, name: str, seed: int) -> None:
    queue = queue_of(seed, random.Random(seed).randint(1, 128))
    theirs = [as_upstream(req) for req in queue]
    behind = deprioritised(queue, 64)
    if name == "lpm":
        upstream._sort_by_longest_prefix(theirs, behind)
    elif name == "hrrn":
        upstream._sort_by_hrrn(theirs, behind, 40_000)
    elif name == "priority":
        upstream._sort_by_priority_and_fcfs(theirs, 1)
    else:
        upstream._sort_by_shortest_prefill(theirs, behind)
    ORDERS[name].sort(queue, 40_000, 64)
    assert [req.index for req in queue] == [req.rid for req in theirs]


@pytest.mark.parametrize("seed", range(30))
def test_chunk_limit_is_upstreams(upstream: Any, seed: int) -> None:
    queue = queue_of(seed, 20)
    ORDERS["shortest-prefill-first"].sort(queue, 0, 64)
    budget, done = random.Random(seed).choice((1, 2, 512, 8192)), 100
    chunked = SimRequest(99, Request(0.0, 2000, 5), 1.0, 0.1, matched=done)
    theirs = SimpleNamespace(policy="shortest-prefill-first")
    theirs._shortest_prefill_work = upstream._shortest_prefill_work
    limit = upstream.shortest_prefill_chunk_limit(
        theirs, as_upstream(chunked), [as_upstream(req) for req in queue], budget, 1
    )
    assert chunk_limit(2000 - done, queue, budget) == limit


@pytest.mark.parametrize("name", ["lpm", "hrrn"])
def test_queues_above_128_stay_as_they_are(name: str) -> None:
    queue = queue_of(1, 129)
    before = list(queue)
    ORDERS[name].sort(queue, 40_000, 64)
    assert queue == before
    del queue[0]
    ORDERS[name].sort(queue, 40_000, 64)
    assert queue != before[1:]


def test_of_two_with_the_same_uncached_prefix_the_second_steps_back() -> None:
    rows = [Request(0.0, 200, 5)] * 3
    queue = [SimRequest(i, row, 1.0, 0.1, (7, 8 + i)) for i, row in enumerate(rows)]
    assert deprioritised(queue, 64) == {1, 2}
    queue[0].matched = 64
    assert deprioritised(queue, 64) == {2}


def test_edf_is_by_deadline() -> None:
    queue = [SimRequest(i, Request(float(i), 9, 5), 10.0 - 2 * i, 0.1) for i in range(3)]
    ORDERS["edf"].sort(queue, 0, 64)
    assert [req.index for req in queue] == [2, 1, 0]
