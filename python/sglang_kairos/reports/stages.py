"""Splits each request's TTFT by what it waited for.

    sent → (in) → on a server → (bootstrap and pre-allocation) → waiting → (queue) → first chunk
         → (compute, paused) → last chunk done → (transfer) → KV on decode
         → (decode admission) → running → (out) → first token

The outer two stamps are the client's. The inner ones are SGLang's own request time stats of the
prefill and the decode server, as `benchmark.harness.stamp_recorder` writes them. All are seconds of
one clock: ``time.perf_counter`` is one among the processes of a Linux machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sglang_kairos.loads.replay import Outcome

STAGES = (
    "router and network, in",
    "bootstrap and pre-allocation",
    "queue",
    "compute",
    "paused",
    "transfer",
    "decode admission",
    "router and network, out",
)
_COMPUTE = STAGES.index("compute")
TTFT = "TTFT"


class StageError(ValueError):
    """A record cannot be read, or there is nothing to sum up; the text says which."""


@dataclass(frozen=True)
class PrefillStamps:
    """One request on its prefill server. Times are in seconds; 0: it never happened.

    `received_s`: it entered the bootstrap queue.
    `queued_s`: decode has reserved its KV, and it entered the waiting queue.
    `started_s`: its first chunk was launched. `computed_s`: its last chunk's result was there.
    `paused_s`: seconds in between in which Kairos paused it.
    """

    received_s: float
    queued_s: float
    started_s: float
    computed_s: float
    paused_s: float = 0.0


@dataclass(frozen=True)
class DecodeStamps:
    """One request on its decode server. Times are in seconds; 0: it never happened.

    `received_s`: it entered the pre-allocation queue. `arrived_s`: its KV was found complete.
    `admitted_s`: it was in the running batch, and its first token went out. A retraction overwrites
    the last two, so `retractions` counts them.
    """

    received_s: float
    arrived_s: float
    admitted_s: float
    retractions: int = 0


@dataclass(frozen=True)
class Records:
    """The stamps that the servers noted, by request id."""

    prefill: Mapping[str, PrefillStamps]
    decode: Mapping[str, DecodeStamps]


@dataclass(frozen=True)
class Split:
    """One request: milliseconds per stage, in the order of `STAGES`. They add up to its TTFT.

    `moved_ms`: how far a stamp had to be moved to lie in order between its neighbours. More than a
    fraction of a millisecond means that the clocks differ.
    """

    stages_ms: tuple[float, ...]
    moved_ms: float = 0.0

    @property
    def ttft_ms(self) -> float:
        return sum(self.stages_ms)


@dataclass(frozen=True)
class Joined:
    """The splits of a run, and how many requests have none, by reason."""

    splits: list[Split]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Summary:
    """One stage over the requests of a run, in ms. Only means add up."""

    mean_ms: float
    p50_ms: float
    p99_ms: float


def read_records(lines: Iterable[str]) -> Records:
    """Reads the recorder's JSON lines, of any number of servers. StageError names a bad line.

    An id that a router used for several attempts keeps the last one's stamps.
    """
    prefill: dict[str, PrefillStamps] = {}
    decode: dict[str, DecodeStamps] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            rid, mode = record["rid"], record["mode"]
            if mode == "prefill":
                prefill[rid] = PrefillStamps(**_own(record, PrefillStamps))
            elif mode == "decode":
                decode[rid] = DecodeStamps(**_own(record, DecodeStamps))
            else:
                raise StageError(f"record {number}: mode {mode!r} is neither prefill nor decode")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StageError(f"record {number} cannot be read: {error!r}") from None
    return Records(prefill, decode)


def _own(record: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    return {item.name: record[item.name] for item in fields(kind)}


def split(
    sent_s: float, first_token_s: float, prefill: PrefillStamps, decode: DecodeStamps
) -> Split:
    """Returns the stages of one answered request. Stamps out of order move to their neighbours."""
    # Both servers get the request at once. Which finds it first depends on the step in progress.
    stamps = (
        min(prefill.received_s, decode.received_s),
        prefill.queued_s,
        prefill.started_s,
        prefill.computed_s,
        decode.arrived_s,
        decode.admitted_s,
    )
    edges = [sent_s]
    for stamp in stamps:
        edges.append(min(max(stamp, edges[-1]), first_token_s))
    moved_s = max(abs(edge - stamp) for edge, stamp in zip(edges[1:], stamps, strict=True))
    edges.append(first_token_s)
    spans_ms = [float(span) for span in np.diff(edges) * 1e3]
    paused_ms = min(max(0.0, prefill.paused_s * 1e3), spans_ms[_COMPUTE])
    spans_ms[_COMPUTE : _COMPUTE + 1] = [spans_ms[_COMPUTE] - paused_ms, paused_ms]
    return Split(tuple(spans_ms), moved_s * 1e3)


def join(outcomes: Iterable[Outcome], started_s: float, records: Records) -> Joined:
    """Joins the client's and the servers' views of a run by request id.

    `started_s`: when the run began, in seconds of the servers' clock; outcomes count from there.
    """
    splits: list[Split] = []
    left_out: Counter[str] = Counter()
    for outcome in outcomes:
        prefill = records.prefill.get(outcome.rid)
        decode = records.decode.get(outcome.rid)
        if not outcome.output_tokens:
            left_out["no first token"] += 1
        elif prefill is None or decode is None:
            left_out["no record"] += 1
        elif decode.retractions:
            left_out["retracted"] += 1
        elif not all((prefill.queued_s, prefill.started_s, prefill.computed_s, decode.arrived_s)):
            left_out["incomplete record"] += 1
        else:
            sent_s, first_s = started_s + outcome.sent_s, started_s + outcome.first_token_s
            splits.append(split(sent_s, first_s, prefill, decode))
    return Joined(splits, dict(left_out))


def summarise(splits: Sequence[Split]) -> dict[str, Summary]:
    """Returns every stage in order, then TTFT itself. Raises StageError without a split."""
    if not splits:
        raise StageError("no request has both a first token and the servers' records")
    values = np.array([one.stages_ms for one in splits])
    columns = {name: values[:, at] for at, name in enumerate(STAGES)} | {TTFT: values.sum(axis=1)}
    return {
        name: Summary(
            float(column.mean()), *(float(q) for q in np.percentile(column, [50.0, 99.0]))
        )
        for name, column in columns.items()
    }


def table(by_policy: Mapping[str, Sequence[Split]]) -> str:
    """Returns a Markdown table: stages down; mean, p50 and p99 of each policy across, in ms."""
    summaries = {policy: summarise(splits) for policy, splits in by_policy.items()}
    heads = [f"{policy}: mean | p50 | p99" for policy in summaries]
    lines = [
        "| ms | " + " | ".join(heads) + " |",
        "|---|" + "--:|--:|--:|" * len(summaries),
    ]
    for name in (*STAGES, TTFT):
        found = (summary[name] for summary in summaries.values())
        cells = [f"{s.mean_ms:.1f} | {s.p50_ms:.1f} | {s.p99_ms:.1f}" for s in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
