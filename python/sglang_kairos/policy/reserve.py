"""Bounds which prefills may begin beside those that have begun, so that each finds KV for its rest.

Why: a begun prefill (in the chunk slot, or paused) holds KV that nobody can take from it. It gives
the KV back when it is done. If others get what it still needs, nobody can go on, and SGLang ends
the scheduler with "Out of memory". Stock SGLang has one chunked prefill at a time. It begins one
only if all of it fits, and then begins nobody who would not fit beside it. Kairos pauses prefills,
so several are begun.

Formula, in KV tokens:
    free - taken >= sum over the begun of what each has still to compute
Each term is rounded up to whole pages, plus one page, as SGLang reserves. `taken` is what the
newcomer has to compute, plus the part of its cached prefix that could be evicted before. That part
is locked once its reader runs. A newcomer counts as begun until its last chunk.

Starvation: none. By the rule each begun prefill can finish, in whatever order they run, so memory
comes back. With none begun the rule admits everybody, and SGLang's own check decides.
Trade-off: a long newcomer may wait although a shorter one behind it would fit (see `may_begin`).
Source: our own design.
"""

from __future__ import annotations

from collections.abc import Sequence


def reserved(tokens: int, page_size: int) -> int:
    """Returns the KV tokens set aside for `tokens` of one request: whole pages, and one page more."""
    return (-(-tokens // page_size) + 1) * page_size


class Reserve:
    """The free KV while requests are admitted one after the other; the rest of the begun is set aside.

    All sizes are KV tokens. `begun_left`: what each begun prefill has still to compute.
    `free_tokens`: free or evictable, of which `evictable_tokens` belong to cached prefixes.
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
        """Returns whether a request with `tokens` to compute after `cached` ones may begin now."""
        return not self._begun or self._takes(tokens, cached) <= self._free

    def take(self, tokens: int, cached: int = 0) -> None:
        """Begins that request: all that it computes and locks is taken, in this step or a later one."""
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
    """Returns, per waiting request in order, whether it may begin beside the begun and those before it.

    `tokens`, `cached`: tokens to compute and cached ones of each, (n,); the others are as for
    `Reserve`. After the first refusal all are refused: a small request must not take, again and
    again, what the refused one waits for.
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
