"""What a request says about its SLO once NVIDIA Dynamo's frontend has read it.

The frontend hands a worker no HTTP body but a dict of its own. Of that these count:

==============================  =====================================================================
``router.ttft_target``          the TTFT target, milliseconds: ``nvext.router.ttft_target`` of a body
``router.itl_target``           the TPOT target, milliseconds: ``nvext.router.itl_target``
``routing.priority``            ``nvext.agent_hints.priority``; its class by ``--kairos-priority-classes``
``request_timestamp_ms``        when the frontend got it, milliseconds since 1970: its age
``extra_args.sglang_tito``      the body of the native ``/generate``, which may say all that Kairos knows
==============================  =====================================================================

A client wrote the targets: one out of range is an SloError. Source: ai-dynamo 1.6.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sglang_kairos.slo.body import AGE_STEP_MS, CHAT, GENERATE, carry
from sglang_kairos.slo.targets import SloTable


def age_ms(request: Mapping[str, Any], now_ms: float, most_ms: float) -> float:
    """Milliseconds since the frontend got the request; 0 where it does not say, or is not believed.

    `now_ms`: this machine's time since 1970. Less than `AGE_STEP_MS` is not worth saying; more than
    `most_ms` is a clock that is wrong. Both milliseconds.
    """
    since = request.get("request_timestamp_ms")
    if isinstance(since, bool) or not isinstance(since, int | float):
        return 0.0
    age = now_ms - since
    return age if math.isfinite(age) and AGE_STEP_MS <= age <= most_ms else 0.0


def custom_params(
    request: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    table: SloTable,
    now_ms: float,
    preferred: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """SGLang's ``custom_params`` for a request of Dynamo's, with its SLO; None: nothing to say.

    `params`: what Dynamo has put there itself. `preferred`: see `slo_http.carry`. Raises SloError,
    which names the field as the client wrote it.
    """
    body = _said(request)
    if params is not None:
        body["custom_params"] = dict(params)
    _carry(body, CHAT, request, table, now_ms, preferred)
    found: dict[str, Any] | None = body.get("custom_params")
    return found


def native_body(
    request: Mapping[str, Any],
    payload: Mapping[str, Any],
    table: SloTable,
    now_ms: float,
    preferred: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The body `payload` of a native ``/generate`` with its SLO where SGLang carries it. SloError."""
    body = dict(payload)
    routing = request.get("routing")
    # The frontend moves a body's priority there, and writes 0 where there is none.
    if isinstance(routing, Mapping) and routing.get("priority"):
        body["priority"] = routing["priority"]
    params = body.get("sampling_params")
    if isinstance(params, dict):  # the request may be sent again, and must say the same then
        body["sampling_params"] = dict(params)
    _carry(body, GENERATE, request, table, now_ms, preferred)
    kept = {*payload, "sampling_params"}
    return {key: value for key, value in body.items() if key in kept}


def _said(request: Mapping[str, Any]) -> dict[str, Any]:
    """The targets and the priority of a request, where the client's body had them."""
    nvext: dict[str, Any] = {}
    router, routing = request.get("router"), request.get("routing")
    if isinstance(router, Mapping):
        nvext["router"] = router
    if isinstance(routing, Mapping) and routing.get("priority") is not None:
        nvext["agent_hints"] = {"priority": routing["priority"]}
    return {"nvext": nvext} if nvext else {}


def _carry(
    body: dict[str, Any],
    path: str,
    request: Mapping[str, Any],
    table: SloTable,
    now_ms: float,
    preferred: Mapping[str, Any] | None,
) -> None:
    age = age_ms(request, now_ms, table.age_rule.most_ms)
    carry(body, path, {}, table, age_ms=age, always=age > 0.0, preferred=preferred)
