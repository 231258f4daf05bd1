"""What a request asks for: every way to state an SLO, and which of them counts.

For each target the first of these that says something counts:

1. the body: ``ttft_ms``, the ``slo`` object, ``nvext.router`` (NVIDIA Dynamo's, in milliseconds);
2. a header, in the order of `TTFT_HEADERS` and `TPOT_HEADERS`; 3. the SLO class: the body's, else a
header's, else that which the configuration has for the body's
   ``priority`` (SGLang's) or ``nvext.agent_hints.priority``;
4. the server's default.

A client writes the body, so a value out of range or an unknown class there is an `SloError`. A
header may come from infrastructure and never refuses a request. Its number is moved into the range;
a word, an empty value or an unknown class is ignored. `HeaderNotes` record it.

Sources of others' fields:
- ``nvext.router`` and ``agent_hints.priority``: README of ai-dynamo 1.6.1's ``global_router``
  (floats in milliseconds; a 32-bit number, higher is more urgent);
- ``x-llm-d-slo-…``: llm-d's predicted-latency guide;
- ``x-dynamo-slo-ttft-ms``: Dynamo's proposal 9755;
- ``x-dynamo-meta-slo-ttft-ms``: Dynamo's gateway picker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sglang_kairos.slo.age import HeaderNotes
from sglang_kairos.slo.targets import LIMITS_MS, Slo, SloError, SloTable, check_ms

# Fields of a body that are only there for this; they leave it once they are read.
BODY_FIELDS = ("ttft_ms", "tpot_ms", "slo_class", "slo")
# Others' fields, which stay: their keys at the innermost level.
FOREIGN_KEYS = ("ttft_target", "itl_target")
PRIORITY_KEY = "priority"

TTFT_HEADERS = (
    "x-slo-ttft-ms",
    "x-llm-d-slo-ttft-ms",
    "x-dynamo-slo-ttft-ms",
    "x-dynamo-meta-slo-ttft-ms",
)
TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
CLASS_HEADERS = ("x-slo-class",)
SLO_HEADERS = frozenset((*TTFT_HEADERS, *TPOT_HEADERS, *CLASS_HEADERS))

_TTFT_PATHS = (("ttft_ms",), ("slo", "ttft_ms"), ("nvext", "router", "ttft_target"))
_TPOT_PATHS = (("tpot_ms",), ("slo", "tpot_ms"), ("nvext", "router", "itl_target"))
_CLASS_PATHS = (("slo_class",), ("slo", "slo_class"), ("slo", "class"))
_PRIORITY_PATHS = ((PRIORITY_KEY,), ("nvext", "agent_hints", PRIORITY_KEY))
_OBJECTS = (("nvext",), ("nvext", "router"), ("nvext", "agent_hints"))
_SLO_KEYS = frozenset(("ttft_ms", "tpot_ms", "class", "slo_class"))
_MOST_PRIORITY = 2**63 - 1  # SGLang's field is a signed 64-bit number


def request_slo(
    body: dict[str, Any],
    headers: Mapping[str, str],
    table: SloTable,
    notes: HeaderNotes | None = None,
) -> Slo | None:
    """Returns the SLO that a request asks for.

    None if it says nothing, so that the default applies. `headers` has lower-case names. `notes`
    gets what is not taken as the headers write it. Raises SloError for a value of the body out of
    range, or an unknown class there.
    """
    notes = [] if notes is None else notes
    _check_objects(body)
    ttft = _body_ms(body, _TTFT_PATHS, "ttft_ms")
    if ttft is None:
        ttft = _header_ms(headers, TTFT_HEADERS, "ttft_ms", notes)
    tpot = _body_ms(body, _TPOT_PATHS, "tpot_ms")
    if tpot is None:
        tpot = _header_ms(headers, TPOT_HEADERS, "tpot_ms", notes)
    named = _class(body, headers, table, notes)
    if ttft is None and tpot is None and named is None:
        return None
    base = named or table.default
    return Slo(
        ttft_ms=base.ttft_ms if ttft is None else ttft,
        tpot_ms=base.tpot_ms if tpot is None else tpot,
        name=base.name,
        weight=base.weight,
    )


def _at(body: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Returns the value at a path of keys; None where there is none."""
    value: Any = body
    for key in path:
        if type(value) is not dict:  # as JSON has it; an abstract type takes five times as long
            return None
        value = value.get(key)
    return value


def _check_objects(body: dict[str, Any]) -> None:
    """Raises SloError where something else stands in the place of an object of targets."""
    slo = body.get("slo")
    if isinstance(slo, dict):
        for key in slo:
            if key not in _SLO_KEYS:
                known = "ttft_ms, tpot_ms, class"
                raise SloError("slo", f"unknown key {str(key)[:64]!r}; known: {known}")
    elif slo is not None and not isinstance(slo, str):
        raise SloError("slo", "must be a class name or an object with ttft_ms, tpot_ms, class")
    if body.get("nvext") is not None:
        for path in _OBJECTS:
            found = _at(body, path)
            if found is not None and not isinstance(found, dict):
                raise SloError(".".join(path), "must be an object")


def _body_ms(body: dict[str, Any], paths: tuple[tuple[str, ...], ...], key: str) -> float | None:
    for path in paths:
        if (value := _at(body, path)) is not None:
            return check_ms(".".join(path), value, key)
    return None


def _header_ms(
    headers: Mapping[str, str], names: tuple[str, ...], key: str, notes: HeaderNotes
) -> float | None:
    """Returns the first header that names a number, moved into the range."""
    low, high = LIMITS_MS[key]
    for name in names:
        text = headers.get(name)
        if text is None:
            continue
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            notes.append(f"{name} ignored")
            continue
        inside = min(max(number, low), high)
        if inside != number:
            notes.append(f"{name} clamped")
        return inside
    return None


def _class(
    body: dict[str, Any], headers: Mapping[str, str], table: SloTable, notes: HeaderNotes
) -> Slo | None:
    for path in _CLASS_PATHS:
        if (name := _at(body, path)) is not None:
            return _named(name, ".".join(path), table)
    if isinstance(body.get("slo"), str):
        return _named(body["slo"], "slo", table)
    for header in CLASS_HEADERS:
        if (name := headers.get(header)) is not None:
            try:
                return table.named(name, header)
            except SloError:
                notes.append(f"{header} ignored")
    return _of_priority(body, table)


def _named(name: Any, field: str, table: SloTable) -> Slo:
    if not isinstance(name, str):
        raise SloError(field, "must be the name of an SLO class")
    return table.named(name, field)


def _of_priority(body: dict[str, Any], table: SloTable) -> Slo | None:
    """Returns the class of the body's priority, if the configuration has classes for priorities."""
    if not table.priorities:
        return None
    for path in _PRIORITY_PATHS:
        value = _at(body, path)
        if value is None:
            continue
        if type(value) is not int or abs(value) > _MOST_PRIORITY:
            wanted = f"must be a whole number between -{_MOST_PRIORITY} and {_MOST_PRIORITY}"
            raise SloError(".".join(path), wanted)
        return table.of_priority(value)
    return None
