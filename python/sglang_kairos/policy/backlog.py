"""The work that a prefill server owes, arranged so that one more request is judged in O(log n).

`policy.urgency` runs the on-time set by deadline, then the late jobs shortest first. Job j has
deadline d_j and work p_j, in seconds. Times count from `began_s`: when the server began the first
job, plus the hand-off that follows prefill.
    done_j     = p_1 + … + p_j over the on-time set by deadline
    headroom_j = min over i >= j of (d_i - began_s - done_i)
A new job of work w between j - 1 and j leaves everybody on time exactly if w <= headroom_j and it
meets its own deadline. If not, Moore and Hodgson's algorithm (1968) drops one job. Of the jobs up
to the first that is late, it drops the one with the least weight per second, maybe the new one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from sglang_kairos.policy.urgency import moore_hodgson


class Victim(NamedTuple):
    """The job that one more request would push past its deadline: place, seconds, weight."""

    place: int
    work_s: float
    weight: float


@dataclass(slots=True)  # not frozen, which would make it three times as dear to make
class Backlog:
    """A prefill server's jobs. Make it with `of`; it is never changed after that. Times in seconds.

    Without `began_s` no job counts as late.
    """

    began_s: float = -math.inf
    total_s: float = 0.0
    on_time_s: float = 0.0
    _due: Sequence[float] = ()
    _works: Sequence[float] = ()
    _weights: Sequence[float] | None = None
    _done: Sequence[float] = ()
    _headroom: Sequence[float] = ()
    _late: Sequence[float] = ()
    _late_done: Sequence[float] = field(default=())

    @classmethod
    def of(
        cls,
        deadlines_s: Sequence[float],
        works_s: Sequence[float],
        began_s: float = -math.inf,
        weights: Sequence[float] | None = None,
    ) -> Backlog:
        """Returns the backlog of these jobs, given by ascending deadline; the lists are copied.

        O(n), or O(n log n) if any job is late.
        """
        due, works = list(deadlines_s), list(works_s)
        kept = None if weights is None else list(weights)
        total, late = math.fsum(works), []
        done = list(accumulate(works))
        headroom = [d - began_s - e for d, e in zip(due, done, strict=True)]
        if headroom and min(headroom) < 0.0:
            mask = moore_hodgson(works, [d - began_s for d in due], kept).tolist()
            late = sorted(w for w, on in zip(works, mask, strict=True) if not on)
            due = [d for d, on in zip(due, mask, strict=True) if on]
            works = [w for w, on in zip(works, mask, strict=True) if on]
            kept = None if kept is None else [w for w, on in zip(kept, mask, strict=True) if on]
            done = list(accumulate(works))
            headroom = [d - began_s - e for d, e in zip(due, done, strict=True)]
        headroom = list(accumulate(reversed(headroom), min))[::-1]
        return cls(
            began_s=began_s,
            total_s=total,
            on_time_s=done[-1] if done else 0.0,
            _due=due,
            _works=works,
            _weights=kept,
            _done=done,
            _headroom=headroom,
            _late=late,
            _late_done=list(accumulate(late)),
        )

    def place(self, deadline_s: float) -> int:
        """Returns how many on-time jobs go before a job with that deadline."""
        return bisect_right(self._due, deadline_s)

    def before_s(self, place: int) -> float:
        """Returns the seconds of work in the first `place` on-time jobs."""
        return self._done[place - 1] if place else 0.0

    def headroom_s(self, place: int) -> float:
        """Returns by how many seconds all on-time jobs from `place` on can be delayed."""
        return self._headroom[place] if place < len(self._headroom) else math.inf

    def late_before_s(self, work_s: float) -> float:
        """Returns the seconds of late jobs that go before a late job of `work_s`."""
        at = bisect_right(self._late, work_s)
        return self._late_done[at - 1] if at else 0.0

    def victim(
        self, place: int, makes_it: bool, work_s: float, weight: float, lag_s: float
    ) -> Victim | None:
        """Returns the job that a new one at `place` pushes out; None if it is the new one.

        For when not all fit. `makes_it`: the new job meets its own deadline. `lag_s`: how many
        seconds later than planned the server is by now.
        """
        end = place
        if makes_it:
            end = next(
                (
                    at + 1
                    for at in range(place, len(self._due))
                    if self._due[at] - self.began_s - self._done[at] - lag_s < work_s
                ),
                len(self._due),
            )
        if end == 0:
            return None
        works = self._works
        if self._weights is None:
            worst = max(range(end), key=works.__getitem__)
            return Victim(worst, works[worst], 1.0) if works[worst] * weight > work_s else None
        weights = self._weights
        worst = min(range(end), key=lambda at: weights[at] / max(works[at], 1e-12))
        theirs = weights[worst] / max(works[worst], 1e-12)
        if theirs >= weight / max(work_s, 1e-12):
            return None
        return Victim(worst, works[worst], weights[worst])


EMPTY = Backlog()
