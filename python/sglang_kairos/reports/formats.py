"""Reads other load generators' results: each is one `ResultFormat` in `FORMATS`.

`outcomes` says how a request is judged. `Reading.notes` names what a tool itself counts
differently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.reports.aiperf import blind_aiperf, read_aiperf
from sglang_kairos.reports.bench_serving import blind_bench, read_bench
from sglang_kairos.reports.guidellm import read_guidellm
from sglang_kairos.reports.inference_perf import blind_inference_perf, read_inference_perf
from sglang_kairos.reports.outcomes import ABORTED, Targets, is_short


@dataclass(frozen=True, slots=True)
class ResultFormat:
    """The file format of one load generator.

    `matches` tells whether a file's first document is of this format. `read` returns its runs, or
    raises ValueError. `tpot`: the tool's definition of TPOT, where it differs from ours.
    `one_token_misses`: the targets that it counts an answer of one token to have missed. `blind`
    returns what a file does not tell.
    """

    name: str
    matches: Callable[[Any], bool]
    read: Callable[[Sequence[Any], Targets, Path], list[Result]]
    tpot: str = ""
    one_token_misses: tuple[str, ...] = ()
    blind: Callable[[Any, Path], str] = lambda document, path: ""


@dataclass(frozen=True, slots=True)
class Reading:
    """The runs of a file, and notes on how its tool counts."""

    results: list[Result]
    notes: list[str]


def read_results(path: Path, targets: Targets, *, one_token_as_tool: bool = True) -> Reading:
    """Returns the runs of a file of any tool in `FORMATS`. ValueError says what it is instead.

    An answer of one token counts as its tool counts it, or else as having met its TPOT.
    """
    documents = _documents(path)
    first = documents[0]
    chosen = next((each for each in FORMATS if each.matches(first)), None)
    if chosen is None:
        raise ValueError(_unknown(first))
    results = chosen.read(documents, targets, path)
    outcomes = [outcome for result in results for outcome in result.outcomes]
    if one_token_as_tool and chosen.one_token_misses:
        for outcome in outcomes:
            if outcome.ok and outcome.output_tokens == 1:
                outcome.missed_by_tool = list(chosen.one_token_misses)
    notes = [*_notes(chosen, outcomes), chosen.blind(first, path)]
    return Reading(results, [note for note in notes if note])


def _notes(tool: ResultFormat, outcomes: Sequence[Outcome]) -> Iterator[str]:
    if tool.tpot:
        yield f"TPOT of {tool.name} is {tool.tpot}"
    ended = [outcome for outcome in outcomes if outcome.status == ABORTED]
    if ended:
        yield (
            f"{len(ended)} of {len(outcomes)} answers were ended early inside a 200 (e.g. "
            f"{ended[0].error!r:.80}): {tool.name} counts them as done, here they have failed"
        )
    if any(is_short(outcome) for outcome in ended):
        yield (
            "some of these by their length alone, which is shorter than asked for: if they may end "
            "by themselves, say --short-answers ok"
        )
    single = sum(outcome.ok and outcome.output_tokens == 1 for outcome in outcomes)
    if single and (names := _missed(outcomes)):
        yield (
            f"answers of one token ({single}) count as missed ({names}), as {tool.name} counts them; "
            "with --one-token met they do not"
        )
    elif single:
        yield f"answers of one token ({single}) have no TPOT, which counts as met"


def _missed(outcomes: Sequence[Outcome]) -> str:
    """Returns the targets that answers of one token are counted to have missed, where they had any."""
    names = (
        name
        for outcome in outcomes
        for name in outcome.missed_by_tool
        if math.isfinite(getattr(outcome, f"{name}_slo_ms"))
    )
    return " and ".join(sorted({name.upper() for name in names}, reverse=True))


# Files that lie beside the right one, recognised by a field that only they have.
_NEIGHBOURS = {
    "load_summary": "inference-perf's summary: give per_request_lifecycle_metrics.json",
    "input_config": "aiperf's summary: give profile_export.jsonl",
}


def _unknown(document: Mapping[str, Any]) -> str:
    hints = [f" ({text})" for name, text in _NEIGHBOURS.items() if name in document]
    return (
        f"no results of a known tool ({', '.join(known_tools())}); its fields: "
        f"{', '.join(sorted(document)[:8]) or 'none'}{''.join(hints[:1])}"
    )


def known_tools() -> list[str]:
    """Returns the names of the tools whose files are read."""
    return list(dict.fromkeys(each.name for each in FORMATS))


def _documents(path: Path) -> list[Any]:
    """Returns the JSON of a file: one document, or one a line. A list at the top is its entries."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError("it is empty")
    if text.lstrip()[0] not in "{[":
        raise ValueError(f"line 1: not JSON (a CSV?): it starts with {text.lstrip()[:30]!r}")
    try:
        whole = json.loads(text)
    except ValueError:
        whole = list(_per_line(text))
    documents = whole if isinstance(whole, list) else [whole]
    if not documents or not all(isinstance(one, dict) for one in documents):
        raise ValueError("must hold JSON objects, one a line, or one document with results")
    return documents


def _per_line(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: not JSON: {error}") from None


def _has(*sets: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda document: any(all(name in document for name in names) for names in sets)


FORMATS = (
    ResultFormat(
        "sglang.benchmark.serving",
        _has(("backend", "request_throughput"), ("itls",), ("request_throughput", "duration")),
        lambda documents, targets, _: read_bench(documents, targets),
        tpot="(end of the stream, after the last token - first token) / (tokens - 1)",
        blind=blind_bench,
    ),
    ResultFormat(
        "GuideLLM",
        _has(("benchmarks",)),
        lambda documents, targets, _: read_guidellm(documents, targets),
        tpot="the time of the whole answer / all of its tokens, the first included; here it is "
        "what it calls inter-token latency",
    ),
    ResultFormat(
        "aiperf",
        _has(("metadata", "metrics")),
        read_aiperf,
        tpot="its inter-token latency, by its own count of the answer's tokens; here by the "
        "server's count",
        one_token_misses=("tpot",),
        blind=blind_aiperf,
    ),
    ResultFormat(
        "inference-perf",
        _has(("start_time", "end_time", "info")),
        lambda documents, targets, _: read_inference_perf(documents, targets),
        tpot="by its own count of the answer's tokens; here by the server's count",
        one_token_misses=("ttft", "tpot"),
        blind=blind_inference_perf,
    ),
)
