"""Other load generators' results as ours: one `ResultFormat` in `FORMATS` for each.

TTFT runs from the sending of a request to its first token, TPOT is (last token - first token) /
(tokens - 1); what a tool calls otherwise is turned into that. A request that failed, or was ended
before its first token, has missed both targets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kairos.tools.replay import OK, Outcome, Result

_ENDED_EARLY = "no token, though it was answered with 200: the server ended it early"


@dataclass(frozen=True, slots=True)
class Targets:
    """What requests are judged by, in ms, unless their file says; None: no target."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


@dataclass(frozen=True, slots=True)
class ResultFormat:
    """`matches` a file's documents (one, or one a line), `read` gives its runs. ValueError."""

    name: str
    matches: Callable[[Any], bool]
    read: Callable[[Sequence[Any], Targets], list[Result]]


def read_results(path: Path, targets: Targets) -> list[Result]:
    """The runs of a file of any tool in `FORMATS`. ValueError says what it is instead."""
    documents = _documents(path)
    first = documents[0]
    chosen = next((each for each in FORMATS if each.matches(first)), None)
    if chosen is None:
        raise ValueError(_unknown(first))
    return chosen.read(documents, targets)


# Files that lie beside the right one, by a field that only they have.
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
    """Names of the tools whose files are read."""
    return list(dict.fromkeys(each.name for each in FORMATS))


def _documents(path: Path) -> list[Any]:
    """The JSON of a file: one document, or one a line. A list at the top is its entries."""
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


def outcome_of(
    index: int,
    *,
    sent_s: float,
    ttft_s: float | None,
    tpot_s: float | None,
    input_tokens: int | None,
    output_tokens: int | None,
    targets: tuple[float, float],
    error: str = "",
    ended_s: float | None = None,
) -> Outcome:
    """One request. `ttft_s`, `tpot_s` None: it had no first token, no second one."""
    tokens = output_tokens or 0
    answered = not error and tokens > 0 and _positive(ttft_s)
    first = sent_s + ttft_s if _positive(ttft_s) and ttft_s is not None else 0.0
    last = first + (tpot_s or 0.0) * max(0, tokens - 1) if first else 0.0
    return Outcome(
        index,
        planned_s=sent_s,
        sent_s=sent_s,
        input_tokens=input_tokens or 0,
        asked_tokens=tokens,
        ttft_slo_ms=targets[0],
        tpot_slo_ms=targets[1],
        status=OK if answered else ("error" if error else "aborted"),
        error=error or ("" if answered else _ENDED_EARLY),
        first_token_s=first if answered else 0.0,
        last_token_s=last if answered else 0.0,
        ended_s=max(last, sent_s if ended_s is None else ended_s),
        output_tokens=tokens if answered else 0,
        itls_ms=[1e3 * tpot_s] * (tokens - 1) if answered and tpot_s is not None else [],
    )


