"""The demo: one long-tailed trace, four schedulers, real SGLang servers, no GPU needed.

    python -m benchmark.demo        # fcfs, hrrn, shortest-prefill-first, kairos: about 6 minutes

Each policy gets a fresh prefill/decode pair behind the same router and the same trace, sent open
loop: a request leaves at its time whether or not the earlier ones are answered. How fast that is
depends on the machine, so the first cluster is measured before its run: the trace is then sent at
`--utilisation` of the prefill capacity found, to all policies alike. Writes ``report.json``,
``report.png`` and one JSON line per request under ``--out``.

`--sglang 0.5.16` runs it on that version, with the stock policies that it has: hrrn came with 0.5.20,
shortest-prefill-first with 0.5.21.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from sglang_kairos.cluster.run import ROUTERS, Cluster, ClusterError, ClusterSpec
from sglang_kairos.cpu import runtime as cpu_runtime
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result, failures, make_jobs, replay, run
from sglang_kairos.local_http import open_url
from sglang_kairos.other_sglang import NoSuchSglang, use
from sglang_kairos.reports import report
from sglang_kairos.versions.patch import PatchError, find_tree

KAIROS = "kairos"
POLICIES = ("fcfs", "hrrn", "shortest-prefill-first", KAIROS)
CHUNK_TOKENS = 512
# KV for all that can wait at once: this demo is about order, not about memory.
KV_TOKENS = 200_000
# A chunked prefill on a CPU costs the cube of the prompt: 16k tokens would take most of a run.
MAX_INPUT, MAX_OUTPUT = 8_000, 400
# What a tiny model on two cores can take, on average: longer traces are scaled down to it.
MEAN_INPUT, MEAN_OUTPUT = 900, 44
TIMEOUT_S = 90.0
# Every token costs the HTTP server, the router and this driver CPU that a GPU machine has spare.
MEDIAN_OUTPUT, LONGEST_OUTPUT = 32.0, 160
_BESIDE: set[int] = set()  # every core this process may use, before it was confined
REHEARSED = 80


@dataclass(frozen=True)
class Plan:
    """What is sent to every policy alike: the trace, its targets (ms), and how it was found."""

    rows: list[traces.Request]
    ttft_ms: float
    tpot_ms: float
    seed: int
    capacity_rps: float | None

    @property
    def rate(self) -> float:
        return traces.rate_of(self.rows)

    def describe(self) -> str:
        span = self.rows[-1].arrival_s
        load = (
            ""
            if self.capacity_rps is None
            else (
                f" = {100 * self.rate / self.capacity_rps:.0f} % of the measured prefill capacity"
            )
        )
        return f"{len(self.rows)} requests in {span:.0f} s: {self.rate:.2f} req/s{load}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        with start_method(given) as zygote:
            runs, plan = run_all(given, zygote)
    except (ClusterError, traces.TraceError) as error:
        first, _, rest = str(error).partition("\n")
        if rest:
            print(rest, file=sys.stderr)
        print(f"error: {first}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything stopped", file=sys.stderr)
        return 130
    print()
    print(report.table(runs, f"{platform()}; {plan.describe()}; {targets(plan)}"))
    print(f"\nwrote {given.out / 'report.json'} and {given.out / 'report.png'}")
    unanswered = [one.policy for one in runs if one.result.metrics.failed == len(plan.rows)]
    if unanswered:
        print(f"error: nothing was answered under {', '.join(unanswered)}", file=sys.stderr)
    return 1 if unanswered else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with policies as a list."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sglang", help="version (0.5.16) or folder of another SGLang than ours")
    parser.add_argument("--policies", help=f"of {', '.join(POLICIES)} (default: all there are)")
    parser.add_argument("--trace", type=Path, help="instead of our own (docs/simulator.md)")
    traces.add_reading_options(parser)
    parser.add_argument("--requests", type=int, help="how many (default: --load-s worth of them)")
    parser.add_argument("--load-s", type=float, default=55.0, help="seconds of arrivals per run")
    parser.add_argument("--rate", type=float, help="requests/s (default: measured, see below)")
    parser.add_argument("--utilisation", type=float, default=0.87, help="of the prefill capacity")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--tpot-ms", type=float, default=75.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=1, help="rounds, order reversed in between")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--router", choices=[r for r in ROUTERS if r != "none"], default="kairos")
    parser.add_argument("--launcher", default="sglang_kairos.launch_server")
    parser.add_argument("--model-path", default="", help="default: a tiny random model (CPU only)")
    parser.add_argument(
        "--start",
        choices=("fork", "spawn"),
        default="fork" if cpu_runtime.decide().active else "spawn",
        help="fork servers from one process that has imported SGLang, or start each anew",
    )
    given = parser.parse_args(argv)
    try:
        if given.sglang:
            use(given.sglang)
        known = known_policies()
    except (NoSuchSglang, PatchError) as error:
        parser.error(str(error))
    asked = ",".join(known) if given.policies is None else given.policies
    given.policies = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = [name for name in given.policies if name not in known]
    if unknown or not given.policies:
        bad = ", ".join(map(repr, unknown)) or "none given"
        parser.error(f"--policies: {bad}; this SGLang has: {', '.join(known)}")
    for name in ("rate", "utilisation", "ttft_ms", "tpot_ms", "load_s", "repeat", "requests"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: must be positive, got {value}")
    return given


def known_policies() -> list[str]:
    """Those of `POLICIES` that the SGLang found here can be started with."""
    source = find_tree().root / "srt" / "managers" / "schedule_policy.py"
    text = source.read_text(encoding="utf-8")
    return [name for name in POLICIES if name == KAIROS or f'"{name}"' in text]


def run_all(given: argparse.Namespace, zygote: Any) -> tuple[list[report.Run], Plan]:
    """Every policy, `repeat` times; the report is rewritten after each run."""
    rounds = [given.policies[:: -1 if turn % 2 else 1] for turn in range(given.repeat)]
    order = list(itertools.chain.from_iterable(rounds))
    rows = base_trace(given)
    plan = Plan(rows, given.ttft_ms, given.tpot_ms, given.seed, None) if given.rate else None
    runs: list[report.Run] = []
    for number, policy in enumerate(order, start=1):
        say = narrator(f"[{number}/{len(order)} {policy}]")
        with Cluster(spec_for(policy, given, zygote, say, number)) as cluster:
            say(f"servers ready after {cluster.started_in_s:.1f} s; warming up")
            separate(cluster)
            warm_up(cluster)
            if plan is None:
                seconds = measure_prefill(cluster, rows, given.utilisation, say)
                plan = paced(rows, given, seconds)
            say(plan.describe())
            before = prefill_busy_s(cluster)
            result = drive(cluster, plan, say)
            busy = (prefill_busy_s(cluster) - before) / plan.rows[-1].arrival_s
            facts = {} if math.isnan(busy) else {"prefill_utilisation": round(busy, 3)}
            facts |= kairos_reports(cluster)
        for line in failures(result.outcomes):
            say(f"failed: {line}")
        runs.append(report.Run(policy, result, facts))
        save(given.out, runs, plan, number)
        load = "" if math.isnan(busy) else f"; prefill busy {100 * busy:.0f} % of the trace's span"
        say(summary(result) + load)
    assert plan is not None
    return runs, plan


def base_trace(given: argparse.Namespace) -> list[traces.Request]:
    """The trace at `--rate`, or at any rate when that is still to be measured."""
    n = given.requests or (round(given.rate * given.load_s) if given.rate else 1000)
    if not given.trace:
        return traces.long_tail(
            n,
            given.rate or 1.0,
            given.seed,
            max_input=MAX_INPUT,
            median_output=MEDIAN_OUTPUT,
            max_output=LONGEST_OUTPUT,
        )
    rows = traces.window(traces.read_trace(given.trace, given.block_tokens, given.time_unit), n=n)
    inputs = float(np.mean([row.input_tokens for row in rows]))
    outputs = float(np.mean([row.output_tokens for row in rows]))
    shrink = min(1.0, MEAN_INPUT / inputs), min(1.0, MEAN_OUTPUT / outputs)
    print(f"{given.trace}: {n} rows; prompts × {shrink[0]:.3f}, outputs × {shrink[1]:.3f}")
    rows = traces.cap_lengths(traces.scale_lengths(rows, *shrink), MAX_INPUT, MAX_OUTPUT)
    return traces.scale_rate(rows, given.rate) if given.rate else rows


def paced(rows: list[traces.Request], given: argparse.Namespace, seconds: np.ndarray) -> Plan:
    """As much of the trace as takes `load_s` at the wanted utilisation.

    `seconds`: prefill time of each row. Long tails make windows of a trace differ, so it is the
    part that will be sent whose capacity counts.
    """
    total = np.cumsum(seconds)
    n = given.requests or int(np.searchsorted(total, given.utilisation * given.load_s))
    n = max(2, min(len(rows), n))
    capacity = n / float(total[n - 1])
    rows = traces.scale_rate(traces.window(rows, n=n), given.utilisation * capacity)
    return Plan(rows, given.ttft_ms, given.tpot_ms, given.seed, capacity)


def spec_for(
    policy: str, given: argparse.Namespace, zygote: Any, say: Callable[[str], None], number: int
) -> ClusterSpec:
    """One prefill and one decode server; policies differ in scheduling and in nothing else."""
    return ClusterSpec(
        model_path=given.model_path,
        router=given.router,
        launcher=given.launcher,
        kairos=policy == KAIROS,
        server_args=[
            *("--chunked-prefill-size", str(CHUNK_TOKENS)),
            *("--max-total-tokens", str(KV_TOKENS)),
        ],
        prefill_args=[] if policy == KAIROS else ["--schedule-policy", policy],
        # Otherwise each health check of the router makes both servers generate a token.
        env={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"},
        log_dir=given.out / "logs" / f"{number}-{policy}",
        stop_grace_s=5.0,
        ready_timeout_s=180.0,
        zygote=zygote,
        say=say,
    )


def separate(cluster: Cluster, role: str = "p") -> None:
    """On a CPU: schedulers of this role (p, d) get a core for themselves, all else shares the others.

    A decode scheduler with work to do never sleeps; without this, who is slowed down by whom
    would be decided by the operating system's scheduler instead of the one under test.
    """
    cores = sorted(os.sched_getaffinity(0) | _BESIDE)
    if len(cores) < 2 or not cpu_runtime.decide().active:
        return
    alone, beside = {cores[0]}, set(cores[1:])
    _BESIDE.update(cores)
    os.sched_setaffinity(0, beside)
    for part in cluster.parts:
        root = psutil.Process(part.process.pid)
        for process in (root, *root.children(recursive=True)):
            mine = alone if part.name.startswith(role) and is_scheduler(process) else beside
            for thread in process.threads():
                os.sched_setaffinity(thread.id, mine)


def is_scheduler(process: psutil.Process) -> bool:
    return "scheduler" in " ".join(process.cmdline())


def warm_up(cluster: Cluster) -> None:
    """The same few requests for every policy, then empty caches."""
    rows = [traces.Request(0.0, size, 8) for size in (32, 100, 300, 600, 1200, 2500, 600, 100)]
    run(replay(cluster.url, make_jobs(rows, 1e5, 1e5, seed=-1), concurrency=2))
    forget(cluster)


def forget(cluster: Cluster) -> None:
    """Empties the servers' prefix caches, once they are through with what is left of earlier runs."""
    deadline = time.monotonic() + TIMEOUT_S
    for url in (*cluster.prefill_urls, *cluster.decode_urls):
        ask = urllib.request.Request(url + "/flush_cache", method="POST")
        while True:
            try:
                with open_url(ask, timeout=10):
                    break
            except urllib.error.HTTPError as error:  # 400: busy
                if error.code != 400 or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def measure_prefill(
    cluster: Cluster,
    rows: Sequence[traces.Request],
    utilisation: float,
    say: Callable[[str], None],
) -> np.ndarray:
    """Prefill seconds of each request while the cluster also decodes, shape (len(rows),).

    Single prompts of four lengths give time over length; a rehearsal, requests spread evenly over
    the trace's lengths at about the load to come, shows by how much prefill steps take longer when
    everything else runs as well.
    """
    sizes = [128, 512, 2048, max(4096, max(row.input_tokens for row in rows))]
    alone = run(
        replay(
            cluster.url,
            make_jobs([traces.Request(0.0, size, 1) for size in sizes], 1e5, 1e5, seed=-2),
            concurrency=1,
            check=cluster.check,
        )
    )
    if any(not outcome.ok for outcome in alone.outcomes):
        raise ClusterError(f"measuring failed: {failures(alone.outcomes)[0]}")
    times = [outcome.ttft_ms / 1e3 for outcome in alone.outcomes]
    shown = ", ".join(
        f"{size} tokens {t * 1e3:.0f} ms" for size, t in zip(sizes, times, strict=True)
    )
    say(f"prefill of one prompt: {shown}")

    def alone_s(some: Sequence[traces.Request]) -> np.ndarray:
        # Straight lines between logarithms: power laws, as steep as the machine's attention.
        lengths = np.log([row.input_tokens for row in some])
        return np.exp(np.interp(lengths, np.log(sizes), np.log(times)))

    ordered = sorted(rows, key=lambda row: row.input_tokens)
    count = min(REHEARSED, len(rows))
    sample = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
    random.Random(0).shuffle(sample)
    gap_s = float(alone_s(sample).sum()) / count / utilisation
    sample = [replace(row, arrival_s=at * gap_s) for at, row in enumerate(sample)]
    before = prefill_busy_s(cluster)
    run(replay(cluster.url, make_jobs(sample, 1e5, 1e5, seed=-3), check=cluster.check))
    factor = (prefill_busy_s(cluster) - before) / float(alone_s(sample).sum())
    if math.isnan(factor):
        raise ClusterError("this SGLang does not count its prefill time: state a --rate")
    say(f"rehearsed {count} requests: × {factor:.2f}")
    forget(cluster)
    return alone_s(rows) * factor


