"""Reads GuideLLM's JSON output."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.reports.outcomes import Entry, Targets, entries, outcome_of, run_of

_KINDS = {"successful": "", "errored": "errored", "incomplete": "cut off"}


def read_guidellm(documents: Sequence[Any], targets: Targets) -> list[Result]:
    """Returns one run for each benchmark. Targets are those of the bodies sent, where the file has them.

    GuideLLM's "TPOT" includes the first token; its inter-token latency is what TPOT is here.
    """
    runs = []
    for benchmark in entries(documents[0]["benchmarks"], "benchmarks"):
        outcomes: list[Outcome] = []
        for kind, error in _KINDS.items():
            where = f"{benchmark.where}.requests.{kind}"
            for one in entries(benchmark.get(f"requests.{kind}"), where):
                start = one.number("request_start_time")
                if start or kind != "incomplete":  # Else the run ended before it was sent.
                    outcomes.append(_outcome(one, len(outcomes), start, error, targets))
        if outcomes:
            runs.append(run_of(outcomes))
    if not runs:
        raise ValueError("GuideLLM's file holds no requests")
    return runs


def _outcome(one: Entry, index: int, start: float | None, error: str, targets: Targets) -> Outcome:
    body = _body(one)
    if error and isinstance(said := one.get("info.error"), str):
        error = said[:200]
    asked = body.number("max_completion_tokens")
    return outcome_of(
        index,
        sent_s=start or math.nan,
        ttft_s=one.number("time_to_first_token_ms", 1e-3),
        tpot_s=one.number("inter_token_latency_ms", 1e-3),
        input_tokens=one.number("prompt_tokens"),
        output_tokens=one.number("output_tokens"),
        targets=targets.of(body.number("ttft_ms"), body.number("tpot_ms")),
        error=error,
        owed=targets.owed(
            body.number("max_tokens") if asked is None else asked, bool(body.get("ignore_eos"))
        ),
        ended_s=one.number("request_end_time"),
    )


def _body(one: Entry) -> Entry:
    """Returns the body that was sent; empty where it was not kept (for failed requests it never is)."""
    arguments = one.get("request_args")
    try:
        sent = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        sent = None
    body = Entry("", {"request_args": sent}).get("request_args.body")
    return Entry(f"{one.where}.request_args.body", body if isinstance(body, dict) else {})
