"""Fits a simulated cluster to a recording: latency models, how steps scatter, and fixed delays.

The input is a recording of a replay on one prefill and one decode server (`Recording`). It holds
what every step took, when requests were queued and admitted, and what the client saw. Times are
seconds of one clock throughout. `calibrate` returns

    prefill, decode   the predictors' own latency models for the bulk of the steps' *cycles* (start
    to
                      start while the server is busy: forward, results, scheduling)
    ..._pace          what each step took beside what the model predicted, in order. A run lives
                      through that sequence again (`Machine`), from a place drawn from its seed
    front_s           client's sending to the prefill queue, while prefill was idle
    handoff_s         prefill's result to the first decode step, while decode was idle
    delivery_s        the start of that step to the first token at the client (can be negative)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from random import Random
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.loads.replay import Outcome, Result
from sglang_kairos.loads.traces import Request
from sglang_kairos.predict.latency_model import (
    GENERIC_DECODE,
    GENERIC_PREFILL,
    DecodeLatency,
    PrefillLatency,
)
from sglang_kairos.predict.least_squares import least_squares
from sglang_kairos.sim.baselines.policies import Policy
from sglang_kairos.sim.calibrate.learnt import LearntCluster
from sglang_kairos.sim.calibrate.recording import Recording, cycles, delays
from sglang_kairos.sim.core.cluster import Setup
from sglang_kairos.sim.hardware.times import LawTimes, System

LEAST_STEPS = 20
ROUNDS, TRIM = 3, 1.5
LEAST_S = 1e-6

Floats = NDArray[np.float64]


class CalibrationError(ValueError):
    """A recording has too little in it; the text names what is missing and how much is needed."""


@dataclass(frozen=True)
class MachinePace:
    """How a machine kept to a latency model: per step, seconds predicted (`told_s`) and taken."""

    told_s: tuple[float, ...]
    taken_s: tuple[float, ...]

    @property
    def slowdown(self) -> float:
        """Returns the seconds taken per second predicted."""
        return sum(self.taken_s) / sum(self.told_s)

    def scaled(self, factor: float) -> MachinePace:
        """Returns the same on a machine whose steps take `factor` times as long."""
        return MachinePace(self.told_s, tuple(factor * taken for taken in self.taken_s))

    def summary(self) -> dict[str, float]:
        """Returns the number of steps, the overall slowdown, and the spread of the steps' own."""
        factors = np.asarray(self.taken_s) / np.asarray(self.told_s)
        p10, p50, p90 = np.quantile(factors, (0.1, 0.5, 0.9)).tolist()
        return {
            "steps": len(factors),
            "slowdown": self.slowdown,
            "p10": p10,
            "p50": p50,
            "p90": p90,
        }


class Machine:
    """Turns predicted seconds into a machine's: replays a `MachinePace` from `start` (0 to 1).

    The recorded steps are a road, as long as the predicted seconds. A step predicted to take w
    seconds covers w of it, in the time that this stretch took. So a long step meets many short ups
    and downs, and a slow spell lasts as long as it did. In all no time is lost or won.
    """

    def __init__(self, pace: MachinePace, start: float) -> None:
        self._told = list(accumulate(pace.told_s, initial=0.0))
        self._taken = list(accumulate(pace.taken_s, initial=0.0))
        self._at_s = start * self._told[-1]

    def takes_s(self, told_s: float) -> float:
        """Returns how long the next step takes, which the latency model predicts to take `told_s`."""
        begun, end_s = self._clock_s(self._at_s), self._at_s + told_s
        rounds, self._at_s = divmod(end_s, self._told[-1])
        return rounds * self._taken[-1] + self._clock_s(self._at_s) - begun

    def _clock_s(self, at_s: float) -> float:
        step = min(bisect_right(self._told, at_s), len(self._told) - 1)
        told, taken = self._told[step - 1], self._taken[step - 1]
        share = (at_s - told) / (self._told[step] - told)
        return taken + share * (self._taken[step] - taken)


class PacedTimes(LawTimes):
    """Latency models on machines that keep to them as a prefill and a decode server did."""

    def __init__(
        self,
        prefill: PrefillLatency,
        decode: DecodeLatency,
        prefill_pace: MachinePace,
        decode_pace: MachinePace,
        seed: int,
    ) -> None:
        super().__init__(prefill, decode, None)
        rng = Random(f"{seed}/pace")
        self._machines = [Machine(pace, rng.random()) for pace in (prefill_pace, decode_pace)]

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        return self._machines[0].takes_s(super().prefill_s(new_tokens, prefix_tokens))

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        return self._machines[1].takes_s(super().decode_s(batch, kv_tokens))


