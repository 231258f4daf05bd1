"""How a request ends that no server has answered: as a status, or inside the stream that has begun."""

from __future__ import annotations

import logging
from typing import Any

from sglang_kairos.policy.overload import retry_after_s
from sglang_kairos.router.errors import Shed
from sglang_kairos.router.request.context import RequestContext
from sglang_kairos.router.request.upstream_stream import break_off
from sglang_kairos.router.responses import Send, refuse

logger = logging.getLogger(__name__)


async def end_with_error(
    context: RequestContext, send: Send, status: int, text: str, kind: str
) -> int:
    """Sends an error; returns the status to count."""
    logger.warning("request %s ends with %d: %s", context.request_id, status, text)
    if context.seen.started:
        await break_off(context.seen, send, status, text, kind)
        return status
    retry = 1 if status == 503 else None
    return await refuse(
        send, context.path, status, text, kind, retry_after_s=retry, headers=context.own_headers
    )


async def refuse_shed(context: RequestContext, shed: Shed, send: Send) -> int:
    """Says what was predicted, and when to come back; returns the status."""
    predicted_s, slo = shed.ttft_s, context.slo
    facts: dict[str, Any] = {
        "predicted_ttft_ms": round(1e3 * predicted_s, 1),
        "ttft_ms": slo.ttft_ms,
        "predicted_tpot_ms": round(1e3 * shed.tpot_s, 3),
        "tpot_ms": slo.tpot_ms,
    }
    text = (
        f"no pair of servers can keep the SLO: TTFT {facts['predicted_ttft_ms']:g} ms predicted"
        f" (target {slo.ttft_ms:g}), TPOT {facts['predicted_tpot_ms']:g} ms"
        f" (target {slo.tpot_ms:g}), without breaking one promised to another request"
    )
    return await refuse(
        send,
        context.path,
        429,
        text,
        "Overloaded",
        retry_after_s=retry_after_s(predicted_s, slo.ttft_ms / 1e3),
        facts=facts,
        headers=context.own_headers,
    )
