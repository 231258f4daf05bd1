"""Defines an order of a prefill server's waiting queue, and what several orders need.

Each order is one file in `orders`. SGLang's are as in v0.5.23's managers/schedule_policy.py. FCFS
with continuous batching on a PD cluster is how DistServe schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_kairos.registry import Registry

# WAITING_QUEUE_PREFIX_MATCH_MAX: lpm and hrrn leave a longer queue as it stands.
MATCH_MAX = 128
# IN_BATCH_PREFIX_CACHING_{CHECK,DEPRIORITIZE}_THRESHOLD, tokens.
IN_BATCH_TOKENS = 32


class Waiting(Protocol):
    """What an order knows of a waiting request. Lengths are tokens, times are seconds.

    `matched`: prompt tokens expected in the prefix cache. `arrival_processed_tokens`: what the
    server had prefilled when it came. `priority`: lower first.
    """

    index: int
    prompt: int
    matched: int
    blocks: tuple[int, ...]
    arrival_s: float
    due_s: float
    priority: float
    arrival_processed_tokens: int


# Items are `Waiting`. A list is invariant, so naming them here would refuse every host's own type.
Queue = list[Any]


@dataclass(frozen=True)
class Order:
    """A way to order the waiting queue, by name.

    `sort(queue, processed, block_tokens)` sorts in place. Requests that it does not tell apart stay
    in the order of arrival, as Python's sort is stable. `processed`: tokens prefilled so far.
    `block_tokens`: tokens of a cache block. `cache_aware`: it reads `matched`, so prefixes are
    looked up first. `chunk_limit(remaining, queue, budget)`: tokens left to the chunk in progress;
    None: no limit.
    """

    name: str
    sort: Callable[[Queue, int, int], None]
    cache_aware: bool = False
    chunk_limit: Callable[[int, Queue, int], int | None] | None = None


ORDERS: Registry[Order] = Registry("sglang_kairos.sim.baselines.orders")


def register(order: Order) -> None:
    """Makes an order known by its name. Raises ValueError if the name is taken."""
    ORDERS.add(order.name, order)


def uncached_tokens(req: Waiting) -> int:
    """Returns the prompt tokens left to compute, at least one."""
    return max(1, req.prompt - req.matched)


def deprioritised(queue: Queue, block_tokens: int) -> set[int]:
    """Returns indices of requests with next to no hit whose prefix another one in the queue brings."""
    seen: set[int] = set()
    behind: set[int] = set()
    for req in queue:
        if req.matched <= IN_BATCH_TOKENS and req.blocks and block_tokens >= IN_BATCH_TOKENS:
            if req.blocks[0] in seen:
                behind.add(req.index)
            seen.add(req.blocks[0])
    return behind
