"""Service-level objectives: what a request is promised, and how it says so.

A request names its targets in the JSON body (``ttft_ms``, ``tpot_ms``, ``slo_class``,
or the same three inside an ``slo`` object; ``slo`` may also be a bare class name) or in headers
(``x-slo-ttft-ms``, ``x-slo-tpot-ms``, ``x-slo-class``, ``x-dynamo-slo-ttft-ms``).
Body beats header, an explicit number beats the class, the server's default fills the rest. A value
out of range is an error in a body, which a client wrote; a header may come from infrastructure, so
its number is moved into the range, and a word or nothing at all counts as nothing said (`HeaderNotes`).

Between router, prefill and decode the resolved SLO travels in SGLang's own
``custom_params`` under the key ``kairos`` (see `to_wire`), because that field follows every
tokenizer, session and disaggregation path unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WIRE_KEY = "kairos"
BODY_FIELDS = ("ttft_ms", "tpot_ms", "slo_class", "slo")
TTFT_HEADERS = ("x-slo-ttft-ms", "x-dynamo-slo-ttft-ms")
TPOT_HEADERS = ("x-slo-tpot-ms",)
CLASS_HEADERS = ("x-slo-class",)

# Milliseconds. Above these a value is a unit mistake (seconds of epoch, nanoseconds), not a target.
LIMITS_MS: dict[str, tuple[float, float]] = {
    "ttft_ms": (1.0, 3_600_000.0),
    "tpot_ms": (0.1, 600_000.0),
    "age_ms": (0.0, 3_600_000.0),
}


MOST_KNOWN = 1024  # a process remembers so many different targets
LONGEST_NAME = 64  # of a class that this server does not know

# What `request_slo` tells of headers that it did not take as written: "x-slo-ttft-ms clamped", say.
HeaderNotes = list[str]


class SloError(ValueError):
    """A target that cannot be honoured as written; `field` names it, the text gives the range."""

    def __init__(self, field_name: str, reason: str) -> None:
        super().__init__(f"{field_name}: {reason}")
        self.field = field_name


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request or class. Times in milliseconds; `weight` is relative importance."""

    ttft_ms: float
    tpot_ms: float
    name: str = "default"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SloTable:
    """The server's default SLO and its named classes."""

    default: Slo
    classes: Mapping[str, Slo] = field(default_factory=dict)
    _known: dict[Any, Slo] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, wire: Any) -> RequestSlo:
        """`from_wire`, but targets like those of an earlier request are not parsed again."""
        key: Any = None
        if isinstance(wire, Mapping):
            # True, 1 and 1.0 are equal, but not all of them are targets.
            key = tuple((type(value), value) for value in map(wire.get, _TARGET_KEYS))
            try:
                if (known := self._known.get(key)) is not None:
                    return RequestSlo(known, _wire_number(wire, "age_ms", 0.0))
            except TypeError:  # a list, say: the parser words what is wrong with it
                key = None
        read = from_wire(wire, self)
        if key is not None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = read.slo
        return read

    def named(self, name: str, field_name: str = "slo_class") -> Slo:
        """The class called `name`; SloError lists the known ones otherwise."""
        if name == "default" and name not in self.classes:
            return self.default
        try:
            return self.classes[name]
        except KeyError:
            known = ", ".join(sorted({"default", *self.classes}))
            shown = name if len(name) <= 64 else name[:61] + "..."
            raise SloError(field_name, f"unknown class {shown!r}; known: {known}") from None


@dataclass(frozen=True, slots=True)
class RequestSlo:
    """A request's resolved SLO and the milliseconds it had already spent when it was written."""

    slo: Slo
    age_ms: float = 0.0


def check_ms(field_name: str, value: Any, limits_key: str | None = None) -> float:
    """`value` as milliseconds, or SloError naming the field and the accepted range."""
    low, high = LIMITS_MS[limits_key or field_name]
    wanted = f"must be a number of milliseconds between {_plain(low)} and {_plain(high)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SloError(field_name, f"{wanted}, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise SloError(field_name, f"{wanted}, got a number too large") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise SloError(field_name, f"{wanted}, got {_plain(number)}")
    return number


def check_weight(field_name: str, value: Any) -> float:
    """`value` as a relative weight (no unit), or SloError naming the field and the range."""
    wanted = "must be a number between 0.001 and 1000"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SloError(field_name, f"{wanted}, got {_shown(value)}")
    if not 0.001 <= value <= 1000:
        raise SloError(field_name, wanted)
    return float(value)


def _plain(number: float) -> str:
    """As a person would write it: 3600001 is no 3.6e+06."""
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    return repr(number)


def _shown(value: Any) -> str:
    """A wrong value for an error text. Never a container's repr: that can exceed the stack."""
    if isinstance(value, str | bool) and len(repr(value)) <= 64:
        return repr(value)
    return "null" if value is None else f"a {type(value).__name__}"


def _header_ms(
    headers: Mapping[str, str], names: tuple[str, ...], key: str, notes: HeaderNotes
) -> float | None:
    """The first header that names a number, moved into the range."""
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


