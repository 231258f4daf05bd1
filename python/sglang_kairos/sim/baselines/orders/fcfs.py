"""First come, first served."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import Order, Queue, register


def fcfs(queue: Queue, processed: int, block_tokens: int) -> None:
    """First come, first served: the queue is in that order."""


register(Order("fcfs", fcfs))
