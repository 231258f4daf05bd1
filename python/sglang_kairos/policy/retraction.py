"""Whose KV a decode server gives up when the next step's does not fit: who loses least by it.

A retracted request is silent until there is memory for it again, for a time nobody knows. So there go
    first   who is given up already (LOST tokens or more behind, `policy.packing`): nothing is lost,
            and of these the largest, so that the fewest must go;
    then    the lowest class weight, and within it whoever has the longest lead: he can stay away
            longest and still meet his TPOT.
SGLang's own order is the fewest output tokens first. Our own design.
"""

from __future__ import annotations

import numpy as np

from sglang_kairos.policy.load import Floats
from sglang_kairos.policy.packing import LOST


def keep_order(
    lead_s: Floats, tpot_s: Floats, context_tokens: Floats, weight: Floats | None = None
) -> list[int]:
    """Indices of the running requests, most worth keeping first: SGLang retracts from the end.

    All arrays have shape (n,). `lead_s`: how early the last token came, seconds (negative: late);
    `weight`: of the class, None where all are equal.
    """
    lead, context = np.asarray(lead_s, float), np.asarray(context_tokens, float)
    lost = lead < -LOST * np.asarray(tpot_s, float)
    worth = np.zeros(lead.size) if weight is None else -np.asarray(weight, float)
    within = np.where(lost, context, lead)
    order: list[int] = np.lexsort((within, np.where(lost, 0.0, worth), lost)).tolist()
    return order
