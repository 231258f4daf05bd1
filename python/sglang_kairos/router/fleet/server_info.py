"""What servers tell of themselves, made safe: anything missing or odd is left out.

``/server_info`` costs the scheduler a round trip and, on a Kairos server, says how fast it is.
``/v1/loads`` is answered from shared memory, by stock servers as well, and says what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.slo.limits import RequestLimits

_MODES = ("prefill", "decode", "null")
# Below this many observed steps, a predictor is still its first guess.
ENOUGH_SAMPLES = 5

Law = TypeVar("Law", PrefillLatency, DecodeLatency)


@dataclass(frozen=True, slots=True)
class Load:
    """Of all ranks together. `waiting_tokens`: prompt tokens left to prefill; `tokens`: KV in use
    and asked for; `requests`: running or waiting."""

    requests: int
    tokens: float
    waiting_tokens: float


def load_of(answer: Any) -> Load | None:
    """From ``/v1/loads``; None if that says nothing."""
    rows = answer.get("loads") if isinstance(answer, Mapping) else None
    found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    if not found:
        return None

    def total(key: str) -> float:
        return sum(number(row, key, 0.0, 1e15) or 0.0 for row in found)

    return Load(
        requests=int(total("num_running_reqs") + total("num_waiting_reqs")),
        tokens=total("num_total_tokens"),
        waiting_tokens=total("num_waiting_uncached_tokens"),
    )


def request_limits(info: Mapping[str, Any]) -> RequestLimits:
    """What a server can hold, from ``/server_info``; the vocabulary from a Kairos server only."""
    report: Mapping[str, Any] = next(iter(kairos_reports(info)), {})

    def whole(source: Mapping[str, Any], key: str, low: int) -> int | None:
        found = number(source, key, low, 1e15)
        return None if found is None else int(found)

    bounded = info.get("allow_auto_truncate") is not True
    decodes = (
        info.get("disaggregation_mode") == "decode" and info.get("enable_hisparse") is not True
    )
    context = whole(report, "context_tokens", 1) or whole(info, "context_length", 1)
    return RequestLimits(
        vocabulary=whole(report, "vocabulary", 1),
        context_tokens=context if bounded else None,
        kv_tokens=whole(info, "max_total_num_tokens", 1) if bounded and decodes else None,
        reserved_tokens=whole(info, "num_reserved_decode_tokens", 0) or 0,
        page_tokens=whole(info, "page_size", 1) or 1,
    )


def kairos_reports(info: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Kairos' own entry of each rank, from ``/server_info``."""
    states = info.get("internal_states")
    for state in states if isinstance(states, list) else ():
        report = state.get("kairos") if isinstance(state, Mapping) else None
        if isinstance(report, Mapping):
            yield report


def prefill_law(report: Mapping[str, Any]) -> PrefillLatency | None:
    """How fast it prefills, or None unless that makes sense."""
    return _law(report.get("prefill"), PrefillLatency.from_json)


def decode_law(report: Mapping[str, Any]) -> DecodeLatency | None:
    """How long its decode steps take, or None unless that makes sense."""
    return _law(report.get("decode"), DecodeLatency.from_json)


def _law(raw: Any, read: Callable[[Mapping[str, Any]], Law]) -> Law | None:
    if not isinstance(raw, Mapping):
        return None
    try:
        law = read(raw)
    except ValueError:
        return None
    return law if law.a_s + law.b_s > 0.0 else None


def roles(info: Mapping[str, Any]) -> frozenset[str]:
    """The roles a server says it has now: prefill, decode, null (neither); empty if it tells none.

    Its ranks' own word counts (``internal_states``): a role switched while it runs shows there,
    beside it stands what the server was started with.
    """
    states = info.get("internal_states")
    rows = [row for row in states if isinstance(row, Mapping)] if isinstance(states, list) else []
    said = [row.get("disaggregation_mode") for row in rows]
    found = frozenset(mode for mode in said if mode in _MODES)
    mode = info.get("disaggregation_mode")
    return found or frozenset([mode] if mode in _MODES else [])


def misplaced(role: str, said: frozenset[str]) -> str | None:
    """Why a server that says that cannot be used as `role`; None if it can, or does not say."""
    if said <= {role}:
        return None
    if len(said) > 1:
        return f"its ranks say {' and '.join(sorted(said))}, all must be {role} (a role switch?)"
    (only,) = said
    if only == "null":
        return f"it says it is a unified server; start it with --disaggregation-mode {role}"
    return (
        f"it says it is a {only} server, and is listed as {role}: exchange --prefill and --decode"
    )


def settled(report: Mapping[str, Any], key: str) -> bool:
    """Whether the predictor whose error is under `key` has seen enough steps to be believed.

    A report that does not say is believed.
    """
    error = report.get(key)
    if not isinstance(error, Mapping):
        return True
    samples = number(error, "samples", 0, 1e15)
    return samples is None or samples >= ENOUGH_SAMPLES


def number(raw: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
    """``raw[key]`` if it is a number in range."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high else None
