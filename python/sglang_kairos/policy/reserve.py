"""Which prefills may begin beside those that have begun: these must always find the KV for their rest.

A begun prefill (the one in the chunk slot, and the paused) holds KV that nobody can take from it and
gives it back only when it is done. If others are admitted into what it still needs, nobody can go on:
SGLang then ends the scheduler with "Out of memory". Stock admits a chunked prefill only when all of it
fits and, until it is done, nobody who would not fit beside; with several begun ones it takes this rule:

    free − what who comes takes ≥ Σ over the begun of their rest

All in KV tokens, each term rounded up to whole pages, and a page more for each, as SGLang reserves.
Who comes takes what is to be computed of its prompt and, of its cached prefix, what could be evicted
before: once its reader runs it is locked. Whoever comes in is itself begun until its last chunk.

Why nobody starves or waits for ever: with the rule, each begun prefill can be taken to its end whatever
order they run in, so memory comes back; with none begun the rule admits everybody, upstream decides.
"""

from __future__ import annotations

from collections.abc import Sequence


def reserved(tokens: int, page_size: int) -> int:
    """KV tokens set aside for `tokens` of one request: whole pages, and one for the allocator."""
    return (-(-tokens // page_size) + 1) * page_size


class Reserve:
    """Free KV as requests are admitted one after the other, the rest of the begun set aside.

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
        """Whether one with `tokens` to compute behind `cached` ones may begin now."""
        return not self._begun or self._takes(tokens, cached) <= self._free

    def take(self, tokens: int, cached: int = 0) -> None:
        """It begins: all that it computes and locks is gone, in this step or a later one."""
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
    """Per waiting request, in their order, whether it may begin beside the begun and those before it.

    `tokens`, `cached`: to compute and cached of each; the others as for `Reserve`. The first that may
    not is the last that is asked: a small one must not take, again and again, what it waits for.
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
