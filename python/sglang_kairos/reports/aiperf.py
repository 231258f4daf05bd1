"""Reads aiperf's profile_export.jsonl, and its settings in the summary beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.reports.outcomes import Entry, Targets, entries, outcome_of, run_of

# aiperf tokenises an answer again, so its count of tokens may be somewhat off.
_SURELY_SHORT = 0.9


def read_aiperf(documents: Sequence[Any], targets: Targets, path: Path) -> list[Result]:
    """Returns one run.

    aiperf counts an answer that the server ended after its first token as done. The settings tell
    whether answers had to have the length asked for. They hold the targets as well, of
    ``--goodput`` or of the bodies (``--extra-inputs``). Raises ValueError.
    """
    settings = _settings(path)
    limits = targets.of(
        _first(settings, "slos.time_to_first_token", "endpoint.extra.ttft_ms"),
        _first(settings, "slos.inter_token_latency", "endpoint.extra.tpot_ms"),
    )
    ignores_eos = _ignores_eos(settings)
    records = [
        one
        for one in entries(list(documents), "record")
        if one.get("metadata.benchmark_phase") != "warmup"
    ]
    if not records:
        raise ValueError("aiperf's file holds no requests but those of its warm-up")
    return [
        run_of(
            [
                _outcome(one, index, limits, targets, ignores_eos)
                for index, one in enumerate(records)
            ]
        )
    ]


def blind_aiperf(document: Any, path: Path) -> str:
    """Returns what the file does not tell; empty where its settings tell it."""
    if _ignores_eos(_settings(path)):
        return ""
    return (
        "answers ended early after their first token look like answers that ended by themselves; "
        "run aiperf with --extra-inputs ignore_eos:true and leave its files side by side, or say "
        "--short-answers failed"
    )


def _ignores_eos(settings: Entry) -> bool:
    return settings.get("endpoint.extra.ignore_eos") is True


def _outcome(
    one: Entry, index: int, limits: tuple[float, float], targets: Targets, ignores_eos: bool
) -> Outcome:
    error = str(one.get("error"))[:200] if one.get("error") else ""
    if not error and one.get("metadata.was_cancelled"):
        error = "cancelled"
    counted, told = _value(one, "output_sequence_length"), _value(one, "usage_completion_tokens")
    if not error and counted and _value(one, "time_to_first_token") is None:
        raise ValueError(
            f"{one.where} has no metrics.time_to_first_token: run aiperf with --streaming"
        )
    tokens = counted if told is None else told
    asked = _asked(one, counted)
    if asked is not None and told is None:
        asked *= _SURELY_SHORT
    return outcome_of(
        index,
        sent_s=one.needed("metadata.request_start_ns", 1e-9),
        ttft_s=_value(one, "time_to_first_token", 1e-3),
        tpot_s=_tpot_s(one, told),
        input_tokens=_value(one, "input_sequence_length"),
        output_tokens=tokens,
        targets=limits,
        error=error,
        owed=targets.owed(asked, ignores_eos),
        ended_s=one.number("metadata.request_end_ns", 1e-9),
    )


def _tpot_s(one: Entry, told: float | None) -> float | None:
    """Seconds per token after the first, by the server's count of tokens where it told it."""
    decoding = _value(one, "decode_duration", 1e-3)
    if told is None or decoding is None:
        return _value(one, "inter_token_latency", 1e-3)
    return decoding / (told - 1.0) if told > 1.0 else None


def _asked(one: Entry, counted: float | None) -> float | None:
    """Returns the tokens that the request asked for: aiperf writes by how much its own count is off."""
    off = one.get("metrics.osl_mismatch_diff_pct.value")
    if counted is None or isinstance(off, bool) or not isinstance(off, int | float) or off <= -100:
        return None
    return float(round(counted / (1.0 + off / 100.0)))


def _value(one: Entry, metric: str, factor: float = 1.0) -> float | None:
    return one.number(f"metrics.{metric}.value", factor)


def _first(settings: Entry, *paths: str) -> float | None:
    return next((n for path in paths if (n := settings.number(path)) is not None), None)


def _settings(path: Path) -> Entry:
    """Returns ``input_config`` of the summary that aiperf writes beside its records, or empty."""
    for name in (f"{path.stem}_aiperf.json", f"{path.stem}.json"):
        beside = path.with_name(name)
        if beside != path and beside.is_file():
            try:
                found = json.loads(beside.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{beside} beside it is not JSON: {error}") from None
            settings = found.get("input_config") if isinstance(found, dict) else None
            return Entry(f"{name}: input_config", settings if isinstance(settings, dict) else {})
    return Entry("", {})
