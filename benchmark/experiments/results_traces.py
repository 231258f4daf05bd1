"""What the simulated results are about: windows of traces, their targets and shapes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_kairos.loads import traces
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.cli.grid import Cell, bound_available
from sglang_kairos.sim.core.cluster import Setup
from sglang_kairos.sim.core.predictions import PredictionError
from sglang_kairos.sim.hardware.times import SYSTEMS

SYSTEM = "minimax-m2.5-h200-tp4"
DEFAULT_TRACES = ("mooncake_conversation.jsonl", "azure_llm_2023_conv.csv")


@dataclass(frozen=True)
class SampledTrace:
    """Rows to take requests from, and what a user of such a service would be promised.

    `slos`: (TTFT tiers in ms, TPOT in ms). `tight_tpots_ms`: targets that load the decode side.
    """

    name: str
    rows: Sequence[traces.Request]
    requests: int
    slos: tuple[tuple[tuple[float, ...], float], ...]
    tight_tpots_ms: tuple[float, ...] = ()
    option: str = ""

    def window(self, start: int, count: int) -> tuple[traces.Request, ...]:
        """Returns `count` rows from row `start` on, the first at 0 s."""
        rows = self.rows[start : start + count]
        return tuple(replace(row, arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows)


@dataclass(frozen=True)
class TraceWindow:
    """One trace window, SLO setting and shape; what the rates of a sweep have in common."""

    source: SampledTrace
    rows: tuple[traces.Request, ...]
    ttft_ms: tuple[float, ...]
    tpot_ms: float
    prefill: int
    decode: int
    seed: int = 0
    start: int = 0

    @property
    def slo(self) -> str:
        """As the simulator's command line has it."""
        return f"{'/'.join(f'{ms:g}' for ms in self.ttft_ms)}:{self.tpot_ms:g}"

    @property
    def title(self) -> str:
        shape = f"{self.prefill}P{self.decode}D"
        return f"{self.source.name}, {shape}, TTFT:TPOT {self.slo} ms"

    def command(self, rate: float, policies: Sequence[str]) -> str:
        """Returns the shell command that simulates it."""
        limit = f" --limit {len(self.rows)}" if self.source.option.startswith("--trace") else ""
        return (
            f"python -m sglang_kairos.sim {self.source.option}{limit}"
            f" --rate {rate:.4g} --slo {self.slo} --prefill {self.prefill} --decode {self.decode}"
            f" --times law --seed {self.seed} --policies {','.join(policies)}"
        )

    def cell(
        self,
        rate: float,
        policy: str | Policy,
        error: PredictionError | None = None,
        bound: bool = False,
        **facts: Any,
    ) -> Cell:
        """Returns one simulation of it."""
        slos, shape = (self.ttft_ms, self.tpot_ms), (self.prefill, self.decode)
        setup = Setup(SYSTEMS[SYSTEM], *slos, *shape, self.seed, error or PredictionError())
        asked = {"title": self.title, "asked_rate": rate, "trace": self.source.name}
        rows = _at_rate(self.rows, rate)
        return Cell(rows, setup, policy, bound and bound_available(), facts={**asked, **facts})

    def offered(self) -> float:
        """Returns requests/s that keep the prefill servers about busy: where looking starts."""
        system = SYSTEMS[SYSTEM]
        law = system.times.prefill_model()
        work = law.remaining_s([row.input_tokens for row in self.rows], 0.0, system.chunk_tokens)
        return self.prefill * len(self.rows) / float(work.sum())


_SCALED: dict[tuple[int, float], list[traces.Request]] = {}


def _at_rate(rows: tuple[traces.Request, ...], rate: float) -> list[traces.Request]:
    # One object per rate: bounds are shared between cells with the same rows.
    key = id(rows), rate
    if key not in _SCALED:
        _SCALED[key] = traces.scale_rate(rows, rate)
    return _SCALED[key]


def rounded(rate: float) -> float:
    """Returns the rate as it is shown: three digits."""
    return float(f"{rate:.3g}")


def sources(given: argparse.Namespace) -> list[SampledTrace]:
    """Returns the traces there are, and made ones."""
    quick = given.quick
    flat, tiers = ((2000.0,), 100.0), ((1000.0, 5000.0, 30000.0), 100.0)
    strict = ((4000.0,), 50.0)
    paths = list(given.trace)
    if not paths:
        beside = (Path("../shared/traces") / name for name in DEFAULT_TRACES)
        paths = [path for path in beside if path.is_file()]
    found: list[SampledTrace] = []
    for path in paths:
        rows = traces.read_trace(path)
        count = 300 if quick else 1000
        if rows[0].hash_ids is None:
            count *= 2
            slos = (((1000.0,), 100.0), ((300.0, 1000.0, 5000.0), 100.0), ((500.0,), 50.0))
            tight = (20.0, 25.0)
        else:
            slos, tight = (flat, tiers, strict), (15.0, 25.0)
        found.append(SampledTrace(path.stem, rows, count, slos, tight, f"--trace {path}"))
    for tail, shape in (
        ("lighter", {"median_input": 2000.0, "sigma_input": 0.6, "max_input": 32_000}),
        ("heavier", {"median_input": 2000.0, "sigma_input": 1.6, "max_input": 120_000}),
    ):
        count = 300 if quick else 1000
        shape |= {"median_output": 150.0, "sigma_output": 0.8, "max_output": 1000}
        made = traces.long_tail(count, 1.0, 0, **shape)
        flags = " ".join(f"--{k.replace('_', '-')} {v:g}" for k, v in shape.items())
        found.append(
            SampledTrace(
                f"made, {tail} tail", made, count, (flat,), (), f"--generate {count} {flags}"
            )
        )
    return found


def windows_of(source: SampledTrace) -> list[TraceWindow]:
    """Returns every SLO setting at 1P1D; the first two at 2P2D with twice the requests."""
    small = source.window(0, source.requests)
    made = [TraceWindow(source, small, ttft, tpot, 1, 1) for ttft, tpot in source.slos]
    if len(source.slos) > 1:
        large = source.window(0, 2 * source.requests)
        made += [TraceWindow(source, large, ttft, tpot, 2, 2) for ttft, tpot in source.slos[:2]]
    return made