def _body_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The SLO fields of a body, the ``slo`` object flattened; explicit top-level fields win."""
    found: dict[str, Any] = {}
    nested = body.get("slo")
    if isinstance(nested, str):
        found["slo_class"] = nested
    elif isinstance(nested, Mapping):
        for key, value in nested.items():
            if value is None:
                continue
            if key in ("ttft_ms", "tpot_ms"):
                found[key] = value
            elif key in ("class", "slo_class"):
                found["slo_class"] = value
            else:
                known = "ttft_ms, tpot_ms, class"
                raise SloError("slo", f"unknown key {str(key)[:64]!r}; known: {known}")
    elif nested is not None:
        raise SloError("slo", "must be a class name or an object with ttft_ms, tpot_ms, class")
    for key in ("ttft_ms", "tpot_ms", "slo_class"):
        if body.get(key) is not None:
            found[key] = body[key]
    return found


def request_slo(
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    table: SloTable,
    notes: HeaderNotes | None = None,
) -> Slo | None:
    """The SLO a request asks for, or None when it says nothing (the default then applies).

    `headers` has lower-case names; what is not taken as they write it goes to `notes`. Raises
    SloError on a value of the body out of range, or an unknown class.
    """
    asked = _body_fields(body)
    notes = [] if notes is None else notes
    ttft: float | None
    tpot: float | None
    if "ttft_ms" in asked:
        ttft = check_ms("ttft_ms", asked["ttft_ms"])
    else:
        ttft = _header_ms(headers, TTFT_HEADERS, "ttft_ms", notes)
    if "tpot_ms" in asked:
        tpot = check_ms("tpot_ms", asked["tpot_ms"])
    else:
        tpot = _header_ms(headers, TPOT_HEADERS, "tpot_ms", notes)
    class_field, class_name = "slo_class", asked.get("slo_class")
    if class_name is None:
        for name in CLASS_HEADERS:
            said = headers.get(name)
            if said:
                class_field, class_name = name, said
                break
            if said is not None:
                notes.append(f"{name} ignored")
    if class_name is not None and not isinstance(class_name, str):
        raise SloError(class_field, "must be the name of an SLO class")
    if ttft is None and tpot is None and class_name is None:
        return None
    base = table.default if class_name is None else table.named(class_name, class_field)
    return Slo(
        ttft_ms=base.ttft_ms if ttft is None else ttft,
        tpot_ms=base.tpot_ms if tpot is None else tpot,
        name=base.name,
        weight=base.weight,
    )


def to_wire(slo: Slo, age_ms: float = 0.0) -> dict[str, Any]:
    """What rides in ``custom_params["kairos"]``: flat scalars only, as SGLang requires."""
    return {
        "ttft_ms": slo.ttft_ms,
        "tpot_ms": slo.tpot_ms,
        "class": slo.name,
        "weight": slo.weight,
        "age_ms": max(0.0, round(age_ms, 3)),
    }


def from_wire(wire: Any, table: SloTable) -> RequestSlo:
    """Inverse of `to_wire`. Missing fields take the default; SloError on a malformed one."""
    if wire is None:
        return RequestSlo(table.default)
    if not isinstance(wire, Mapping):
        raise SloError(f"custom_params.{WIRE_KEY}", "must be an object")
    base = table.default
    name = wire.get("class")
    if name is not None and not isinstance(name, str):
        raise SloError(_WIRE_PATH + "class", "must be the name of an SLO class")
    if name is not None and (name in table.classes):
        base = table.classes[name]
    elif name is not None and len(name) > LONGEST_NAME:
        raise SloError(_WIRE_PATH + "class", f"must have at most {LONGEST_NAME} characters")
    weight = wire.get("weight")
    slo = Slo(
        ttft_ms=_wire_number(wire, "ttft_ms", base.ttft_ms),
        tpot_ms=_wire_number(wire, "tpot_ms", base.tpot_ms),
        name=name or base.name,
        weight=base.weight if weight is None else check_weight(_WIRE_PATH + "weight", weight),
    )
    return RequestSlo(slo, _wire_number(wire, "age_ms", 0.0))


_WIRE_PATH = f"custom_params.{WIRE_KEY}."
_TARGET_KEYS = ("ttft_ms", "tpot_ms", "class", "weight")


def _wire_number(wire: Mapping[str, Any], key: str, fallback: float) -> float:
    value = wire.get(key)
    return fallback if value is None else check_ms(_WIRE_PATH + key, value, key)


_CLASS_KEYS = "ttft_ms, tpot_ms, weight"


def parse_classes(raw: Any, default: Slo) -> dict[str, Slo]:
    """SLO classes from a decoded file, as in ``{"chat": {"ttft_ms": 500, "weight": 2}}``."""
    if not isinstance(raw, Mapping):
        raise SloError("slo_classes", f"must be an object of class name -> {{{_CLASS_KEYS}}}")
    classes: dict[str, Slo] = {}
    for name, entry in raw.items():
        where = f"slo_classes.{name}"
        if not isinstance(entry, Mapping):
            raise SloError(where, "must be an object with ttft_ms and/or tpot_ms")
        unknown = set(entry) - {"ttft_ms", "tpot_ms", "weight"}
        if unknown:
            raise SloError(where, f"unknown key {min(unknown)!r}; known: {_CLASS_KEYS}")
        classes[str(name)] = Slo(
            ttft_ms=check_ms(f"{where}.ttft_ms", entry.get("ttft_ms", default.ttft_ms), "ttft_ms"),
            tpot_ms=check_ms(f"{where}.tpot_ms", entry.get("tpot_ms", default.tpot_ms), "tpot_ms"),
            name=str(name),
            weight=check_weight(f"{where}.weight", entry.get("weight", 1.0)),
        )
    return classes
