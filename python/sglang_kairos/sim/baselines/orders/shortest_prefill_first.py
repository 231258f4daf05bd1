"""Orders by tokens to compute, the fewest first."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import Order, Queue, deprioritised, register, uncached_tokens


def shortest_prefill_first(queue: Queue, processed: int, block_tokens: int) -> None:
    """Sorts the fewest tokens to compute first."""
    behind = deprioritised(queue, block_tokens)
    queue.sort(key=lambda req: (req.index in behind, uncached_tokens(req), req.arrival_s))


def chunk_limit(remaining: int, queue: Queue, budget: int) -> int | None:
    """Returns the tokens left to the chunk in progress, so that shorter requests fit; None: no limit.

    This is SGLang's `shortest_prefill_chunk_limit` with pages of one token.
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


register(
    Order(
        "shortest-prefill-first", shortest_prefill_first, cache_aware=True, chunk_limit=chunk_limit
    )
)