def _checked(value: Any, name: str) -> float | None:
    """A number from 0 on; None where the tool had nothing to write. ValueError names the field."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number from 0 on, got {value!r:.40}")
    return float(value)


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0.0


def _limits(targets: Targets, ttft_ms: Any = None, tpot_ms: Any = None) -> tuple[float, float]:
    """Targets in ms: the command line's, else the file's, else none."""

    def chosen(given: float | None, own: Any) -> float:
        if given is not None:
            return given
        return float(own) if isinstance(own, int | float) else math.inf

    return chosen(targets.ttft_ms, ttft_ms), chosen(targets.tpot_ms, tpot_ms)


def _run(outcomes: list[Outcome]) -> Result:
    """A run whose times start at the first sending."""
    known = [outcome.sent_s for outcome in outcomes if math.isfinite(outcome.sent_s)]
    zero = min(known, default=0.0)
    for outcome in outcomes:
        if not math.isfinite(outcome.sent_s):
            # A failure of unknown time counts, and moves nothing.
            outcome.planned_s = outcome.sent_s = outcome.ended_s = zero
        outcome.planned_s -= zero
        outcome.sent_s -= zero
        outcome.ended_s -= zero
        if outcome.first_token_s:
            outcome.first_token_s -= zero
            outcome.last_token_s -= zero
    return Result(outcomes, max(1e-9, max(outcome.ended_s for outcome in outcomes)))


# --- SGLang's own benchmark


_DETAILS = ("ttfts", "itls", "output_lens", "input_lens", "errors")


def from_bench_record(
    record: Mapping[str, Any], ttft_ms: float | None = None, tpot_ms: float | None = None
) -> Result:
    """A run of ``sglang.benchmark.serving --output-details`` as a `Result`.

    `record` is one line of its output file. Targets default to those of its ``--goodput``. It
    records no sending times: each request starts at 0 here, which no metric but the plots uses. It
    counts a request that the server ended inside a 200 as done, with a TTFT of 0: failed, here.
    """
    missing = [name for name in (*_DETAILS, "duration") if name not in record]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)}: run it with --output-details (SGLang's benchmark wrote this "
            "without)"
        )
    for name in _DETAILS:
        if not isinstance(record[name], list):
            raise ValueError(f"{name} must be a list, got {record[name]!r:.40}")
    _checked(record["duration"], "duration")
    counts = {name: len(record[name]) for name in _DETAILS}
    if len(set(counts.values())) > 1:
        raise ValueError(f"lists of different lengths: {counts}")
    slos = record.get("goodput_slos_ms") or {}
    targets = _limits(Targets(ttft_ms, tpot_ms), slos.get("ttft"), slos.get("tpot"))
    outcomes = []
    for index, (ttft, itls, output, inputs, error) in enumerate(
        zip(*(record[name] for name in _DETAILS), strict=True)
    ):
        if not isinstance(itls, list):
            raise ValueError(f"itls[{index}] must be a list, got {itls!r:.40}")
        for name, value in (("ttfts", ttft), ("output_lens", output), ("input_lens", inputs)):
            # Numbers that make no sense mark a failed request, as `outcome_of` sees it.
            if not isinstance(value, int | float):
                _checked(value, f"{name}[{index}]")
        for itl in itls:
            _checked(itl, f"itls[{index}]")
        outcome = outcome_of(
            index,
            sent_s=0.0,
            ttft_s=ttft,
            tpot_s=0.0,
            input_tokens=inputs,
            output_tokens=output,
            targets=targets,
            error=str(error or ""),
        )
        if outcome.ok:
            outcome.last_token_s = outcome.ended_s = ttft + sum(itls)
            outcome.itls_ms = [1e3 * itl for itl in itls]
        outcomes.append(outcome)
    return Result(outcomes, record["duration"])


def _read_bench(documents: Sequence[Any], targets: Targets) -> list[Result]:
    return [from_bench_record(one, targets.ttft_ms, targets.tpot_ms) for one in documents]


# --- others


def _read_guidellm(documents: Sequence[Any], targets: Targets) -> list[Result]:
    """GuideLLM's JSON output, one run a benchmark. Its "TPOT" has the first token in it; its
    inter-token latency is what TPOT is here."""
    limits, runs = _limits(targets), []
    for benchmark in documents[0]["benchmarks"]:
        requests = benchmark.get("requests") or {}
        outcomes: list[Outcome] = []
        for kind, error in (("successful", ""), ("errored", "errored"), ("incomplete", "cut off")):
            for number, one in enumerate(requests.get(kind) or ()):
                start = _checked(
                    one.get("request_start_time"), f"{kind}[{number}].request_start_time"
                )
                if not start and kind == "incomplete":
                    continue  # The run ended before it was sent.
                outcomes.append(
                    outcome_of(
                        len(outcomes),
                        sent_s=start or math.nan,
                        ttft_s=_scaled(one.get("time_to_first_token_ms"), 1e-3),
                        tpot_s=_scaled(one.get("inter_token_latency_ms"), 1e-3),
                        input_tokens=one.get("prompt_tokens"),
                        output_tokens=one.get("output_tokens"),
                        targets=limits,
                        error=error,
                        ended_s=one.get("request_end_time"),
                    )
                )
        if outcomes:
            runs.append(_run(outcomes))
    if not runs:
        raise ValueError("GuideLLM's file has no requests in it")
    return runs


def _read_aiperf(documents: Sequence[Any], targets: Targets) -> list[Result]:
    """aiperf's profile_export.jsonl."""
    limits, outcomes = _limits(targets), []
    for index, one in enumerate(documents):
        metrics, about = one.get("metrics") or {}, one["metadata"]
        if about.get("benchmark_phase") == "warmup":
            continue
        error = str(one["error"])[:200] if one.get("error") else ""
        if not error and about.get("was_cancelled"):
            error = "cancelled"

        def value(name: str, metrics: Any = metrics) -> Any:
            found = metrics.get(name)
            return found.get("value") if isinstance(found, dict) else found

        outcomes.append(
            outcome_of(
                index,
                sent_s=about["request_start_ns"] / 1e9,
                ttft_s=_scaled(value("time_to_first_token"), 1e-3),
                tpot_s=_scaled(value("inter_token_latency"), 1e-3),
                input_tokens=value("input_sequence_length"),
                output_tokens=value("output_sequence_length"),
                targets=limits,
                error=error,
                ended_s=_scaled(about.get("request_end_ns"), 1e-9),
            )
        )
    if not outcomes:
        raise ValueError("aiperf's file has no requests in it but its warm-up's")
    return [_run(outcomes)]


def _read_inference_perf(documents: Sequence[Any], targets: Targets) -> list[Result]:
    """inference-perf's per_request_lifecycle_metrics.json, which has the time of every token. It
    leaves failed requests out of its own goodput; here they have missed."""
    outcomes = []
    for index, one in enumerate(documents):
        info = one.get("info") or {}
        times = (info.get("response_metrics") or {}).get("output_token_times") or []
        sent, spans = one["start_time"], len(times) - 1
        outcomes.append(
            outcome_of(
                index,
                sent_s=sent,
                ttft_s=times[0] - sent if times else None,
                tpot_s=(times[-1] - times[0]) / spans if spans > 0 else None,
                input_tokens=info.get("input_tokens"),
                output_tokens=len(times),
                targets=_limits(
                    targets,
                    _scaled(one.get("ttft_slo_sec"), 1e3),
                    _scaled(one.get("tpot_slo_sec"), 1e3),
                ),
                error=str(one["error"])[:200] if one.get("error") else "",
                ended_s=one.get("end_time"),
            )
        )
    return [_run(outcomes)]


def _scaled(value: Any, factor: float) -> float | None:
    number = _checked(value, "a time or length")
    return None if number is None else number * factor


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda document: all(name in document for name in names)


FORMATS = (
    ResultFormat("sglang.benchmark.serving", _has("backend", "request_throughput"), _read_bench),
    ResultFormat("sglang.benchmark.serving", _has("itls"), _read_bench),
    ResultFormat("sglang.benchmark.serving", _has("request_throughput", "duration"), _read_bench),
    ResultFormat("GuideLLM", _has("benchmarks"), _read_guidellm),
    ResultFormat("aiperf", _has("metadata", "metrics"), _read_aiperf),
    ResultFormat("inference-perf", _has("start_time", "end_time", "info"), _read_inference_perf),
)
