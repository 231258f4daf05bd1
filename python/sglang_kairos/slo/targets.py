"""Service-level objectives: what a request is promised, and the server's table of them.

`slo.request` says how a request asks for one, `slo.body` how HTTP carries it.

Between router, prefill and decode the resolved SLO travels in SGLang's own ``custom_params`` under
the key ``kairos`` (see `to_wire`). That field passes every tokenizer, session and disaggregation
path unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_kairos.slo.age import NO_AGE, AgeRule

WIRE_KEY = "kairos"

# Milliseconds. Above these a value is a unit mistake (seconds of epoch, nanoseconds), not a target.
LIMITS_MS: dict[str, tuple[float, float]] = {
    "ttft_ms": (1.0, 3_600_000.0),
    "tpot_ms": (0.1, 600_000.0),
    "age_ms": (0.0, 3_600_000.0),
}


MOST_KNOWN = 1024  # the number of different targets that a process remembers
LONGEST_NAME = 64  # of a class that this server does not know


class SloError(ValueError):
    """A target that cannot be honoured; `field` names it, and the message gives the range."""

    def __init__(self, field_name: str, reason: str) -> None:
        super().__init__(f"{field_name}: {reason}")
        self.field = field_name


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request or class, in milliseconds; `weight` is relative importance."""

    ttft_ms: float
    tpot_ms: float
    name: str = "default"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SloTable:
    """The server's default SLO, its named classes and its rules for priorities.

    `priorities`: pairs (lowest priority, class name) in rising order, for requests without a class.
    """

    default: Slo
    classes: Mapping[str, Slo] = field(default_factory=dict)
    priorities: tuple[tuple[int, str], ...] = ()
    age_rule: AgeRule = NO_AGE
    _known: dict[Any, Slo] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, wire: Any) -> RequestSlo:
        """Like `from_wire`, but targets equal to an earlier request's are not parsed again."""
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
        """Returns the class called `name`. Raises SloError, which lists the known ones."""
        if name == "default" and name not in self.classes:
            return self.default
        try:
            return self.classes[name]
        except KeyError:
            known = ", ".join(sorted({"default", *self.classes}))
            shown = name if len(name) <= 64 else name[:61] + "..."
            raise SloError(field_name, f"unknown class {shown!r}; known: {known}") from None

    def of_priority(self, priority: int) -> Slo | None:
        """Returns the class of a request with this priority; None below the lowest that has one."""
        name = None
        for lowest, candidate in self.priorities:
            if lowest > priority:
                break
            name = candidate
        return None if name is None else self.named(name, "priority")


@dataclass(frozen=True, slots=True)
class RequestSlo:
    """A request's resolved SLO, and the milliseconds that it had already spent when written."""

    slo: Slo
    age_ms: float = 0.0


def check_ms(field_name: str, value: Any, limits_key: str | None = None) -> float:
    """Returns `value` as milliseconds. Raises SloError naming the field and the accepted range."""
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
    """Returns `value` as a relative weight. Raises SloError naming the field and the range."""
    wanted = "must be a number between 0.001 and 1000"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SloError(field_name, f"{wanted}, got {_shown(value)}")
    if not 0.001 <= value <= 1000:
        raise SloError(field_name, wanted)
    return float(value)


def _plain(number: float) -> str:
    """Returns a number as a person would write it: 3600001, not 3.6e+06."""
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    return repr(number)


def _shown(value: Any) -> str:
    """Returns a wrong value for an error text; no container's repr, which can exceed the stack."""
    if isinstance(value, str | bool) and len(repr(value)) <= 64:
        return repr(value)
    return "null" if value is None else f"a {type(value).__name__}"


def to_wire(slo: Slo, age_ms: float = 0.0) -> dict[str, Any]:
    """Returns what rides in ``custom_params["kairos"]``: flat scalars only, as SGLang requires."""
    return {
        "ttft_ms": slo.ttft_ms,
        "tpot_ms": slo.tpot_ms,
        "class": slo.name,
        "weight": slo.weight,
        "age_ms": max(0.0, round(age_ms, 3)),
    }


def from_wire(wire: Any, table: SloTable) -> RequestSlo:
    """Inverse of `to_wire`. Missing fields take the default. Raises SloError on a malformed one."""
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
    """Returns SLO classes of a decoded file, as in ``{"chat": {"ttft_ms": 500, "weight": 2}}``."""
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


def parse_priorities(raw: Any, table: SloTable) -> tuple[tuple[int, str], ...]:
    """Returns pairs (lowest priority, class) in rising order: ``{"0": "batch", "10": "chat"}``.

    Raises SloError for a priority that is no whole number and for a class that `table` lacks.
    """
    where = "priority_classes"
    if not isinstance(raw, Mapping):
        raise SloError(where, "must be an object of priority -> class name")
    found: dict[int, str] = {}
    for key, name in raw.items():
        try:
            priority = int(str(key))
        except ValueError:
            shown = str(key)[:64]
            raise SloError(where, f"priority {shown!r} must be a whole number") from None
        if priority in found:
            raise SloError(where, f"priority {priority} is listed twice")
        if not isinstance(name, str):
            raise SloError(f"{where}.{priority}", "must be the name of an SLO class")
        table.named(name, f"{where}.{priority}")
        found[priority] = name
    return tuple(sorted(found.items()))
