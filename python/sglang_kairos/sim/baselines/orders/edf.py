"""Earliest deadline first."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import Order, Queue, register


def edf(queue: Queue, processed: int, block_tokens: int) -> None:
    """Earliest deadline first. Not in SGLang; the textbook baseline."""
    queue.sort(key=lambda req: req.due_s)


register(Order("edf", edf))
