"""`python -m sglang_kairos.sim`: policies against each other on a simulated PD cluster."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sglang_kairos.sim.cluster import Cluster, Setup
from sglang_kairos.sim.policies import POLICIES
from sglang_kairos.sim.predictions import PredictionError
from sglang_kairos.sim.times import SYSTEMS
from sglang_kairos.slo import LIMITS_MS
from sglang_kairos.tools import traces
from sglang_kairos.tools.report import Run, table, write_json

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Simulates what the command line asks for and prints a table. 2: it cannot."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.limit is not None and args.trace is None:
        parser.error("--limit needs --trace; use --generate for the number of made requests")
    try:
        setup, runs = _simulate(args)
        if args.json:
            write_json(Path(args.json), runs, setup)
    except traces.TraceError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: cannot be written: {error.strerror}")
    return 0


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _simulate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Run]]:
    system = SYSTEMS[args.system]
    error = PredictionError(args.prediction_factor, args.prediction_noise, args.predict == "learn")
    given = None if args.trace is None else traces.read_trace(args.trace)
    runs: list[Run] = []
    started, simulated = time.process_time(), 0
    rates: list[float | None] = args.rate or [None]
    for asked in rates:
        group: list[Run] = []
        rate = math.nan
        for seed in args.seed:
            rows = _rows(args, given, asked, seed)
            rate = traces.rate_of(rows)
            ttft = tuple(args.ttft_ms)
            setup = Setup(system, ttft, args.tpot_ms, args.prefill, args.decode, seed, error)
            for name in args.policies:
                cluster = Cluster(setup, POLICIES[name], rows)
                result = cluster.run()
                simulated += len(rows)
                slo = {"ttft_ms": list(ttft), "tpot_ms": args.tpot_ms}
                shown = rate if math.isfinite(rate) else None
                facts = {"rate": shown, "slo": slo, "seed": seed, **cluster.facts()}
                group.append(Run(name, result, facts))
        print(table(group, _title(args, rate, group[0].result.metrics.sent)), end="\n\n")
        runs += group
    cpu = time.process_time() - started
    print(
        f"{simulated} requests simulated in {cpu:.1f} s of CPU ({simulated / cpu * 60:,.0f} a minute)"
    )
    return _described(args), runs


def _rows(
    args: argparse.Namespace, given: list[traces.Request] | None, rate: float | None, seed: int
) -> list[traces.Request]:
    if given is None:
        return traces.long_tail(args.generate, rate or 1.0, seed)
    rows = traces.window(given, n=args.limit)
    return rows if rate is None else traces.scale_rate(rows, rate)


def _title(args: argparse.Namespace, rate: float, count: int) -> str:
    ttft = "/".join(f"{ms:g}" for ms in args.ttft_ms)
    source = f"made trace ({count})" if args.trace is None else f"{Path(args.trace).name} ({count})"
    return (
        f"simulated: {args.system}, {args.prefill}P{args.decode}D, {source}, {rate:.3g} req/s, "
        f"TTFT {ttft} ms, TPOT {args.tpot_ms:g} ms"
    )


def _described(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "simulated": True,
        "system": args.system,
        "notes": list(SYSTEMS[args.system].notes),
        "trace": None if args.trace is None else str(args.trace),
        "generated": args.generate if args.trace is None else None,
        "prefill": args.prefill,
        "decode": args.decode,
        "predict": args.predict,
        "prediction_factor": args.prediction_factor,
        "prediction_noise": args.prediction_noise,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kairos.sim",
        description="Simulates a PD cluster under a trace, with the servers' own decisions.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--trace", help="Mooncake JSONL or Azure CSV, told apart by its content")
    source.add_argument(
        "--generate",
        type=_whole("--generate", 1, 10_000_000),
        default=2000,
        help="without a trace: this many made requests, long-tailed prompts (default %(default)s)",
    )
    parser.add_argument(
        "--limit", type=_whole("--limit", 1, 10**9), help="only the trace's first LIMIT requests"
    )
    parser.add_argument(
        "--rate",
        type=_several(_real("--rate", 1e-6, 1e6)),
        help="requests per second, or several with commas (default: the trace's; made: 1)",
    )
    parser.add_argument(
        "--ttft-ms",
        type=_several(_real("--ttft-ms", *LIMITS_MS["ttft_ms"])),
        default=[2000.0],
        help="TTFT target; several with commas are tiers that requests draw from (default 2000)",
    )
    parser.add_argument(
        "--tpot-ms",
        type=_real("--tpot-ms", *LIMITS_MS["tpot_ms"]),
        default=100.0,
        help="TPOT target (default %(default)g)",
    )
    parser.add_argument(
        "--policies",
        type=_several(_policy),
        default=["fcfs", "lpm", "hrrn", "shortest-prefill-first", "priority", "edf", "kairos"],
        help=f"with commas, of: {', '.join(POLICIES)}",
    )
    servers = _whole("number of servers", 1, 1024)
    parser.add_argument("--prefill", type=servers, default=1, help="prefill servers (default 1)")
    parser.add_argument("--decode", type=servers, default=1, help="decode servers (default 1)")
    parser.add_argument(
        "--seed",
        type=_several(_whole("--seed", 0, 2**31)),
        default=[0],
        help="of tiers, made traces and errors; several with commas are repeats (default 0)",
    )
    parser.add_argument("--system", choices=sorted(SYSTEMS), default="minimax-m2.5-h200-tp4")
    parser.add_argument(
        "--predict",
        choices=("calibrated", "learn"),
        default="calibrated",
        help="what the servers start from: a profile of this hardware, or nothing",
    )
    parser.add_argument(
        "--prediction-factor",
        type=_real("--prediction-factor", 0.01, 100),
        default=1.0,
        help="every prediction times this (default 1)",
    )
    parser.add_argument(
        "--prediction-noise",
        type=_real("--prediction-noise", 0, 3),
        default=0.0,
        help="sigma of a lognormal error of every prediction (default 0)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all runs there")
    return parser


def _several(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read(text: str) -> list[T]:
        return [one(part.strip()) for part in text.split(",")]

    return read


def _real(name: str, low: float, high: float) -> Callable[[str], float]:
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


def _whole(name: str, low: int, high: int) -> Callable[[str], int]:
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


def _policy(text: str) -> str:
    if text not in POLICIES:
        raise argparse.ArgumentTypeError(f"unknown policy {text!r}; known: {', '.join(POLICIES)}")
    return text


if __name__ == "__main__":
    sys.exit(main())
