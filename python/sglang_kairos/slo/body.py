"""Finds and checks the SLO in an HTTP request body, and puts it where SGLang carries it.

The router and the server's middleware (`engine.hooks.slo_middleware`) share it, so that both accept and
refuse the same requests. It imports nothing of SGLang.

SGLang hands ``custom_params`` to its schedulers. For /generate that is
``sampling_params.custom_params``; `sampling_params` is absent, an object, or a list with one object
per prompt. For /v1/completions and /v1/chat/completions it is the top-level ``custom_params``. The
key inside is `slo.WIRE_KEY`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from sglang_kairos.slo.age import HeaderNotes
from sglang_kairos.slo.request import (
    BODY_FIELDS,
    FOREIGN_KEYS,
    PRIORITY_KEY,
    SLO_HEADERS,
    request_slo,
)
from sglang_kairos.slo.targets import LIMITS_MS, WIRE_KEY, RequestSlo, SloError, SloTable, to_wire

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
SLO_PATHS = frozenset({GENERATE, COMPLETIONS, CHAT})

_KEYS = tuple(f'"{key}"'.encode() for key in (*BODY_FIELDS, *FOREIGN_KEYS, WIRE_KEY))
_PRIORITY = f'"{PRIORITY_KEY}"'.encode()
# A smaller age, in ms, is not worth writing the body anew.
AGE_STEP_MS = 10.0
# A key may be spelt with \u escapes; its letters and underscore all lie in U+005F..U+007A.
_ESCAPES = (b"\\u005", b"\\u006", b"\\u007")


@dataclass(frozen=True, slots=True)
class Carried:
    """What `carry` did: the tightest SLO of the request, and whether the body was changed.

    `wires` are the SLOs that lie in the body now, each object once.
    """

    slo: RequestSlo
    changed: bool
    wires: tuple[dict[str, Any], ...] = ()

    def grow_older(self, age_ms: float) -> None:
        """Makes the body say that the request is `age_ms` older, without reading it anew."""
        for wire in self.wires:
            wire["age_ms"] = _aged(wire.get("age_ms") or 0.0, age_ms)


def mentions_slo(raw: bytes, header_names: Collection[str], table: SloTable) -> bool:
    """Returns whether a body or its headers (lower-case names) can state an SLO or an age.

    Cheap. It may say yes in error but never no: it decides whether the SLO is looked for at all.
    """
    if not SLO_HEADERS.isdisjoint(header_names):
        return True
    if any(name in header_names for name in table.age_rule.headers):
        return True
    if table.priorities and _PRIORITY in raw:
        return True
    return any(key in raw for key in _KEYS) or any(key in raw for key in _ESCAPES)


def carry(
    body: dict[str, Any],
    path: str,
    headers: Mapping[str, str],
    table: SloTable,
    *,
    age_ms: float = 0.0,
    now_s: float | None = None,
    always: bool = False,
    preferred: Mapping[str, Any] | None = None,
    notes: HeaderNotes | None = None,
) -> Carried:
    """Moves the SLO of a request to where SGLang carries it. Changes `body` in place.

    An SLO that is already on the wire wins over the body's own fields and keeps all but its age.
    `age_ms`: milliseconds that the request has spent here; they are added to that age. `now_s`:
    time since 1970; with it, no request is younger than a gateway in front says (`slo.age`).
    `always`: a request that asks for nothing still carries its age, and the next server's default
    SLO fills the rest. `preferred`: the server's own ``custom_params``
    (``--preferred-sampling-params``). SGLang drops these as soon as a request has some; here they
    stay unless the request brings others than ours. `notes`: see `slo.request_slo`.

    Raises SloError for a value out of range.
    """
    holders = _holders(body, path, create=False)
    wired = bool(holders) and all(_wire_in(holder) is not None for holder, _ in holders)
    asks = not wired or any(body.get(name) is not None for name in BODY_FIELDS)
    notes = [] if notes is None else notes
    asked = request_slo(body, headers, table, notes) if asks else None
    since_ms = 0.0 if now_s is None else table.age_rule.age_ms(headers, now_s, notes)
    oldest_ms = _aged(max(age_ms, since_ms), 0.0)
    wire: dict[str, Any] | None = None
    if asked is not None:
        wire = to_wire(asked, oldest_ms)
    elif always or since_ms >= AGE_STEP_MS:
        wire = {"age_ms": oldest_ms}
    changed = False
    for name in BODY_FIELDS:
        changed |= body.pop(name, None) is not None
    found: list[RequestSlo] = []
    wires: dict[int, dict[str, Any]] = {}
    for holder, place in holders or _holders(body, path, create=wire is not None):
        params, existing = holder.get("custom_params"), _wire_in(holder)
        if params is not None and not isinstance(params, dict):
            if wire is None:
                continue
            raise SloError(place, "must be an object")
        if existing is not None:
            slo, chosen = _older(existing, table, age_ms, since_ms)
        elif wire is not None:
            slo, chosen = RequestSlo(asked or table.default, oldest_ms), wire
        else:
            continue
        found.append(slo)
        own = {key: value for key, value in (params or {}).items() if key != WIRE_KEY}
        kept = own or dict(preferred or {})
        if chosen != existing or kept != own:
            holder["custom_params"] = {**kept, WIRE_KEY: chosen}
            changed = True
        else:
            chosen = existing
        wires[id(chosen)] = chosen
    if not found:
        found.append(RequestSlo(asked or table.default, oldest_ms))
    tightest = min(found, key=lambda item: item.slo.ttft_ms - item.age_ms)
    return Carried(tightest, changed, tuple(wires.values()))


def _holders(body: dict[str, Any], path: str, create: bool) -> list[tuple[dict[str, Any], str]]:
    """Returns the objects of a body that own a ``custom_params``, with that field's name.

    Each object comes once. A malformed ``sampling_params`` has none: SGLang answers it with its own
    error.
    """
    if path != GENERATE:
        return [(body, "custom_params")]
    params = body.get("sampling_params")
    if params is None and create:
        params = body["sampling_params"] = {}
    if isinstance(params, dict):
        return [(params, "sampling_params.custom_params")]
    if isinstance(params, list):
        found: dict[int, tuple[dict[str, Any], str]] = {}
        for index, item in enumerate(params):
            if isinstance(item, dict):  # all samples of a prompt share one
                found.setdefault(id(item), (item, f"sampling_params[{index}].custom_params"))
        return list(found.values())
    return []


def _wire_in(holder: dict[str, Any]) -> Any:
    """Returns the SLO that a holder of ``custom_params`` carries already, unchanged."""
    params = holder.get("custom_params")
    return params.get(WIRE_KEY) if isinstance(params, dict) else None


def _aged(was_ms: float, more_ms: float) -> float:
    return round(min(was_ms + more_ms, LIMITS_MS["age_ms"][1]), 3)


def _older(
    wire: Any, table: SloTable, age_ms: float, since_ms: float
) -> tuple[RequestSlo, dict[str, Any]]:
    """Returns a wire SLO read and made canonical: known keys only, checked, older by `age_ms`.

    A gateway saw the request `since_ms` ago, which the writer of the wire may not have known.
    Unknown keys are dropped: SGLang types the values of ``custom_params`` as flat, and this entry
    keeps to it.
    """
    read = table.read(wire)
    aged = _aged(read.age_ms, age_ms)
    if since_ms >= aged + AGE_STEP_MS:
        aged = _aged(since_ms, 0.0)
    older = RequestSlo(read.slo, aged)
    canonical = {
        key: value
        for key, value in to_wire(older.slo, older.age_ms).items()
        if wire.get(key) is not None or (key == "age_ms" and aged > read.age_ms)
    }
    return older, canonical


def dump(body: Any) -> bytes:
    """Returns `body` as JSON bytes. Raises ValueError if it is nested too deep."""
    try:
        return orjson.dumps(body)
    except TypeError:
        # orjson reads 1024 levels but writes 254.
        try:
            return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        except (RecursionError, TypeError):  # a part that is JSON already is no type of its own
            raise ValueError("the body is nested too deep") from None


def error_body(
    path: str, status: int, message: str, kind: str = "BadRequestError", param: str | None = None
) -> bytes:
    """Returns an error in the form that clients of `path` read.

    ``{"error": {"message", "type", "param", "code"}}`` everywhere. SGLang's own OpenAI endpoints
    put the same four at the top level (``"object": "error"``), so those paths answer both ways.
    """
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": status}
    if path.startswith("/v1/"):
        return orjson.dumps({"object": "error", **error, "error": error})
    return orjson.dumps({"error": error})
