"""Chooses which running request to retract when the next step's KV does not fit: the least harmed.

A retracted request is silent until there is memory for it again, for an unknown time.
Order in which requests are given up:
    1. Requests LOST or more tokens behind (`policy.decode_step`): their SLO is missed already. The one
       with the largest context goes first, so that the fewest must go.
    2. Then the lowest class weight, and within a weight the longest lead: it can stay away longest
       and still meet its TPOT target.

SGLang's own order is the fewest output tokens first.

Trade-off: a request far behind may be retracted again and again while the load lasts. When it comes
back is for SGLang and for `policy.admission` to decide.
Source: our own design.
"""

from __future__ import annotations

import numpy as np

from sglang_kairos.policy.decode_step import LOST
from sglang_kairos.policy.load import Floats


def keep_order(
    lead_s: Floats, tpot_s: Floats, context_tokens: Floats, weight: Floats | None = None
) -> list[int]:
    """Returns the running indices, the ones most worth keeping first. SGLang retracts from the end.

    All arrays have shape (n,). `lead_s`: how early the last token came, in seconds (negative:
    late). `tpot_s`: target in seconds. `context_tokens`: KV tokens. `weight`: of the SLO class;
    None: equal.
    """
    lead, context = np.asarray(lead_s, float), np.asarray(context_tokens, float)
    lost = lead < -LOST * np.asarray(tpot_s, float)
    worth = np.zeros(lead.size) if weight is None else -np.asarray(weight, float)
    within = np.where(lost, context, lead)
    order: list[int] = np.lexsort((within, np.where(lost, 0.0, worth), lost)).tolist()
    return order
