"""Orders by cached prefix, the longest first."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import MATCH_MAX, Order, Queue, deprioritised, register


def lpm(queue: Queue, processed: int, block_tokens: int) -> None:
    """Sorts the longest prefix match first."""
    if len(queue) > MATCH_MAX:
        return
    behind = deprioritised(queue, block_tokens)
    queue.sort(key=lambda req: float("inf") if req.index in behind else -req.matched)


register(Order("lpm", lpm, cache_aware=True))
