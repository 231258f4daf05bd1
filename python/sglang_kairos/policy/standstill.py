"""Ends a circular wait between prefill's and decode's KV: chooses the prefill that gives its KV back.

The problem. With optimistic prefill a request may be computed before decode has reserved KV for it.
It is then *parked*: its KV waits on prefill for decode's answer. Decode cannot know who is parked.
It may have given its KV to requests that prefill has yet to compute, and prefill may be full of
parked ones. Each side then waits for the other.

The rule. Let nothing be launched and nothing on its way. If a request is *due* (it has a
reservation and is not computed), one parked request gives its KV back and counts an attempt.

Why that suffices, whatever the order on either side. A request needs (1) its reservation and (2)
prefill's KV. One that has both is sent and then frees its KV on prefill. Only parked requests take
(2) before (1), and they can be made to give it back. So a standstill with somebody due ends. A
request gives way at most as often as it has attempts; after that it waits for (1) first. So there
are finitely many returns, and afterwards only requests with a reservation compete for prefill's KV.
With nobody due, no request that waits for prefill holds decode's KV, and those that decode runs
end.

Trade-off: a prefill that gives way is computed again. The one with the latest deadline is chosen.
Source: our own design; `test/unit/test_progress.py` checks a model of both memories.
"""

from __future__ import annotations

from sglang_kairos.policy.urgency import Floats


def who_gives_way(launched: bool, sending: int, due: int, parked_due_s: Floats) -> int:
    """Returns the index of the parked request to requeue now; -1: nobody.

    `launched`: a step was or is under way. `sending`: requests with a reservation whose KV is still
    being sent. `due`: requests with a reservation that wait to be computed. `parked_due_s` (n,):
    seconds left of each parked request's TTFT. The latest deadline gives way; ties fall to the last
    one.
    """
    if launched or sending or not due or not len(parked_due_s):
        return -1
    return max(range(len(parked_due_s)), key=lambda index: (parked_due_s[index], index))
