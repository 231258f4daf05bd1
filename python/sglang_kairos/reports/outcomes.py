"""Checked fields, outcomes and runs, for all readers of load generators' files.

TTFT runs from the sending of a request to its first token. TPOT is (last token - first token) /
(tokens - 1). Other definitions of a tool are converted to these. A request has missed both targets
if it failed, or if the server ended it before it had all of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sglang_kairos.loads.replay import OK, Outcome, Result

ABORTED = "aborted"
NO_TOKEN = "no token, though it was answered with 200: the server ended it early"
_SHORT = "{} of {} tokens, though it was answered with 200: the server ended it early"


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets by which requests are judged, in ms, unless their file says; None: no target.

    `short_answers`: whether an answer shorter than asked for counts as cut off.
        failed   always
        ok       never
        auto     if the file says that requests ignored end-of-sequence tokens
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    short_answers: Literal["auto", "failed", "ok"] = "auto"

    def owed(self, asked: float | None, ignores_eos: bool) -> int:
        """Returns the least tokens of a whole answer, of `asked` ones; 0: any number will do."""
        counts = self.short_answers == "failed" or (self.short_answers == "auto" and ignores_eos)
        return int(asked) if counts and asked is not None else 0

    def of(self, ttft_ms: float | None, tpot_ms: float | None) -> tuple[float, float]:
        """Returns TTFT and TPOT targets in ms: these, else the file's, else none (infinite)."""
        ttft = ttft_ms if self.ttft_ms is None else self.ttft_ms
        tpot = tpot_ms if self.tpot_ms is None else self.tpot_ms
        return math.inf if ttft is None else ttft, math.inf if tpot is None else tpot


@dataclass(frozen=True, slots=True)
class Entry:
    """A JSON object and its place in the file, so that errors can name it."""

    where: str
    data: Mapping[str, Any]

    def get(self, path: str) -> Any:
        """Returns the value at ``a.b.c``; None where any of it is missing."""
        found: Any = self.data
        for name in path.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def number(self, path: str, factor: float = 1.0) -> float | None:
        """Returns a number from 0 on, times `factor`; None where there is none. ValueError names it."""
        value = checked(self.get(path), f"{self.where}.{path}")
        return None if value is None else value * factor

    def needed(self, path: str, factor: float = 1.0) -> float:
        """Returns a number that must be there. Raises ValueError, which names it."""
        value = self.number(path, factor)
        if value is None:
            raise ValueError(f"{self.where} has no {path}")
        return value

    def list(self, path: str) -> list[Any]:
        """Returns a list, empty where there is none. Raises ValueError, which names it."""
        value = self.get(path)
        if not isinstance(value, list | None):
            raise ValueError(f"{self.where}.{path} must be a list, got {value!r:.40}")
        return value or []


def entries(items: Any, where: str) -> list[Entry]:
    """Returns the objects of a list at `where`. ValueError names an item that is no object."""
    if not isinstance(items, list | None):
        raise ValueError(f"{where} must be a list, got {items!r:.40}")
    for index, item in enumerate(items or []):
        if not isinstance(item, Mapping):
            raise ValueError(f"{where}[{index}] must be an object, got {item!r:.40}")
    return [Entry(f"{where}[{index}]", item) for index, item in enumerate(items or [])]


def checked(value: Any, name: str) -> float | None:
    """Returns a number from 0 on; None where the tool had nothing to write. ValueError names it."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number from 0 on, got {value!r:.40}")
    return float(value)


def outcome_of(
    index: int,
    *,
    sent_s: float,
    ttft_s: float | None,
    tpot_s: float | None,
    input_tokens: float | None,
    output_tokens: float | None,
    targets: tuple[float, float],
    error: str = "",
    cut_off: str = "",
    owed: int = 0,
    ended_s: float | None = None,
) -> Outcome:
    """Returns the outcome of one request. `ttft_s`, `tpot_s`: None without a first, a second token.

    `error`: why the tool says that it failed. `cut_off`: what the server said when it ended the
    answer inside a 200, whatever the tool made of it. `owed`: least tokens of a whole answer.
    """
    tokens = _count(output_tokens)
    first = sent_s + ttft_s if ttft_s is not None and 0.0 < ttft_s < math.inf else 0.0
    if not error and not cut_off:
        if not tokens or not first:
            cut_off = NO_TOKEN
        elif tokens < owed:
            cut_off = _SHORT.format(tokens, owed)
    last = first + (tpot_s or 0.0) * max(0, tokens - 1) if first else 0.0
    answered = not error and not cut_off
    return Outcome(
        index,
        planned_s=sent_s,
        sent_s=sent_s,
        input_tokens=_count(input_tokens),
        asked_tokens=owed or tokens,
        ttft_slo_ms=targets[0],
        tpot_slo_ms=targets[1],
        status="error" if error else (ABORTED if cut_off else OK),
        error=error or cut_off,
        first_token_s=first if answered else 0.0,
        last_token_s=last if answered else 0.0,
        ended_s=max(last, sent_s if ended_s is None else ended_s),
        output_tokens=tokens if answered else 0,
        itls_ms=[1e3 * tpot_s] * (tokens - 1) if answered and tpot_s is not None else [],
    )


def _count(value: float | None) -> int:
    """Returns a number of tokens; 0 where the number makes no sense."""
    return int(value) if value is not None and 0 <= value < math.inf else 0


def is_short(outcome: Outcome) -> bool:
    """Returns whether only its length tells that the answer was cut off."""
    return outcome.status == ABORTED and outcome.error.endswith(_SHORT.rpartition("}")[2])


def run_of(outcomes: list[Outcome]) -> Result:
    """Returns a run whose times start at the first sending."""
    known = [outcome.sent_s for outcome in outcomes if math.isfinite(outcome.sent_s)]
    zero = min(known, default=0.0)
    for outcome in outcomes:
        if not math.isfinite(outcome.sent_s):
            # A failure of unknown time counts as failed, and shifts no other time.
            outcome.planned_s = outcome.sent_s = outcome.ended_s = zero
        outcome.planned_s -= zero
        outcome.sent_s -= zero
        outcome.ended_s -= zero
        if outcome.first_token_s:
            outcome.first_token_s -= zero
            outcome.last_token_s -= zero
    return Result(outcomes, max(1e-9, max(outcome.ended_s for outcome in outcomes)))
