"""No circular wait between prefill's and decode's KV: who gives way when prefill stands still.

With optimistic prefill a request may be computed before decode has reserved KV for it; it is then
*parked*: its KV waits on prefill until decode's answer comes. Decode cannot know who is parked. It
may have given its KV to others, who have yet to be computed and find prefill full of parked ones:
each side waits for the other.

The rule: when nothing was launched and nothing is on its way, and somebody is *due*, one with a
reservation that prefill has not computed, then a parked one gives its KV back and counts an attempt.

Why that suffices, whatever the order on either side. A request moves on if it has (1) its
reservation and then (2) prefill's KV, in that order: whoever has both needs nothing more, is sent
and frees its KV on prefill. Only the parked take (2) before (1), and they can be made to give it
back. A standstill with somebody due therefore ends by giving way. Nobody gives way more often than
it has attempts; after that it waits for (1) first like any other. So there are finitely many
returns, after which only those with a reservation compete for prefill's KV and get it in some
order. With nobody due, decode's KV is held by none that waits for prefill: those it serves end.
`test/unit/test_progress.py` has the model of both memories.
"""

from __future__ import annotations

from sglang_kairos.policy.urgency import Floats


def who_gives_way(launched: bool, sending: int, due: int, parked_due_s: Floats) -> int:
    """Index of the parked one to requeue now, -1: nobody.

    `launched`: whether a step was or is under way; `sending`: how many with a reservation still
    hold KV here because it is being sent; `due`: how many have a reservation and wait to be
    computed; `parked_due_s` (n,): time left of the TTFT of each parked one. Whose first token is due
    last gives way; ties fall to the last one.
    """
    if launched or sending or not due or not len(parked_due_s):
        return -1
    return max(range(len(parked_due_s)), key=lambda index: (parked_due_s[index], index))
