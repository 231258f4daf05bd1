"""Orders by priority."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import Order, Queue, register


def priority(queue: Queue, processed: int, block_tokens: int) -> None:
    """Sorts a lower `priority` first, then first come, first served."""
    queue.sort(key=lambda req: (req.priority, req.arrival_s))


register(Order("priority", priority))