def prefill_busy_s(cluster: Cluster) -> float:
    """Seconds that the prefill servers have spent in prefill steps, by SGLang's own counter.

    v0.5.16 has none. There it is the CPU time of their schedulers, which sleep while idle; on a GPU,
    where that says nothing, NaN.
    """
    loads: list[dict[str, Any]] = []
    for base in cluster.prefill_urls:
        with open_url(base + "/v1/loads?include=core", timeout=10) as answer:
            loads += json.load(answer)["loads"]
    if all("total_prefill_busy_us" in load for load in loads):
        return sum(load["total_prefill_busy_us"] for load in loads) / 1e6
    if not cpu_runtime.decide().active:
        return math.nan
    roots = [psutil.Process(p.process.pid) for p in cluster.parts if p.name.startswith("p")]
    schedulers = [p for root in roots for p in root.children(recursive=True) if is_scheduler(p)]
    return float(sum(sum(process.cpu_times()[:2]) for process in schedulers))


def kairos_reports(cluster: Cluster) -> dict[str, Any]:
    """What Kairos tells of itself on each server (predictors, their error, counters)."""
    found: dict[str, Any] = {}
    for base in (*cluster.prefill_urls, *cluster.decode_urls):
        with open_url(base + "/server_info", timeout=10) as answer:
            state = json.load(answer)["internal_states"][0]
        if "kairos" in state:
            found[f"kairos_{state['kairos']['mode']}"] = state["kairos"]
    return found


