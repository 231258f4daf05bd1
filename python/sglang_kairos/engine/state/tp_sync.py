"""Makes the ranks of one server decide alike: rank 0's decision counts, whatever other clocks show.

Every rank schedules for itself from equal inputs. A decision that differs on one rank launches
different batches and hangs the collectives. Clocks and measured times do differ.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from sglang_kairos.engine import compat

logger = logging.getLogger("sglang_kairos")

# Size of a first message between ranks. It holds a decision over some hundred requests.
FIRST_BYTES = 2048
# Testing only: milliseconds by which the clocks of the ranks differ and jitter.
CHAOS_CLOCK = "KAIROS_CHAOS_CLOCK_MS"


def agreement(scheduler: Any, counters: Counter[str]) -> Callable[[Any], Any]:
    """Returns a function that gives rank 0's plain-data argument on every rank of `scheduler`.

    All ranks that share requests take part: tensor-parallel and context-parallel ones. Each call is
    collective. Under `CHAOS_CLOCK` it also counts in `counters` how often the ranks disagreed.
    """
    shared = _groups(scheduler)
    if not shared:
        return lambda decision: decision
    import torch.distributed as dist

    groups = [(group, dist.get_global_rank(group, 0)) for group in shared]

    def broadcast(decision: Any) -> Any:
        for group, leader in groups:
            decision = _from_leader(decision, group, leader)
        return decision

    def watched(decision: Any) -> Any:
        agreed = broadcast(decision)
        for group, _ in groups:
            wanted = [None] * dist.get_world_size(group)
            dist.all_gather_object(wanted, decision, group=group)
            counters["decisions"] += 1
            counters["disagreements"] += any(other != wanted[0] for other in wanted)
        return agreed

    return watched if os.environ.get(CHAOS_CLOCK) else broadcast


def leads(scheduler: Any) -> bool:
    """Returns whether this process speaks for the ranks that share its requests.

    Under DP attention every data-parallel rank has requests of its own.
    """
    groups = _groups(scheduler)
    if not groups:
        return True
    import torch.distributed as dist

    return all(dist.get_rank(group) == 0 for group in groups)


def _groups(scheduler: Any) -> list[Any]:
    """Returns the process groups, of more than one rank each, that share requests with this process."""
    if compat.tp_size(scheduler) == 1:
        return []
    import torch.distributed as dist

    names = ("attn_tp_cpu_group", "attn_cp_cpu_group")
    found = filter(None, (getattr(scheduler, name, None) for name in names))
    return [group for group in found if dist.get_world_size(group) > 1]


def _from_leader(decision: Any, group: Any, leader: int) -> Any:
    """Returns the leader's plain-data `decision`: one collective for a short one, two for a long one."""
    import torch
    import torch.distributed as dist

    sends = dist.get_rank() == leader
    data = pickle.dumps(decision) if sends else b""
    first = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
    if sends:
        head = len(data).to_bytes(8, "little") + data[: FIRST_BYTES - 8]
        first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    dist.broadcast(first, src=leader, group=group)
    received = first.numpy().tobytes()
    size, shown = int.from_bytes(received[:8], "little"), received[8:]
    if size > len(shown):
        rest = torch.empty(size - len(shown), dtype=torch.uint8)
        if sends:
            rest = torch.frombuffer(bytearray(data[len(shown) :]), dtype=torch.uint8)
        dist.broadcast(rest, src=leader, group=group)
        shown += rest.numpy().tobytes()
    return decision if sends else pickle.loads(shown[:size])


def rank_of(scheduler: Any) -> int:
    """Returns this process' rank in its server."""
    if compat.tp_size(scheduler) == 1:
        return 0
    import torch.distributed as dist

    return int(dist.get_rank())


class SharedClock:
    """`time.perf_counter`. With `CHAOS_CLOCK` it differs from rank to rank and jitters."""

    def __init__(self, scheduler: Any) -> None:
        self.skew_s = float(os.environ.get(CHAOS_CLOCK) or 0.0) / 1e3
        if not self.skew_s:
            return
        rank = rank_of(scheduler)
        self._random = random.Random(rank)
        self._offset_s = rank * self.skew_s
        logger.warning("Kairos: CHAOS clock on rank %d, off by %g ms", rank, 1e3 * self.skew_s)

    def now(self) -> float:
        """Returns seconds on the clock of SGLang's request time stats."""
        now = time.perf_counter()
        if self.skew_s:
            now += self._offset_s + self.skew_s * self._random.random()
        return now

    def measured(self, seconds: float) -> float:
        """Returns a measured duration as this rank sees it, in seconds."""
        return seconds * self._random.uniform(0.5, 1.5) if self.skew_s else seconds
