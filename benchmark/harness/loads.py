"""What is sent: a trace cut to the machine, at a share of the capacity that was measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_kairos.loads import traces

# A chunked prefill on a CPU costs the cube of the prompt: 16k tokens would take most of a run.
MAX_INPUT, MAX_OUTPUT = 8_000, 400
# What a tiny model on two cores can take, on average: longer traces are scaled down to it.
MEAN_INPUT, MEAN_OUTPUT = 900, 44
# Every token costs the HTTP server, the router and this driver CPU that a GPU machine has spare.
MEDIAN_OUTPUT, LONGEST_OUTPUT = 32.0, 160


@dataclass(frozen=True)
class PacedTrace:
    """A trace at its rate, with its targets in ms, as all policies are sent it."""

    rows: list[traces.Request]
    ttft_ms: float
    tpot_ms: float
    seed: int
    capacity_rps: float | None

    @property
    def rate(self) -> float:
        return traces.rate_of(self.rows)

    def describe(self) -> str:
        """Returns requests, span and rate in words."""
        text = (
            f"{len(self.rows)} requests in {self.rows[-1].arrival_s:.0f} s: {self.rate:.2f} req/s"
        )
        if self.capacity_rps is None:
            return text
        share = 100 * self.rate / self.capacity_rps
        return f"{text} = {share:.0f} % of the measured prefill capacity"

    def setup(self) -> dict[str, Any]:
        """Returns what was sent, for the JSON of an experiment."""
        return {
            "requests": len(self.rows),
            "rate_rps": round(self.rate, 3),
            "prefill_capacity_rps": self.capacity_rps and round(self.capacity_rps, 3),
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "seed": self.seed,
            **lengths(self.rows),
        }


def base_trace(given: argparse.Namespace) -> list[traces.Request]:
    """Returns the trace at `--rate`, or at any rate when that is still to be measured."""
    n = given.requests or (round(given.rate * given.load_s) if given.rate else 1000)
    if not given.trace:
        tail = {"median_output": MEDIAN_OUTPUT, "max_output": LONGEST_OUTPUT}
        return traces.long_tail(n, given.rate or 1.0, given.seed, max_input=MAX_INPUT, **tail)
    rows = traces.window(traces.read_trace(given.trace, given.block_tokens, given.time_unit), n=n)
    inputs = float(np.mean([row.input_tokens for row in rows]))
    outputs = float(np.mean([row.output_tokens for row in rows]))
    shrink = min(1.0, MEAN_INPUT / inputs), min(1.0, MEAN_OUTPUT / outputs)
    print(f"{given.trace}: {n} rows; prompts × {shrink[0]:.3f}, outputs × {shrink[1]:.3f}")
    rows = traces.cap_lengths(traces.scale_lengths(rows, *shrink), MAX_INPUT, MAX_OUTPUT)
    return traces.scale_rate(rows, given.rate) if given.rate else rows


def paced(rows: list[traces.Request], given: argparse.Namespace, seconds: np.ndarray) -> PacedTrace:
    """Returns as much of the trace as takes `load_s` at the wanted utilisation.

    `seconds`: prefill time of each row. Long tails make windows of a trace differ, so the capacity
    is that of the part to be sent.
    """
    total = np.cumsum(seconds)
    n = given.requests or int(np.searchsorted(total, given.utilisation * given.load_s))
    n = max(2, min(len(rows), n))
    capacity = n / float(total[n - 1])
    rows = traces.scale_rate(traces.window(rows, n=n), given.utilisation * capacity)
    return PacedTrace(rows, given.ttft_ms, given.tpot_ms, given.seed, capacity)


def lengths(rows: Sequence[traces.Request]) -> dict[str, dict[str, int]]:
    """Returns quantiles of prompt and output tokens, by JSON key."""
    return {
        name: quantiles([getattr(row, name) for row in rows])
        for name in ("input_tokens", "output_tokens")
    }


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Returns p50, p90, p99 and the largest."""
    found = np.percentile(values, [50, 90, 99, 100])
    return {name: int(q) for name, q in zip(("p50", "p90", "p99", "max"), found, strict=True)}
