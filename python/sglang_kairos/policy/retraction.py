"""Chooses which running request to retract when the next step's KV does not fit.

A retracted request is silent until there is memory for it again, for a time nobody knows. So the
one whose SLO suffers least goes:
    first   requests that are given up (LOST tokens or more behind, `policy.packing`), the largest
            first, so that the fewest must go: their SLO is lost already;
    then    the lowest class weight, and within it the longest lead: such a request can stay away
            longest and still meet its TPOT target.
SGLang's own order retracts the fewest output tokens first. Source: our own design.
"""

from __future__ import annotations

import numpy as np

from sglang_kairos.policy.load import Floats
from sglang_kairos.policy.packing import LOST


def keep_order(
    lead_s: Floats, tpot_s: Floats, context_tokens: Floats, weight: Floats | None = None
) -> list[int]:
    """Returns the running requests, most worth keeping first: SGLang retracts from the end.

    All arrays have shape (n,). `lead_s`: seconds by which the last token came early, negative if
    late. `weight`: that of the SLO class, None when all are equal.
    """
    lead, context = np.asarray(lead_s, float), np.asarray(context_tokens, float)
    lost = lead < -LOST * np.asarray(tpot_s, float)
    worth = np.zeros(lead.size) if weight is None else -np.asarray(weight, float)
    within = np.where(lost, context, lead)
    order: list[int] = np.lexsort((within, np.where(lost, 0.0, worth), lost)).tolist()
    return order
