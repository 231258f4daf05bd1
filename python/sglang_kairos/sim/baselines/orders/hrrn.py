"""Orders by response ratio, the highest first."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import (
    MATCH_MAX,
    Order,
    Queue,
    Waiting,
    deprioritised,
    register,
)


def hrrn(queue: Queue, processed: int, block_tokens: int) -> None:
    """Sorts the highest response ratio first: tokens prefilled since arrival per token to compute."""
    if len(queue) > MATCH_MAX:
        return
    behind = deprioritised(queue, block_tokens)

    def key(req: Waiting) -> tuple[float, int]:
        if req.index in behind:
            return float("inf"), req.index
        uncached = max(0, req.prompt - req.matched)
        if uncached == 0:
            return -float("inf"), req.index
        return -max(0, processed - req.arrival_processed_tokens) / uncached, req.index

    queue.sort(key=key)


register(Order("hrrn", hrrn, cache_aware=True))
