"""Random but legal decisions from a seed, to prove that no decision can change a token.

Used by the identity tests in place of the policies: whatever Kairos may decide, the outputs must be
those of stock SGLang. Never switched on by anything but ``--kairos-chaos-seed``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from sglang_kairos.policy.urgency import PrefillPlan


class Chaos:
    """A seeded source of legal scheduling decisions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def prefill(
        self,
        tokens: Sequence[int],
        partial: Sequence[bool],
        *,
        current: int,
        chunk_tokens: int,
        free_tokens: int,
        max_paused: int,
    ) -> PrefillPlan:
        """A random order, slot and chunk share within the limits that `plan_prefill` keeps.

        All but one: who fits a step is offered whatever KV that takes. The seam of `add_one_req`
        must be enough to keep the KV that begun prefills need.
        """
        waiting = [i for i in range(len(tokens)) if not partial[i]]
        partials = [i for i in range(len(tokens)) if partial[i]]
        self._random.shuffle(waiting)
        slot = self._random.choice([*partials, -1]) if partials else -1
        if len(partials) - (slot >= 0) > max_paused:
            slot = current if current >= 0 else partials[0]
        owed = sum(tokens[i] for i in partials)
        hold: list[int] = []
        if partials and slot < 0:
            room = max_paused - len(partials)
            for i in waiting:
                starts_chunking = tokens[i] > chunk_tokens // 4
                if starts_chunking and (room < 0 or owed + tokens[i] > free_tokens):
                    hold.append(i)
        if waiting and self._random.random() < 0.1:
            hold.append(self._random.choice(waiting))
        order = [i for i in waiting if i not in set(hold)]
        limit = self._random.choice([None, max(1, chunk_tokens // 2)]) if slot >= 0 else None
        return PrefillPlan(
            order=order, slot=slot, chunk_limit=limit, on_time=0, hold=sorted(set(hold))
        )
