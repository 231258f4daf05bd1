"""Orders by arrival: first come, first served."""

from __future__ import annotations

from sglang_kairos.sim.baselines.order import Order, Queue, register


def fcfs(queue: Queue, processed: int, block_tokens: int) -> None:
    """Leaves the queue as it is: it is in the order of arrival."""


register(Order("fcfs", fcfs))
