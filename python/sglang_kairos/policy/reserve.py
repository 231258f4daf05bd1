"""Chooses which prefills may begin beside begun ones, so that these always find KV for their rest.

A begun prefill is one in the chunk slot or paused. It holds KV that nobody can take from it, and
gives it back only when it is done. If others are admitted into what it still needs, nobody can go
on: SGLang then ends the scheduler with "Out of memory". Stock SGLang has one begun prefill at a
time. It admits one only when all of it fits and, until it is done, nobody who would not fit beside
it. With several begun ones the rule is:

    free - what the new one takes >= sum over the begun of their rest

All terms are KV tokens, rounded up to whole pages, with one page more for each, as SGLang reserves.
The new one takes its tokens to compute. It also takes what could be evicted of its cached prefix,
which is locked once its reader runs. A request that comes in is itself begun until its last chunk.

Starvation: with the rule, each begun prefill can be taken to its end in any order, so memory comes
back. With none begun, the rule admits everybody, and upstream decides.
"""

from __future__ import annotations

from collections.abc import Sequence


def reserved(tokens: int, page_size: int) -> int:
    """Returns the KV tokens set aside for `tokens` of one request: whole pages and one more."""
    return (-(-tokens // page_size) + 1) * page_size


class Reserve:
    """Free KV while requests are admitted one after the other, the rest of the begun set aside.

    `begun_left`: tokens that each begun prefill has still to compute. `free_tokens`: KV tokens that
    are free or can be evicted, of which `evictable_tokens` belong to cached prefixes.
    """

    def __init__(
        self,
        begun_left: Sequence[int],
        *,
        free_tokens: int,
        evictable_tokens: int = 0,
        page_size: int = 1,
    ) -> None:
        self._page, self._evictable = page_size, evictable_tokens
        self._begun = bool(begun_left)
        self._free = free_tokens - sum(reserved(left, page_size) for left in begun_left)

    def fits(self, tokens: int, cached: int = 0) -> bool:
        """Returns whether a request with `tokens` to compute behind `cached` ones may begin now."""
        return not self._begun or self._takes(tokens, cached) <= self._free

    def take(self, tokens: int, cached: int = 0) -> None:
        """Takes the KV of a request that begins: all that it will compute and lock."""
        self._free -= self._takes(tokens, cached)
        self._evictable -= min(cached, self._evictable)

    def _takes(self, tokens: int, cached: int) -> int:
        return reserved(tokens, self._page) + min(cached, self._evictable)


def may_begin(
    tokens: Sequence[int],
    cached: Sequence[int],
    begun_left: Sequence[int],
    *,
    free_tokens: int,
    evictable_tokens: int = 0,
    page_size: int = 1,
) -> list[bool]:
    """Returns for each waiting request whether it may begin beside the begun and those before it.

    `tokens`, `cached`: tokens to compute and cached of each; the others as for `Reserve`. No
    request behind the first that may not begin is admitted: a small one must not take, again and
    again, what that one waits for.
    """
    reserve = Reserve(
        begun_left,
        free_tokens=free_tokens,
        evictable_tokens=evictable_tokens,
        page_size=page_size,
    )
    answers = [False] * len(tokens)
    for index, (count, known) in enumerate(zip(tokens, cached, strict=True)):
        if not reserve.fits(count, known):
            break
        reserve.take(count, known)
        answers[index] = True
    return answers
