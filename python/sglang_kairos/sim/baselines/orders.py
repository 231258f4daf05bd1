"""The prefill policies of SGLang v0.5.23, read from its managers/schedule_policy.py, and EDF.

Each sorts the waiting queue in place; requests behind keep their order (Python's sort is stable).
FCFS with continuous batching on a PD cluster is also how DistServe schedules.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_kairos.sim.core.request import SimRequest

# WAITING_QUEUE_PREFIX_MATCH_MAX: lpm and hrrn leave a longer queue as it stands.
MATCH_MAX = 128
# IN_BATCH_PREFIX_CACHING_{CHECK,DEPRIORITIZE}_THRESHOLD, tokens.
IN_BATCH_TOKENS = 32

Order = Callable[[list[SimRequest], int, int], None]
"""(queue, prefill tokens processed so far, block size in tokens)"""


def fcfs(queue: list[SimRequest], processed: int, block_tokens: int) -> None:
    """First come, first served: the queue is in that order."""


def lpm(queue: list[SimRequest], processed: int, block_tokens: int) -> None:
    """Longest prefix match first."""
    if len(queue) > MATCH_MAX:
        return
    behind = deprioritised(queue, block_tokens)
    queue.sort(key=lambda req: float("inf") if req.index in behind else -req.matched)


def hrrn(queue: list[SimRequest], processed: int, block_tokens: int) -> None:
    """Highest response ratio next: prefill tokens processed since arrival per token to compute."""
    if len(queue) > MATCH_MAX:
        return
    behind = deprioritised(queue, block_tokens)

    def key(req: SimRequest) -> tuple[float, int]:
        if req.index in behind:
            return float("inf"), req.index
        uncached = max(0, req.prompt - req.matched)
        if uncached == 0:
            return -float("inf"), req.index
        return -max(0, processed - req.arrival_processed_tokens) / uncached, req.index

    queue.sort(key=key)


def shortest_prefill_first(queue: list[SimRequest], processed: int, block_tokens: int) -> None:
    """Fewest tokens to compute first."""
    behind = deprioritised(queue, block_tokens)
    queue.sort(key=lambda req: (req.index in behind, uncached_tokens(req), req.arrival_s))


def priority(queue: list[SimRequest], processed: int, block_tokens: int) -> None:
    """Lower `priority` first, then first come, first served."""
    queue.sort(key=lambda req: (req.priority, req.arrival_s))


def edf(queue: list[SimRequest], processed: int, block_tokens: int) -> None:
    """Earliest deadline first. Not in SGLang; the textbook baseline."""
    queue.sort(key=lambda req: req.due_s)


ORDERS: dict[str, Order] = {
    "fcfs": fcfs,
    "lpm": lpm,
    "hrrn": hrrn,
    "shortest-prefill-first": shortest_prefill_first,
    "priority": priority,
    "edf": edf,
}
CACHE_AWARE = frozenset(("lpm", "hrrn", "shortest-prefill-first"))


def uncached_tokens(req: SimRequest) -> int:
    """Prompt tokens left to compute, at least one."""
    return max(1, req.prompt - req.matched)


def deprioritised(queue: list[SimRequest], block_tokens: int) -> set[int]:
    """Indices of requests with next to no hit whose prefix another one in the queue brings."""
    seen: set[int] = set()
    behind: set[int] = set()
    for req in queue:
        if req.matched <= IN_BATCH_TOKENS and req.blocks and block_tokens >= IN_BATCH_TOKENS:
            if req.blocks[0] in seen:
                behind.add(req.index)
            seen.add(req.blocks[0])
    return behind


def chunk_limit(remaining: int, queue: list[SimRequest], budget: int) -> int | None:
    """Tokens that shortest-prefill-first leaves the chunk in progress, so that shorter ones fit.

    SGLang's `shortest_prefill_chunk_limit` with pages of one token. None: no cap.
    """
    if budget < 2:
        return None
    reserved = 0
    for req in queue:
        work = uncached_tokens(req)
        if work >= remaining or reserved + work > budget - 1:
            break
        reserved += work
    return budget - reserved if reserved else None
