"""What a request says about its SLO once NVIDIA Dynamo's frontend has read it.

The frontend hands a worker no HTTP body but a dict of its own. Of that these count:

    router.ttft_target        TTFT target, ms: ``nvext.router.ttft_target`` of a body
    router.itl_target         TPOT target, ms: ``nvext.router.itl_target`` of a body
    routing.priority          ``nvext.agent_hints.priority``: its class, by the configuration's
                              ``--kairos-priority-classes``
    request_timestamp_ms      when the frontend got it, ms since 1970: its age
    extra_args.sglang_tito    body of the native ``/generate``, which may say all that Kairos knows

A client wrote the targets, so one out of range is an SloError. Source: ai-dynamo 1.6.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sglang_kairos.slo.body import AGE_STEP_MS, CHAT, GENERATE, carry
from sglang_kairos.slo.targets import SloTable


def age_ms(request: Mapping[str, Any], now_ms: float, most_ms: float) -> float:
    """Returns the milliseconds since the frontend got the request; 0 if unknown or not believed.

    `now_ms`: this machine's time since 1970. An age below `AGE_STEP_MS` is not worth saying. One
    above `most_ms` means that a clock is wrong.
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
    """Returns SGLang's ``custom_params`` with the SLO of a Dynamo request; None if there is none.

    `params`: what Dynamo has put there itself. `preferred`: see `slo.body.carry`. Raises SloError,
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
    """Returns the body of a native ``/generate`` with its SLO where SGLang carries it.

    Raises SloError for a value out of range.
    """
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
    """Returns the targets and the priority of a request, where the client's body had them."""
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
