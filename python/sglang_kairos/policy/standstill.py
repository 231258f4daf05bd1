"""Chooses which request gives way when prefill and decode wait for each other's KV.

With optimistic prefill a request may be computed before decode has reserved KV for it. It is then
*parked* on prefill: its KV waits there for decode's answer. Decode cannot know who is parked. It
may give its KV to others that are not computed yet, and these find prefill full of parked requests.
Then each side waits for the other.

The rule. A request is *due* when it has a reservation and is not computed. When nothing was
launched, nothing is on its way and some request is due, one parked request gives its KV back. That
counts as one of its attempts.

Why that suffices, in any order on either side. To move on, a request needs (1) its reservation and
(2) prefill's KV. One that has both is sent and frees its KV on prefill. Only parked requests take
(2) before (1), and they can be made to give it back. So a standstill with a due request ends by
giving way. No request gives way more often than it has attempts; after that it waits for (1) first.
So there are finitely many returns. After them only requests with a reservation compete for
prefill's KV, and each gets it in some order. With no request due, none that decode holds KV for
waits for prefill: those that it serves end. `test/unit/test_progress.py` has the model of both
memories.
"""

from __future__ import annotations

from sglang_kairos.policy.urgency import Floats


def who_gives_way(launched: bool, sending: int, due: int, parked_due_s: Floats) -> int:
    """Returns the index of the parked request to requeue now, -1 for none.

    `launched`: whether a step was or is under way. `sending`: how many requests with a reservation
    still hold KV here because it is being sent. `due`: how many have a reservation and wait to be
    computed. `parked_due_s` (n,): seconds left of each parked request's TTFT target. The request
    whose first token is due last gives way; ties fall to the last one.
    """
    if launched or sending or not due or not len(parked_due_s):
        return -1
    return max(range(len(parked_due_s)), key=lambda index: (parked_due_s[index], index))
