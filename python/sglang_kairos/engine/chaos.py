"""Random but legal decisions from a seed, to prove that no decision can change a token.

Used by the identity tests in place of the policies: whatever Kairos may decide, the outputs must be
those of stock SGLang. Never switched on by anything but ``--kairos-chaos-seed``.
"""

from __future__ import annotations

import random


class Chaos:
    """A seeded source of legal scheduling decisions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def decode(self, batch_size: int) -> list[int]:
        """A random non-empty subset of the running requests; often all of them."""
        if batch_size == 1 or self._random.random() < 0.4:
            return list(range(batch_size))
        keep = [i for i in range(batch_size) if self._random.random() < 0.6]
        return keep or [self._random.randrange(batch_size)]
