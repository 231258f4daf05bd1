"""The work that a prefill server owes, arranged so that one more request is judged in O(log n).

Why choose it: the router asks every server what one more request would do to the rest. Running
`policy.urgency` anew costs O(n log n) per server and request. This answers from prefix sums.

Formula. The server runs the on-time set by deadline, then late jobs shortest first. A job j has a
deadline d_j and work p_j. Times are seconds, counted from `began_s`: when the server began its
first job, plus the hand-off that follows prefill.
    done_j     = p_1 + … + p_j                                   over the on-time set, by deadline
    headroom_j = min over i >= j of (d_i - began_s - done_i)     delay that all from j on can stand
A new job of work w between j - 1 and j leaves everybody on time iff w <= headroom_j and it makes
its own deadline. Otherwise Moore-Hodgson drops one job: among those up to the first late one, the
job with the least weight per second. It may be the new job.

Trade-offs: a dropped job counts as late although the server may still make it. Late jobs have no
bound on their wait here; the server's starvation bound (`prefill_planner`) gives them one.
Source: Moore 1968, as in `policy.urgency`; the prefix sums are ours.
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
    """The job that one more request would push past its deadline; `place`: its index by deadline."""

    place: int
    work_s: float
    weight: float


@dataclass(slots=True)  # not frozen: that would triple the time to build one
class Backlog:
    """What a prefill server owes. Build it with `of` and change nothing. Times are in seconds.

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
        """Builds a backlog from jobs by ascending deadline and copies the lists.

        Arrays have shape (n,). Takes O(n), or O(n log n) if any job is late.
        """
        due, works = list(deadlines_s), list(works_s)
        worth = None if weights is None else list(weights)
        total, late = math.fsum(works), []
        done = list(accumulate(works))
        spare = [d - began_s - e for d, e in zip(due, done, strict=True)]
        if spare and min(spare) < 0.0:
            mask = moore_hodgson(works, [d - began_s for d in due], worth).tolist()
            late = sorted(w for w, on in zip(works, mask, strict=True) if not on)
            due = [d for d, on in zip(due, mask, strict=True) if on]
            works = [w for w, on in zip(works, mask, strict=True) if on]
            worth = None if worth is None else [w for w, on in zip(worth, mask, strict=True) if on]
            done = list(accumulate(works))
            spare = [d - began_s - e for d, e in zip(due, done, strict=True)]
        headroom = list(accumulate(reversed(spare), min))[::-1]
        return cls(
            began_s=began_s,
            total_s=total,
            on_time_s=done[-1] if done else 0.0,
            _due=due,
            _works=works,
            _weights=worth,
            _done=done,
            _headroom=headroom,
            _late=late,
            _late_done=list(accumulate(late)),
        )

    def place(self, deadline_s: float) -> int:
        """Returns how many on-time jobs run before one with this deadline."""
        return bisect_right(self._due, deadline_s)

    def before_s(self, place: int) -> float:
        """Returns the work of the first `place` on-time jobs, in seconds."""
        return self._done[place - 1] if place else 0.0

    def headroom_s(self, place: int) -> float:
        """Returns the delay that all on-time jobs from `place` on can stand, as of `began_s`."""
        return self._headroom[place] if place < len(self._headroom) else math.inf

    def late_before_s(self, work_s: float) -> float:
        """Returns the work of the late jobs that run before a late one of `work_s`, in seconds."""
        at = bisect_right(self._late, work_s)
        return self._late_done[at - 1] if at else 0.0

    def victim(
        self, place: int, makes_it: bool, work_s: float, weight: float, lag_s: float
    ) -> Victim | None:
        """Returns the job that a new one at `place` pushes out when not all fit; None: the new one.

        `makes_it`: the new job meets its own deadline. `lag_s`: how far everything is behind plan by now.
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
