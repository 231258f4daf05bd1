"""Counts on the server whether requests met their SLO. Plain data, no clock; times in seconds.

The definitions are those of `loads.replay` and of SGLang's ``benchmark/goodput.py``. TTFT runs from
a request's arrival to its first token. TPOT is (last token - first token) / (tokens - 1), and 0 for
one token. A request that met both counts under ``both``.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_kairos.names import with_old_keys
from sglang_kairos.slo.targets import Slo

TTFT, TPOT, BOTH = "ttft", "tpot", "both"
OTHER = "other"

# Upper edges of histograms, seconds.
TTFT_EDGES_S = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 13, 21, 34, 60, 120,
)  # fmt: skip
TPOT_EDGES_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2)

# What became of a request. Every one is counted under one of these, once.
SERVED = "served"
RETRACTED = "served_after_retraction"  # it lost its KV on the way, and got it back
AGAIN = "prefilled_again"  # a prefill that decode asked for a second time: no request of its own
ABORTED = "aborted"  # its client left, or somebody called /abort_request
REFUSED = "refused"  # a 4xx of the scheduler
FAILED = "failed"
OUTCOMES = (SERVED, RETRACTED, AGAIN, ABORTED, REFUSED, FAILED)


def class_label(name: str, classes: Container[str]) -> str:
    """Returns the class to count a request under; all names not configured are one class."""
    return name if name == "default" or name in classes else OTHER


def tpot_of(first_s: float, last_s: float, tokens: int) -> float:
    """Returns the seconds per output token after the first; 0 for a single token."""
    return (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which targets a served request met, and by how much it missed the others.

    `late_s`: how late its first token came, and its last one counted from the first. `tpot_s` is
    None where only the prefill is known.
    """

    slo_class: str
    ttft_s: float
    tpot_s: float | None
    met: dict[str, bool]
    late_s: dict[str, float]
    silent_s: float = 0.0


def judge(
    slo: Slo, slo_class: str, ttft_s: float, tpot_s: float | None, tokens: int, silent_s: float
) -> Verdict:
    """Returns the verdict on a request of `tokens` output tokens.

    `silent_s` is its longest silence.
    """
    met = {TTFT: 1e3 * ttft_s <= slo.ttft_ms}
    late_s = {} if met[TTFT] else {TTFT: ttft_s - slo.ttft_ms / 1e3}
    if tpot_s is not None:
        met[TPOT] = 1e3 * tpot_s <= slo.tpot_ms
        met[BOTH] = met[TTFT] and met[TPOT]
        if not met[TPOT]:
            late_s[TPOT] = (tpot_s - slo.tpot_ms / 1e3) * (tokens - 1)
    return Verdict(slo_class, ttft_s, tpot_s, met, late_s, silent_s)


@dataclass(slots=True)
class Spread:
    """A count, the sum and the maximum of durations in seconds."""

    count: int = 0
    sum_s: float = 0.0
    max_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.count, self.sum_s = self.count + 1, self.sum_s + seconds
        self.max_s = max(self.max_s, seconds)

    def report(self) -> dict[str, float]:
        return {"count": self.count, "sum_s": self.sum_s, "max_s": self.max_s}


@dataclass(slots=True)
class ClassTally:
    """The requests of one SLO class."""

    met: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    ttft: Spread = field(default_factory=Spread)
    tpot: Spread = field(default_factory=Spread)
    late: dict[str, Spread] = field(default_factory=dict)
    silent: Spread = field(default_factory=Spread)