def drive(cluster: Cluster, plan: Plan, say: Callable[[str], None]) -> Result:
    """Sends the plan's trace and waits for the last answer, telling how far it is."""
    jobs = make_jobs(plan.rows, plan.ttft_ms, plan.tpot_ms, seed=plan.seed)
    ticks = itertools.count(1)

    def progress(sent: int, done: int, total: int) -> None:
        if next(ticks) % 10 == 0:
            say(f"sent {sent}/{total}, answered {done}")

    result = run(
        replay(cluster.url, jobs, timeout_s=TIMEOUT_S, check=cluster.check, progress=progress)
    )
    if result.lag_ms > 100:
        say(f"note: the driver was up to {result.lag_ms:.0f} ms late in sending")
    return result


def save(out: Path, runs: list[report.Run], plan: Plan, number: int) -> None:
    """Writes the report of the runs so far, and the last run's requests."""
    runs[-1].result.dump(out / f"{number}-{runs[-1].policy}.jsonl")
    setup = {
        "platform": platform(),
        "requests": len(plan.rows),
        "rate_rps": round(plan.rate, 3),
        "prefill_capacity_rps": plan.capacity_rps and round(plan.capacity_rps, 3),
        "ttft_ms": plan.ttft_ms,
        "tpot_ms": plan.tpot_ms,
        "chunk_tokens": CHUNK_TOKENS,
        "seed": plan.seed,
        "input_tokens": quantiles([row.input_tokens for row in plan.rows]),
        "output_tokens": quantiles([row.output_tokens for row in plan.rows]),
    }
    report.write_json(out / "report.json", runs, setup)
    title = f"{platform()}, one prefill and one decode server; {plan.describe()}; {targets(plan)}"
    report.write_png(out / "report.png", runs, title)


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """p50, p90, p99 and the largest."""
    found = np.percentile(values, [50, 90, 99, 100])
    return {name: int(q) for name, q in zip(("p50", "p90", "p99", "max"), found, strict=True)}


