"""Which prompts' beginnings a prefill server probably still has in its prefix cache.

A prompt is cut into blocks; a block is known by the hash of it and all before it, as in SGLang's
radix cache. Each server has a list of the blocks it was sent, the longest unused forgotten first,
no longer than its KV cache. A guess only: the server evicts by rules of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

BLOCK_TOKENS = 64
BLOCK_BYTES = 256
# Hashes kept for all servers together; about 150 bytes each.
MOST_BLOCKS = 200_000
_LONGEST = 4_096  # blocks of one prompt that are looked at


class Blocks(NamedTuple):
    """A prompt's blocks, each of them and all before it as one hash; empty for a short prompt."""

    hashes: tuple[int, ...] = ()
    tokens_each: float = BLOCK_TOKENS


def blocks_of(prompt: Any, bytes_per_token: float) -> Blocks:
    """Of a text or a list of token ids; anything else has none."""
    if isinstance(prompt, str):
        raw = prompt.encode("utf-8", "surrogatepass")
        parts: list[Any] = _cut(raw, BLOCK_BYTES)
        return Blocks(_chain(parts), BLOCK_BYTES / bytes_per_token)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        try:
            return Blocks(_chain([tuple(part) for part in _cut(prompt, BLOCK_TOKENS)]))
        except TypeError:  # something unhashable between the numbers: not ours to refuse
            return Blocks()
    return Blocks()


class PrefixIndex:
    """Of one prefill server; at most `most` hashes."""

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._most = most
        self._seen: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def limit(self, most: int) -> None:
        """Keep at most that many hashes from now on."""
        self._most = max(0, most)
        self._shrink()

    def cached_tokens(self, blocks: Blocks) -> float:
        """How much of the prompt's beginning is expected to be there."""
        seen = self._seen
        for count, block in enumerate(blocks.hashes):
            if block not in seen:
                return count * blocks.tokens_each
        return len(blocks.hashes) * blocks.tokens_each

    def add(self, blocks: Blocks) -> None:
        """The server has been sent this prompt."""
        for block in reversed(blocks.hashes):  # the end of a prompt goes first, as in the cache
            self._seen[block] = None
            self._seen.move_to_end(block)
        self._shrink()

    def clear(self) -> None:
        """The server has started anew, or its cache was flushed."""
        self._seen.clear()

    def _shrink(self) -> None:
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)


def _cut(prompt: Sequence[Any], size: int) -> list[Any]:
    whole = min(len(prompt) // size, _LONGEST)
    return [prompt[start:end] for start, end in pairwise(range(0, size * (whole + 1), size))]


def _chain(parts: list[Any]) -> tuple[int, ...]:
    hashes: list[int] = []
    before = 0
    for part in parts:
        before = hash((before, part))
        hashes.append(before)
    return tuple(hashes)
