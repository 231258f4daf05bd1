"""What the command lines of the simulator share: flags, their limits, and what they stand for."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sglang_kairos.loads import traces
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.cli.pool import usable_cores
from sglang_kairos.sim.core.cluster import Setup
from sglang_kairos.sim.core.predictions import PredictionError
from sglang_kairos.sim.hardware.systems import SOURCES, StepTimesError, load_system
from sglang_kairos.sim.hardware.times import SYSTEMS, System
from sglang_kairos.slo.targets import LIMITS_MS

T = TypeVar("T")

# p99 over median of the prompts is 8, 20 and 52; the caps allow that. 20 is as in Mooncake's
# conversation trace, and the default of `traces.long_tail`.
TAILS: dict[str, dict[str, float]] = {
    "lighter": {"sigma_input": 0.9, "sigma_output": 0.5},
    "standard": {},
    "heavier": {"sigma_input": 1.7, "sigma_output": 1.1, "max_input": 64_000, "max_output": 1600},
}
SHAPES = ("median_input", "sigma_input", "max_input", "median_output", "sigma_output", "max_output")


class UsageError(ValueError):
    """Arguments that do not go together, or that this machine cannot serve."""


class TargetSet(NamedTuple):
    """One SLO setting, in ms: requests draw their TTFT target from the tiers `ttft`."""

    ttft: tuple[float, ...]
    tpot: float

    def __str__(self) -> str:
        return f"TTFT {'/'.join(f'{ms:g}' for ms in self.ttft)} ms, TPOT {self.tpot:g} ms"


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for where requests come from, at which rate, and with which targets."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", help="Mooncake, Bailian or aiperf JSONL, Azure or BurstGPT CSV")
    source.add_argument(
        "--generate",
        metavar="N",
        type=whole("--generate", 1, 10_000_000),
        default=2000,
        help="without a trace: this many made requests, long-tailed prompts (default %(default)s)",
    )
    traces.add_reading_options(parser)
    parser.add_argument(
        "--limit", type=whole("--limit", 1, 10**9), help="only the trace's first LIMIT requests"
    )
    parser.add_argument(
        "--rate",
        type=several(real("--rate", 1e-6, 1e6), "--rate"),
        help="requests per second, or several with commas (default: the trace's; made: 1)",
    )
    made = parser.add_argument_group("made requests: lognormal lengths in tokens")
    made.add_argument("--tail", choices=sorted(TAILS), help="a preset for all of the below")
    for side in ("input", "output"):
        for what, read in (
            ("median", real(f"--median-{side}", 1, traces.MAX_TOKENS)),
            ("sigma", real(f"--sigma-{side}", 0, 5)),
            ("max", whole(f"--max-{side}", 1, traces.MAX_TOKENS)),
        ):
            made.add_argument(f"--{what}-{side}", type=read)
    parser.add_argument(
        "--ttft-ms",
        type=several(real("--ttft-ms", *LIMITS_MS["ttft_ms"])),
        help="TTFT target; several with commas are tiers that requests draw from (default 2000)",
    )
    parser.add_argument(
        "--tpot-ms",
        type=real("--tpot-ms", *LIMITS_MS["tpot_ms"]),
        help="TPOT target (default 100)",
    )
    parser.add_argument(
        "--slo",
        type=several(_targets, "--slo"),
        metavar="TTFT[/TTFT…]:TPOT,…",
        help="both targets in ms, or several settings with commas; / separates tiers",
    )
    parser.add_argument(
        "--seed",
        type=several(whole("--seed", 0, 2**31), "--seed"),
        default=[0],
        help="seed of tiers, made traces and errors; several with commas are repeats (default 0)",
    )


def add_run_options(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    """Adds the flags for what is simulated, and how."""
    parser.add_argument(
        "--policies",
        type=several(_policy, "--policies"),
        default=list(policies),
        help=f"with commas, of: {', '.join(POLICIES)} (default {','.join(policies)})",
    )
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="minimax-m2.5-h200-tp4")
    parser.add_argument(
        "--times",
        choices=SOURCES,
        default="auto",
        help="step times: tables of an operator database (extra `tables`), or laws fitted to it; "
        "auto takes tables where they are (default %(default)s)",
    )
    parser.add_argument(
        "--predict",
        choices=("calibrated", "learn"),
        default="calibrated",
        help="what the servers start from: a profile of this hardware, or nothing",
    )
    parser.add_argument(
        "--prediction-factor",
        type=real("--prediction-factor", 0.01, 100),
        default=1.0,
        help="every prediction times this (default 1)",
    )
    parser.add_argument(
        "--prediction-noise",
        type=real("--prediction-noise", 0, 3),
        default=0.0,
        help="sigma of a lognormal error of every prediction (default 0)",
    )
    parser.add_argument(
        "--jobs",
        type=whole("--jobs", 1, 1024),
        default=usable_cores(),
        help="processes (default: usable cores, here %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")


def check_together(args: argparse.Namespace) -> None:
    """Raises `UsageError` for arguments that contradict each other or cannot be served."""
    if args.trace is None and args.limit is not None:
        raise UsageError("--limit needs --trace; use --generate for the number of made requests")
    shaped = [name for name in ("tail", *SHAPES) if getattr(args, name) is not None]
    if args.trace is not None and shaped:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in shaped)
        raise UsageError(f"{flags}: only for made requests, not with --trace")
    if args.slo and (args.ttft_ms is not None or args.tpot_ms is not None):
        raise UsageError("--slo gives both targets: leave --ttft-ms and --tpot-ms out")
    if args.json is not None:
        folder = Path(args.json).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--json {args.json}: cannot be written: no folder to write in there")


def targets_of(args: argparse.Namespace) -> list[TargetSet]:
    """Returns the SLO settings asked for, at least one."""
    if args.slo:
        return list(args.slo)
    return [TargetSet(tuple(args.ttft_ms or (2000.0,)), args.tpot_ms or 100.0)]


def system_of(args: argparse.Namespace) -> System:
    """Returns the simulated servers."""
    try:
        return load_system(args.system, args.times)
    except StepTimesError as error:
        raise UsageError(f"--system {args.system} --times {args.times}: {error}") from None


class TraceSource:
    """The trace asked for, at any rate. Asked twice it gives the same list."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        given = (
            None
            if args.trace is None
            else traces.read_trace(args.trace, args.block_tokens, args.time_unit)
        )
        self._given = None if given is None else traces.window(given, n=args.limit)
        self._made: dict[tuple[float | None, int], list[traces.Request]] = {}

    def rows(self, rate: float | None, seed: int) -> list[traces.Request]:
        """Returns requests at `rate` per second (None: the trace's own). Given traces ignore the seed."""
        key = rate, seed if self._given is None else 0
        if key not in self._made:
            if self._given is None:
                self._made[key] = traces.long_tail(
                    self._args.generate, rate or 1.0, seed, **shape_of(self._args)
                )
            else:
                self._made[key] = (
                    self._given if rate is None else traces.scale_rate(self._given, rate)
                )
        return self._made[key]

    def __str__(self) -> str:
        if self._given is None:
            tail = f", {self._args.tail} tail" if self._args.tail else ""
            return f"made trace ({self._args.generate}{tail})"
        return f"{Path(self._args.trace).name} ({len(self._given)})"


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `traces.long_tail`: the preset, overridden by what was given by itself."""
    own = {name: getattr(args, name) for name in SHAPES if getattr(args, name) is not None}
    return {**TAILS[args.tail or "standard"], **own}


def setup_of(
    args: argparse.Namespace,
    system: System,
    targets: TargetSet,
    seed: int,
    prefills: int,
    decodes: int,
) -> Setup:
    """Returns the simulated cluster."""
    error = PredictionError(args.prediction_factor, args.prediction_noise, args.predict == "learn")
    return Setup(system, targets.ttft, targets.tpot, prefills, decodes, seed, error)


def described(args: argparse.Namespace, system: System) -> dict[str, Any]:
    """Returns what all runs of this command line share, for its JSON."""
    return {
        "simulated": True,
        "system": args.system,
        "times": args.times,
        "notes": list(system.notes),
        "trace": None if args.trace is None else str(args.trace),
        "generated": args.generate if args.trace is None else None,
        "lengths": shape_of(args) if args.trace is None else None,
        "predict": args.predict,
        "prediction_factor": args.prediction_factor,
        "prediction_noise": args.prediction_noise,
    }


def several(one: Callable[[str], T], unique: str = "") -> Callable[[str], list[T]]:
    """Returns a reader of values with commas between; none may come twice if `unique` names the flag."""

    def read(text: str) -> list[T]:
        values = [one(part.strip()) for part in text.split(",")]
        if unique and len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{unique} names a value twice: {text!r}")
        return values

    return read


def real(name: str, low: float, high: float) -> Callable[[str], float]:
    """Returns a reader of numbers from `low` to `high`; `name` is the flag in the error."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{name} must be a number between {low:g} and {high:g}, got {text!r}"
            )
        return value

    return read


def whole(name: str, low: int, high: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers from `low` to `high`; `name` is the flag in the error."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{name} must be a whole number between {low} and {high}, got {text!r}"
            )
        return value

    return read


def _targets(text: str) -> TargetSet:
    ttft, colon, tpot = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(
            f"--slo must be TTFT:TPOT in ms with / between TTFT tiers, as 1000/5000:50, got {text!r}"
        )
    one = real("--slo TTFT", *LIMITS_MS["ttft_ms"])
    tiers = tuple(one(part.strip()) for part in ttft.split("/"))
    return TargetSet(tiers, real("--slo TPOT", *LIMITS_MS["tpot_ms"])(tpot))


def _policy(text: str) -> str:
    if text not in POLICIES:
        raise argparse.ArgumentTypeError(f"unknown policy {text!r}; known: {', '.join(POLICIES)}")
    return text