@dataclass(frozen=True)
class Simulated:
    """A simulated run as its client saw it, and the seconds that its prefill server computed."""

    result: Result
    prefill_busy_s: float


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`; the module's text explains the fields. `sizes`: fields of `System`.

    `late_results`: a prefill step's result is looked at after the next step. SGLang's overlap loop
    does that where the forward runs inside the launch (a CPU).
    """

    prefill: PrefillLatency
    decode: DecodeLatency
    prefill_pace: MachinePace
    decode_pace: MachinePace
    front_s: float
    handoff_s: float
    delivery_s: float
    late_results: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Returns, for JSON, the latency models, and each pace in a few numbers."""
        return {
            **asdict(self),
            "prefill": self.prefill.to_json(),
            "decode": self.decode.to_json(),
            "prefill_pace": self.prefill_pace.summary(),
            "decode_pace": self.decode_pace.summary(),
        }

    def system(self, seed: int) -> System:
        """Returns the simulated servers; `seed` decides where in the paces they start."""
        times = PacedTimes(self.prefill, self.decode, self.prefill_pace, self.decode_pace, seed)
        sizes: dict[str, Any] = dict(self.sizes)
        return System(times, kv_bytes=0.0, link_latency_s=self.handoff_s, **sizes)

    def scaled(self, prefill: float) -> Calibration:
        """Returns the same on a machine whose prefill steps take `prefill` times as long."""
        return replace(self, prefill_pace=self.prefill_pace.scaled(prefill))

    def simulate(
        self, policy: Policy, rows: Sequence[Request], ttft_ms: float, tpot_ms: float, seed: int
    ) -> Simulated:
        """Returns the trace as a client of the calibrated cluster would see it."""
        late = [replace(row, arrival_s=row.arrival_s + self.front_s) for row in rows]
        left_ms = max(0.0, ttft_ms - 1e3 * self.front_s)
        setup = Setup(self.system(seed), ttft_ms=(left_ms,), tpot_ms=tpot_ms, seed=seed)
        cluster = LearntCluster(setup, policy, late, self.late_results)
        result = cluster.run()
        outcomes = [self._seen(outcome, ttft_ms) for outcome in result.outcomes]
        seen = Result(outcomes, result.duration_s + self.delivery_s)
        return Simulated(seen, sum(server.busy_s for server in cluster.prefills))

    def _seen(self, outcome: Outcome, ttft_ms: float) -> Outcome:
        seen = replace(
            outcome,
            planned_s=outcome.planned_s - self.front_s,
            sent_s=outcome.sent_s - self.front_s,
            ttft_slo_ms=ttft_ms,
            ended_s=outcome.ended_s + self.delivery_s,
        )
        if seen.output_tokens:
            seen.first_token_s += self.delivery_s
            seen.last_token_s += self.delivery_s
        return seen


def calibrate(recording: Recording, sizes: Mapping[str, int], late_results: bool) -> Calibration:
    """Returns latency models, paces and delays of one recording. `sizes`: fields of `System`, in tokens.

    Raises CalibrationError when there are too few steps, or no request found a server idle.
    """
    features = [GENERIC_PREFILL.features(step.new, step.prefix)[:4] for step in recording.prefill]
    prefill_x = np.array(features).reshape(-1, 4)
    prefill_s = np.array(cycles(recording.prefill))
    features = [GENERIC_DECODE.features(len(step.rooms), step.kv) for step in recording.decode]
    decode_x = np.array(features).reshape(-1, 5)
    decode_s = np.array(cycles(recording.decode))
    for name, taken in (("prefill", prefill_s), ("decode", decode_s)):
        if taken.size < LEAST_STEPS:
            raise CalibrationError(f"{taken.size} {name} steps recorded, {LEAST_STEPS} needed")
    found = delays(recording, late_results)
    for name, samples in asdict(found).items():
        if not samples:
            raise CalibrationError(f"no {name} delay could be measured: send a lighter load")
    prefill, decode = bulk_law(prefill_x, prefill_s), bulk_law(decode_x, decode_s)
    return Calibration(
        prefill=PrefillLatency(*prefill),
        decode=DecodeLatency.of(decode),
        prefill_pace=pace_of(prefill_x @ prefill, prefill_s),
        decode_pace=pace_of(decode_x @ decode, decode_s),
        front_s=max(0.0, median(found.front)),
        handoff_s=max(0.0, median(found.handoff)),
        delivery_s=median(found.delivery),
        late_results=late_results,
        sizes=dict(sizes),
    )


def pace_of(told_s: Floats, taken_s: Floats) -> MachinePace:
    """Returns pairs of arrays (m,) as a `MachinePace`; no step is predicted to take less than LEAST_S."""
    return MachinePace(tuple(np.maximum(told_s, LEAST_S).tolist()), tuple(taken_s.tolist()))


def bulk_law(features: Floats, seconds: Floats) -> list[float]:
    """Returns coefficients >= 0 of least relative squared error, shape (k,), over the bulk of the steps.

    `features` (m, k), `seconds` (m,). Steps off by more than a factor TRIM from the model of the
    round before are left out. In a slow spell of the machine batches grow, so a model of all steps
    would blame the batch for the spell. Spells belong to the pace.
    """
    keep = np.ones(seconds.size, bool)
    for _ in range(ROUNDS):
        ratio = seconds / np.maximum(features @ least_squares(features[keep], seconds[keep]), 1e-9)
        ratio /= np.median(ratio)
        keep = (ratio < TRIM) & (ratio > 1 / TRIM)
    coefficients: list[float] = least_squares(features[keep], seconds[keep]).tolist()
    return coefficients
