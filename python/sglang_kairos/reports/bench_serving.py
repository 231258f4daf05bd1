"""Reads the file of SGLang's own benchmark, ``sglang.benchmark.serving --output-details``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_kairos.loads.replay import Result
from sglang_kairos.reports.outcomes import Entry, Targets, checked, outcome_of

_DETAILS = ("ttfts", "itls", "output_lens", "input_lens", "errors")


def read_bench(documents: Sequence[Any], targets: Targets) -> list[Result]:
    """Returns the runs of a file: one for each line."""
    return [from_bench_record(one, targets) for one in documents]


def from_bench_record(record: Mapping[str, Any], targets: Targets) -> Result:
    """Returns a run of the benchmark; `record` is one line of its output file.

    Targets default to those of its ``--goodput``. It records no sending times, so each request
    starts at 0 here; no metric uses that, only plots. It counts a request that the server ended
    inside a 200 as done, with a TTFT of 0 where no token came. Here that request has failed. Raises
    ValueError, which names the field.
    """
    _check(record)
    whole = Entry("record", record)
    limits = targets.of(whole.number("goodput_slos_ms.ttft"), whole.number("goodput_slos_ms.tpot"))
    # Requests ignore end-of-sequence tokens unless told otherwise, which the file does not say.
    owed = targets.owed(_least_asked(whole), ignores_eos=True)
    outcomes = []
    for index, (ttft, itls, output, inputs, error) in enumerate(
        zip(*(record[name] for name in _DETAILS), strict=True)
    ):
        outcome = outcome_of(
            index,
            sent_s=0.0,
            ttft_s=ttft,
            tpot_s=0.0,
            input_tokens=inputs,
            output_tokens=output,
            targets=limits,
            error=str(error or ""),
            owed=owed,
        )
        if outcome.ok:
            outcome.last_token_s = outcome.ended_s = ttft + sum(itls)
            outcome.itls_ms = [1e3 * itl for itl in itls]
        outcomes.append(outcome)
    return Result(outcomes, record["duration"])


def _check(record: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the first field that is missing or makes no sense."""
    missing = [name for name in (*_DETAILS, "duration") if name not in record]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)}: run SGLang's benchmark with --output-details (this file was "
            "written without)"
        )
    for name in _DETAILS:
        if not isinstance(record[name], list):
            raise ValueError(f"{name} must be a list, got {record[name]!r:.40}")
    if checked(record["duration"], "duration") is None:
        raise ValueError("duration must be a number, got None")
    counts = {name: len(record[name]) for name in _DETAILS}
    if len(set(counts.values())) > 1:
        raise ValueError(f"lists of different lengths: {counts}")
    for name in ("ttfts", "output_lens", "input_lens"):
        for index, value in enumerate(record[name]):
            # `outcome_of` takes numbers that make no sense for a failed request.
            if not isinstance(value, int | float):
                checked(value, f"{name}[{index}]")
    for index, itls in enumerate(record["itls"]):
        if not isinstance(itls, list):
            raise ValueError(f"itls[{index}] must be a list, got {itls!r:.40}")
        for itl in itls:
            if checked(itl, f"itls[{index}]") is None:
                raise ValueError(f"itls[{index}] must hold numbers, got None")


def blind_bench(document: Any, path: Path) -> str:
    """Returns what the file does not tell; empty where it tells all."""
    if str(document.get("backend", "")).endswith("-oai") or document.get("random_range_ratio") == 1:
        return ""
    return (
        "answers ended early after their first token look whole in this file, unless it is made with "
        "--random-range-ratio 1 or --backend sglang-oai"
    )


def _least_asked(record: Entry) -> float | None:
    """Returns the fewest tokens that any request of a run with random prompts asked for."""
    if not str(record.get("dataset_name")).startswith("random"):
        return None
    longest, ratio = record.number("random_output_len"), record.number("random_range_ratio")
    return None if longest is None or ratio is None else max(1.0, longest * ratio)
