"""Reads inference-perf's per_request_lifecycle_metrics.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.reports.outcomes import Entry, Targets, checked, entries, outcome_of, run_of

_TIMES = "info.response_metrics.output_token_times"


def read_inference_perf(documents: Sequence[Any], targets: Targets) -> list[Result]:
    """Returns one run. It holds targets if made with ``per_request_fields.computed_metrics``.

    inference-perf leaves failed requests out of its own goodput, and counts those that the server
    ended early as done. Here both have missed.
    """
    records = entries(list(documents), "request")
    return [run_of([_outcome(one, index, targets) for index, one in enumerate(records)])]


def blind_inference_perf(document: Any, path: Path) -> str:
    """Returns what the file does not tell; empty where it tells all."""
    if document.get("response") is not None or document.get("request") is not None:
        return ""
    return (
        "answers ended early after their first token look whole in this file; run it with "
        "per_request_fields.response: true"
    )


def _outcome(one: Entry, index: int, targets: Targets) -> Outcome:
    error = str(one.get("error"))[:200] if one.get("error") else ""
    if not error and one.get("info.response_metrics") and one.get(_TIMES) is None:
        raise ValueError(f"{one.where} has no {_TIMES}: run it with api.streaming: true")
    times = [checked(at, f"{one.where}.{_TIMES}") or 0.0 for at in one.list(_TIMES)]
    sent = one.needed("start_time")
    told = one.number("info.response_metrics.server_usage.completion_tokens")
    tokens = float(len(times)) if told is None else told
    return outcome_of(
        index,
        sent_s=sent,
        ttft_s=times[0] - sent if times else None,
        tpot_s=(times[-1] - times[0]) / (tokens - 1.0) if times and tokens > 1.0 else None,
        input_tokens=one.number("info.input_tokens"),
        output_tokens=tokens if times else 0.0,
        targets=targets.of(_target_ms(one, "ttft_slo_sec"), _target_ms(one, "tpot_slo_sec")),
        error=error,
        cut_off=_cut_off(one.get("response")),
        owed=_owed(one, targets),
        ended_s=one.number("end_time"),
    )


def _target_ms(one: Entry, name: str) -> float | None:
    return one.number(f"computed_metrics.{name}", 1e3)


def _cut_off(response: Any) -> str:
    """Returns what the server said in the stream when it ended the answer early; empty: nothing."""
    for line in response.splitlines() if isinstance(response, str) else ():
        if not line.startswith("data:") or ('"error"' not in line and '"abort"' not in line):
            continue
        try:
            event = Entry("", json.loads(line.removeprefix("data:")))
        except ValueError:
            continue
        if said := event.get("error"):
            return str(said)[:200]
        choices = event.get("choices")
        if isinstance(choices, list) and any(
            isinstance(one, dict) and one.get("finish_reason") == "abort" for one in choices
        ):
            return "aborted"
    return ""


def _owed(one: Entry, targets: Targets) -> int:
    try:
        body = Entry(f"{one.where}.request", json.loads(one.get("request") or "{}"))
    except (TypeError, ValueError):
        return 0
    asked = body.number("max_completion_tokens")
    asked = body.number("max_tokens") if asked is None else asked
    return targets.owed(asked, body.get("ignore_eos") is True)
