"""Searches for the fewest servers that are enough, among shapes of prefill and decode servers.

It assumes that one more server never hurts, but only to leave shapes out. The shapes next to the
answer that would be better are tried all the same, and taken if they are enough after all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

K = TypeVar("K")


class Shape(NamedTuple):
    """The prefill and decode servers of a cluster."""

    prefill: int
    decode: int

    @property
    def servers(self) -> int:
        return self.prefill + self.decode

    @property
    def cost(self) -> tuple[int, int]:
        """Returns the cost by which shapes compare: fewer servers first, then fewer prefill servers."""
        return self.servers, self.prefill

    def __str__(self) -> str:
        return f"{self.prefill}P{self.decode}D"


Asking = Generator[list[Shape], Mapping[Shape, float], None]
Searching = Generator[list[Shape], Mapping[Shape, float], Shape | None]


@dataclass
class Search:
    """One search; `known` holds the attainment of every shape that was tried."""

    attain: float
    max_servers: int
    known: dict[Shape, float] = field(default_factory=dict)

    def smallest(self) -> Searching:
        """Yields shapes to try together, and is sent their attainments.

        Returns the best shape with at least `attain` and at most `max_servers` (>= 2) in all; None
        if there is none.
        """
        n = 1
        yield from self._ask(Shape(n, n))
        while not self._enough(Shape(n, n)) and 4 * n <= self.max_servers:
            n *= 2
            yield from self._ask(Shape(n, n))
        if self._enough(Shape(n, n)):
            most, high = 2 * n, n
        else:
            most = self.max_servers
            high = most - 1
            yield from self._ask(Shape(high, high))
            if not self._enough(Shape(high, high)):
                return None
        # No answer has more on one side. So beside that many the other side needs the least.
        plenty = most - 1
        least_p = yield from self._least(high, lambda p: Shape(p, plenty))
        least_d = yield from self._least(high, lambda d: Shape(plenty, d))
        for servers in range(least_p + least_d, most + 1):
            mixes = range(least_p, servers - least_d + 1)
            row = [shape for p in mixes if not self._hopeless(shape := Shape(p, servers - p))]
            yield from self._ask(*row)
            for shape in row:
                if self._enough(shape):
                    return (yield from self._settle(shape))
        return None

    def _ask(self, *shapes: Shape) -> Asking:
        fresh = [shape for shape in shapes if shape not in self.known]
        if fresh:
            self.known.update((yield fresh))

    def _enough(self, shape: Shape) -> bool:
        return self.known[shape] >= self.attain

    def _hopeless(self, shape: Shape) -> bool:
        """Returns whether it is untried, and one that is nowhere smaller was not enough."""
        return shape not in self.known and any(
            other.prefill >= shape.prefill
            and other.decode >= shape.decode
            and not self._enough(other)
            for other in self.known
        )

    def _least(
        self, high: int, shape_of: Callable[[int], Shape]
    ) -> Generator[list[Shape], Mapping[Shape, float], int]:
        """Returns the least number from 1 to `high` whose shape is enough; `high` is taken to be."""
        low = 1
        while low < high:
            middle = (low + high) // 2
            yield from self._ask(shape_of(middle))
            if self._enough(shape_of(middle)):
                high = middle
            else:
                low = middle + 1
        return low

    def _settle(self, answer: Shape) -> Generator[list[Shape], Mapping[Shape, float], Shape]:
        """Goes on to a better neighbour for as long as there is one that is enough."""
        while True:
            p, d = answer
            beside = Shape(p - 1, d), Shape(p, d - 1), Shape(p - 1, d + 1)
            real = [shape for shape in beside if min(shape) >= 1]
            yield from self._ask(*real)
            good = [shape for shape in real if self._enough(shape)]
            if not good:
                return answer
            answer = min(good, key=lambda shape: shape.cost)


def search_together(
    searches: Mapping[K, Search],
    probe: Callable[[Sequence[tuple[K, Shape]]], Sequence[float]],
) -> dict[K, Shape | None]:
    """Returns every search's answer. `probe` gets what all of them ask next, and returns attainments."""
    answers: dict[K, Shape | None] = dict.fromkeys(searches)
    running = {key: search.smallest() for key, search in searches.items()}
    asked = {key: next(steps) for key, steps in running.items()}
    while asked:
        pairs = [(key, shape) for key, shapes in asked.items() for shape in shapes]
        told = dict(zip(pairs, probe(pairs), strict=True))
        for key, shapes in list(asked.items()):
            try:
                asked[key] = running[key].send({shape: told[key, shape] for shape in shapes})
            except StopIteration as end:
                answers[key] = end.value
                del asked[key]
    return answers
