"""Orders by deadline, the earliest first."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import Order, Queue, register


def edf(queue: Queue, processed: int, block_tokens: int) -> None:
    """Sorts the earliest deadline first. It is the textbook baseline, and not in SGLang."""
    queue.sort(key=lambda req: req.due_s)


register(Order("edf", edf))