class Attainment:
    """Counts of one server. `classes` are its SLO classes; all other names count as one."""

    def __init__(self, classes: Iterable[str]) -> None:
        self._known = frozenset(classes)
        self.outcomes: Counter[str] = Counter()
        self.classes: dict[str, ClassTally] = {}

    def label(self, name: str) -> str:
        """Returns the class to count under; see `class_label`."""
        return class_label(name, self._known)

    def ended(self, outcome: str, verdict: Verdict | None = None) -> None:
        """Counts a request that is over; `verdict` if it was served, for the first time here."""
        self.outcomes[outcome] += 1
        if verdict is None:
            return
        tally = self.classes.setdefault(verdict.slo_class, ClassTally())
        for target, met in verdict.met.items():
            (tally.met if met else tally.missed)[target] += 1
        tally.ttft.add(verdict.ttft_s)
        if verdict.tpot_s is not None:
            tally.tpot.add(verdict.tpot_s)
            tally.silent.add(verdict.silent_s)
        for target, late_s in verdict.late_s.items():
            tally.late.setdefault(target, Spread()).add(late_s)

    @property
    def longest_silence_s(self) -> float:
        return max((tally.silent.max_s for tally in self.classes.values()), default=0.0)

    def report(self) -> dict[str, Any]:
        """Returns plain data for /server_info."""
        report = {
            "requests": dict(self.outcomes),
            "max_itl_s": self.longest_silence_s,
            "classes": {
                name: {
                    "met": dict(tally.met),
                    "missed": dict(tally.missed),
                    "ttft": tally.ttft.report(),
                    "tpot": tally.tpot.report(),
                    "late": {target: late.report() for target, late in tally.late.items()},
                }
                for name, tally in self.classes.items()
            },
        }
        return with_old_keys("server_info", report)


class Recent:
    """Remembers the latest `most` keys."""

    def __init__(self, most: int = 4096) -> None:
        self._most, self._keys = most, dict[Hashable, None]()

    def seen(self, key: Hashable) -> bool:
        """Returns whether `key` is remembered, and remembers it."""
        known = key in self._keys
        self._keys[key] = None
        if len(self._keys) > self._most:
            del self._keys[next(iter(self._keys))]
        return known


class Stream(Protocol):
    """When a request got tokens. `silent_s`: its longest wait for one after its first, seconds."""

    first_token_s: float | None
    last_token_s: float | None
    silent_s: float


MANY_STEPS = 64


class Silences:
    """The longest wait of each request for its next token, without touching it at every token.

    While the same requests get a token step after step, only the lengths of steps are kept. Of
    those, only the ones that no later step exceeds.
    """

    def __init__(self) -> None:
        self._talking: set[Stream] = set()
        self._last_s = 0.0
        # Steps that were longer than all after them: when they ended, how long they took.
        self._ends: list[float] = []
        self._took: list[float] = []

    def step(self, now_s: float, streams: Sequence[Stream] | None = None) -> None:
        """Records a step that gave each of `streams` a token.

        None means those of the step before.
        """
        if streams is None:
            self._add(now_s)
            return
        talking = set(streams)
        for stream in self._talking - talking:
            self.settle(stream)
        self._add(now_s)
        for stream in talking - self._talking:
            if stream.first_token_s is None:
                stream.first_token_s = now_s
            if stream.last_token_s is not None:
                stream.silent_s = max(stream.silent_s, now_s - stream.last_token_s)
            stream.last_token_s = now_s
        self._talking = talking
        if len(self._ends) > MANY_STEPS:
            joined = [one.last_token_s for one in talking if one.last_token_s is not None]
            self._forget(min(joined, default=now_s))

    def settle(self, stream: Stream) -> None:
        """Brings a request's times up to date; it got a token at the last step."""
        if stream.last_token_s is not None:
            since = bisect.bisect_right(self._ends, stream.last_token_s)
            if since < len(self._took):
                stream.silent_s = max(stream.silent_s, self._took[since])
        stream.last_token_s = self._last_s

    def _add(self, now_s: float) -> None:
        took = now_s - self._last_s
        while self._took and self._took[-1] <= took:
            self._took.pop()
            self._ends.pop()
        self._took.append(took)
        self._ends.append(now_s)
        self._last_s = now_s

    def _forget(self, before_s: float) -> None:
        """Forgets steps from before any living stream began."""
        old = bisect.bisect_right(self._ends, before_s)
        del self._ends[:old], self._took[:old]
