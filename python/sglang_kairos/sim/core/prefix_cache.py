"""KV memory of a prefill server: what requests hold, and the prefix cache in the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Blocks of `block_tokens` tokens by name. Evicts the least recently used, and never a locked one.

    Held tokens and all blocks together stay within the capacity, in tokens. A prompt's first blocks
    outlive its last, as leaves go first in a radix tree.
    """

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        self.capacity_tokens, self.block_tokens = capacity_tokens, block_tokens
        self.held_tokens = 0
        self.version = 0
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._locks: dict[int, int] = {}

    @property
    def used_tokens(self) -> int:
        """Returns the tokens that are held or cached."""
        return self.held_tokens + (len(self._idle) + len(self._locks)) * self.block_tokens

    @property
    def free_tokens(self) -> int:
        """Returns the tokens that could be held: free or evictable."""
        return self.capacity_tokens - self.held_tokens - len(self._locks) * self.block_tokens

    @property
    def evictable_tokens(self) -> int:
        """Returns the cached tokens that no request has locked."""
        return len(self._idle) * self.block_tokens

    def match(self, blocks: Sequence[int]) -> int:
        """Returns how many of the leading `blocks` are cached."""
        idle, locks = self._idle, self._locks
        count = 0
        for block in blocks:
            if block not in idle and block not in locks:
                break
            count += 1
        return count

    def fits(self, tokens: int, hit: Sequence[int]) -> bool:
        """Returns whether `tokens` could be held with the blocks `hit` locked."""
        newly = sum(block in self._idle for block in hit) * self.block_tokens
        return tokens + newly <= self.free_tokens

    def hold(self, tokens: int, hit: Sequence[int]) -> None:
        """Locks the blocks `hit` and takes `tokens`, evicting as needed. `fits` must hold."""
        self._lock(hit)
        self.held_tokens += tokens
        while self.used_tokens > self.capacity_tokens:
            self._idle.popitem(last=False)
            self.version += 1

    def insert(self, new: Sequence[int], held: int, still_held: int) -> None:
        """Caches and locks the blocks `new`, out of `held` computed tokens.

        `still_held` tokens remain outside any block.
        """
        self.held_tokens += still_held - held
        for block in new:
            if block not in self._locks and block not in self._idle:
                self._idle[block] = None
                self.version += 1
        self._lock(new)

    def release(self, blocks: Sequence[int], held: int) -> None:
        """Unlocks `blocks` and gives `held` tokens back."""
        self.held_tokens -= held
        for block in reversed(blocks):
            left = self._locks[block] - 1
            if left:
                self._locks[block] = left
            else:
                del self._locks[block]
                self._idle[block] = None

    def _lock(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._locks[block] = self._locks.get(block, 0) + 1
            self._idle.pop(block, None)