def summary(result: Result) -> str:
    """One run in a line."""
    metrics = result.metrics
    return (
        f"done in {result.duration_s:.0f} s: TTFT met {100 * metrics.ttft_attainment:.1f} %, "
        f"TPOT met {100 * metrics.tpot_attainment:.1f} %, both {100 * metrics.e2e_attainment:.1f} %"
    )


def targets(plan: Plan) -> str:
    return f"targets TTFT {plan.ttft_ms:g} ms, TPOT {plan.tpot_ms:g} ms"


def platform() -> str:
    """Every figure says what it was measured on."""
    cores = len(os.sched_getaffinity(0) | _BESIDE)
    return f"CPU ({cores} cores)" if cpu_runtime.decide().active else "GPU"


def narrator(prefix: str) -> Callable[[str], None]:
    """Prints lines with the time since the start of the demo."""

    def say(line: str) -> None:
        print(f"{time.monotonic() - _BEGUN:5.0f} s {prefix} {line}", flush=True)

    return say


@contextmanager
def start_method(given: argparse.Namespace) -> Iterator[Any]:
    """A zygote to fork servers from, or None to start each anew."""
    if given.start == "spawn":
        yield None
        return
    from sglang_kairos.cluster.run import quiet_zygote

    narrator("[setup]")("importing SGLang once for all servers (about 15 s)")
    with quiet_zygote(given.out / "zygote.log", given.router) as zygote:
        yield zygote


_BEGUN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
