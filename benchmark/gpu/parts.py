"""The parts of the GPU benchmark: what is started, what is sent, what is noted."""

from __future__ import annotations

import argparse
import asyncio
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmark import demo
from benchmark.gpu.capacity import capacity_of
from benchmark.gpu.shape import IDENTITY, write_shape
from sglang_kairos.calibrate.server import FAKE_HOST, cadence
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.cpu.tiny_model import make_tiny_model
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result, failures, make_jobs, replay, run
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.predict.prefill_latency import PrefillTimeModel
from sglang_kairos.reports import report

Say = Callable[[str], None]
SYSTEMS = ("stock", "kairos")
RELAXED_MS = 1e5
# What takes made-up KV, or sends its KV nowhere.
ALONE = {"bootstrap_host": FAKE_HOST, "bootstrap_room": 0}
STEPS_OF_BATCH_1 = 1.6  # the TPOT target, in steps of a batch of one: steps bind before the KV does
TINY_TPOT_MS = 30.0


class Bench:
    """What all parts share: settings, models, results so far."""

    def __init__(self, given: argparse.Namespace, zygote: Any) -> None:
        self.given, self.zygote = given, zygote
        self._ends_s = time.monotonic() + given.budget_s
        self.runs: list[report.Run] = []
        self.steady: list[dict[str, Any]] = []
        self.identity: dict[str, dict[str, int]] = {}
        self.skipped: dict[str, str] = {}
        self.took_s: dict[str, float] = {}

    @property
    def dry(self) -> bool:
        return bool(self.given.dry_run)

    def left_s(self) -> float:
        """Seconds of the budget."""
        return self._ends_s - time.monotonic()

    def platform(self) -> str:
        if self.dry:
            return demo.platform()
        import torch

        return f"1 × {torch.cuda.get_device_name()}, torch {torch.__version__}"

    def model(self, layers: int | None = None) -> str:
        """A folder to serve; empty for the tiny model of a dry run."""
        folder = self.given.out / "models"
        return "" if self.dry else str(write_shape(folder, self.given.shape, layers))

    def flags(self) -> list[str]:
        """The same for both systems: CUDA graphs and overlap stay on."""
        flags = ["--max-total-tokens", str(self.given.kv_tokens)]
        if self.dry:
            return [*flags, "--chunked-prefill-size", "512"]
        flags += ["--attention-backend", "flashinfer", "--load-format", "dummy"]
        # Several servers share the GPU; the KV is bounded by tokens, the share only must not be less.
        flags += ["--mem-fraction-static", "0.85", "--grammar-backend", "none"]
        return [*flags, "--random-seed", "1", "--watchdog-timeout", "900"]

    def spec(self, system: str, **changes: Any) -> ClusterSpec:
        """A cluster of one system; `changes` are ClusterSpec's."""
        name = changes.pop("name")
        settings: dict[str, Any] = {
            "model_path": self.model(),
            "router": "none",
            "kairos": system != "stock",
            "server_args": self.flags(),
            "env": {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"},
            "log_dir": self.given.out / "logs" / f"{name}-{system}",
            "stop_grace_s": 0.0 if self.dry else 5.0,
            "ready_timeout_s": 420.0,
            "zygote": self.zygote,
        }
        return ClusterSpec(**{**settings, **changes})

    def order(self, turn: int) -> tuple[str, ...]:
        return SYSTEMS[:: -1 if turn % 2 else 1]

    def enough(self, say: Say, seconds: float) -> bool:
        """Whether so much of the budget is left; says so when it is not."""
        if self.dry or self.left_s() > seconds:
            return True
        say(f"stopping here: {self.left_s():.0f} s of the budget left")
        return False


@contextmanager
def both(specs: dict[str, ClusterSpec], say: Say) -> Iterator[dict[str, Cluster]]:
    """All clusters, started at the same time."""
    clusters = {name: Cluster(spec) for name, spec in specs.items()}
    begun = time.monotonic()
    try:
        with ThreadPoolExecutor(len(clusters)) as pool:
            for done in [pool.submit(cluster.start) for cluster in clusters.values()]:
                done.result()
        say(f"{', '.join(clusters)} ready after {time.monotonic() - begun:.0f} s")
        yield clusters
    finally:
        with ThreadPoolExecutor(len(clusters)) as pool:
            list(pool.map(Cluster.stop, clusters.values()))


def decode(bench: Bench, say: Say, save: Callable[[], None]) -> None:
    """A decode server of each system, with made-up KV."""
    fake = ["--disaggregation-transfer-backend", "fake"]
    specs = {
        system: bench.spec(system, name="decode", prefill=0, decode_args=fake) for system in SYSTEMS
    }
    with both(specs, say) as clusters:
        warm = [traces.Request(0.0, size, 16) for size in (32, 300, 1200, 100)]
        for cluster in clusters.values():
            send(cluster, warm, RELAXED_MS, RELAXED_MS, bench, abreast=2)
        rehearse(clusters["kairos"], bench)
        law = reports(clusters["kairos"])["kairos_decode"]["decode"]
        measure_steady(clusters, bench, say)
        save()
        alone_ms = 1e3 * DecodeLatency.from_json(law).step_s(1, 500.0)
        tpot = bench.given.tpot_ms or (TINY_TPOT_MS if bench.dry else STEPS_OF_BATCH_1 * alone_ms)
        rows = decode_rows(400 if bench.dry else 4000, bench)
        capacity = min(capacity_of(law, rows, tpot), kv_capacity(bench.given.kv_tokens, rows, tpot))
        rate = min(bench.given.load * capacity, 30.0 if bench.dry else 400.0)
        rows = traces.scale_rate(rows[: max(8, round(rate * bench.given.load_s))], rate)
        say(f"{len(rows)} requests at {rate:.1f} req/s, TPOT {tpot:.1f} ms")
        for turn in range(bench.given.rounds):
            for system in bench.order(turn):
                if not bench.enough(say, 3 * bench.given.load_s):
                    return
                measure(clusters[system], rows, tpot, ("decode", system, turn), bench, say)
                save()


def prefill(bench: Bench, say: Say, save: Callable[[], None]) -> None:
    """A prefill server of each system; every request ends with its first token."""
    more = [] if bench.dry else ["--disaggregation-transfer-backend", bench.given.transfer]
    specs = {
        system: bench.spec(system, name="prefill", decode=0, prefill_args=more)
        for system in SYSTEMS
    }
    with both(specs, say) as clusters:
        sizes = (32, 300, 1200, 2500) if bench.dry else (32, 300, 1200, 6000, 16_000, 600, 100)
        for cluster in clusters.values():
            warm = [traces.Request(0.0, size, 1) for size in sizes]
            send(cluster, warm, RELAXED_MS, RELAXED_MS, bench, abreast=1)
        sample = prefill_rows(30 if bench.dry else 100, bench, seed=1)
        send(clusters["kairos"], sample, RELAXED_MS, RELAXED_MS, bench, abreast=2)
        law = reports(clusters["kairos"])["kairos_prefill"]["prefill"]
        model = PrefillTimeModel(*PrefillLatency.from_json(law))
        rows = prefill_rows(200 if bench.dry else 4000, bench)
        tokens = np.array([row.input_tokens for row in rows], float)
        chunk = 512 if bench.dry else 8192
        total = np.cumsum(model.remaining_s(tokens, np.zeros_like(tokens), chunk))
        # Above capacity the queue only grows: no order helps for long.
        load = min(0.9, bench.given.load)
        count = int(np.searchsorted(total, load * bench.given.load_s))
        count = max(8, min(len(rows), count))
        rate = load * count / float(total[count - 1])
        rows = traces.scale_rate(rows[:count], rate)
        say(f"{count} prompts at {rate:.1f} req/s: {100 * load:.0f} % of the capacity found")
        for turn in range(bench.given.rounds):
            for system in bench.order(turn):
                if not bench.enough(say, 3 * bench.given.load_s):
                    return
                measure(clusters[system], rows, RELAXED_MS, ("prefill", system, turn), bench, say)
                save()


def pair(bench: Bench, say: Say, save: Callable[[], None]) -> None:
    """Prefill and decode on one GPU, behind the router: does all of it work together."""
    specs = {system: pair_spec(bench, system, "pd") for system in SYSTEMS}
    with both(specs, say) as clusters:
        warm = [traces.Request(0.0, size, 16) for size in (32, 300, 1200, 100)]
        for cluster in clusters.values():
            send(cluster, warm, RELAXED_MS, RELAXED_MS, bench, abreast=2)
        rate = 4.0 if bench.dry else 10.0
        rows = prefill_rows(max(8, round(rate * bench.given.load_s)), bench, output=True)
        rows = traces.scale_rate(rows, rate)
        tpot = bench.given.tpot_ms or (75.0 if bench.dry else 25.0)
        for turn in range(bench.given.rounds):
            for system in bench.order(turn):
                if not bench.enough(say, 3 * bench.given.load_s):
                    return
                measure(clusters[system], rows, tpot, ("pd", system, turn), bench, say)
                save()


def identity(bench: Bench, say: Say, save: Callable[[], None]) -> None:
    """Greedy tokens of stock, of stock again, and of Kairos making random legal decisions.

    The second stock run is the control: what differs there differs by arithmetic, not by scheduling.
    """
    specs = {
        "stock": pair_spec(bench, "stock", "identity"),
        "kairos": pair_spec(bench, {"chaos_seed": 11}, "identity"),
    }
    jobs = identity_jobs(24 if bench.dry else 200, bench.given.seed)
    with both(specs, say) as clusters:
        first = run(ask_all(clusters["stock"].url, jobs, gap_s=0.05))
        again = run(ask_all(clusters["stock"].url, jobs, gap_s=0.02))
        chaos = run(ask_all(clusters["kairos"].url, jobs, gap_s=0.05))
        counters = {key: value["counters"] for key, value in reports(clusters["kairos"]).items()}
    for name, other in (("stock against stock", again), ("stock against chaos", chaos)):
        equal = sum(a is not None and a == b for a, b in zip(first, other, strict=True))
        bench.identity[name] = {"requests": len(jobs), "equal": equal}
        say(f"{name}: {equal} of {len(jobs)} equal")
    bench.identity["stock against chaos"] |= {
        "parked": counters["kairos_decode"].get("parked", 0),
        "pauses": counters["kairos_prefill"].get("pauses", 0),
    }
    save()


RUN: dict[str, Callable[[Bench, Say, Callable[[], None]], None]] = {
    "decode": decode,
    "prefill": prefill,
    "pd": pair,
    "identity": identity,
}


def pair_spec(bench: Bench, kairos: Any, name: str) -> ClusterSpec:
    """One prefill and one decode server and the router, small enough for two pairs on a GPU."""
    system = kairos if isinstance(kairos, str) else "kairos"
    changes: dict[str, Any] = {"name": name, "router": "kairos"}
    if not isinstance(kairos, str):
        changes["kairos"] = kairos
    if not bench.dry:
        changes["model_path"] = bench.model(bench.given.pd_layers)
        flags = [*bench.flags(), "--disaggregation-transfer-backend", bench.given.transfer]
        if name == "identity":
            # Real (random) weights whose tokens vary, and kernels that do not depend on the batch.
            changes["model_path"] = str(
                make_tiny_model(bench.given.out / "models" / "identity", IDENTITY)
            )
            flags[flags.index("--load-format") + 1] = "auto"
            flags += ["--dtype", "bfloat16", "--enable-deterministic-inference"]
        changes["server_args"] = flags
    elif name == "identity":
        changes["model_path"] = str(make_tiny_model(Path(bench.given.out) / "models" / "identity"))
    return bench.spec(system, **changes)


def measure(
    cluster: Cluster,
    rows: Sequence[traces.Request],
    tpot: float,
    who: tuple[str, str, int],
    bench: Bench,
    say: Say,
) -> None:
    """One run of a trace; its outcome joins `bench.runs`."""
    part, system, turn = who
    forget(cluster)
    before = scheduler_cpu_s(cluster)
    result = send(cluster, rows, bench.given.ttft_ms, tpot, bench)
    facts = {
        "part": part,
        "repeat": turn,
        "rate_rps": round(traces.rate_of(rows), 3),
        "slo": {"ttft_ms": bench.given.ttft_ms, "tpot_ms": tpot},
        "scheduler_cpu_s": round(scheduler_cpu_s(cluster) - before, 3),
        **reports(cluster),
    }
    for line in failures(result.outcomes):
        say(f"failed: {line}")
    say(f"{system}: {demo.summary(result)}")
    bench.runs.append(report.Run(system, result, facts))
    result.dump(bench.given.out / f"{part}-{turn}-{system}.jsonl")


def forget(cluster: Cluster, patience_s: float = 10.0) -> None:
    """Empties prefix caches; a server that still holds a request refuses for a moment."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return demo.forget(cluster)
        except urllib.error.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def measure_steady(clusters: dict[str, Cluster], bench: Bench, say: Say) -> None:
    """Step time and scheduler CPU at a constant batch with slack for all: what Kairos costs."""
    batches = (8,) if bench.dry else (1, 16, 64)
    steps = 48 if bench.dry else 256
    for turn in range(bench.given.rounds):
        for batch in batches:
            for system in bench.order(turn):
                cluster = clusters[system]
                before = scheduler_cpu_s(cluster)
                rows = [traces.Request(0.0, 200, steps)] * batch
                result = send(cluster, rows, RELAXED_MS, RELAXED_MS, bench, abreast=batch)
                cpu_s = scheduler_cpu_s(cluster) - before
                pace = cadence(result.outcomes)
                bench.steady.append(
                    {
                        "policy": system,
                        "batch": batch,
                        "repeat": turn,
                        "step_ms": None if pace is None else round(1e3 * pace, 4),
                        "scheduler_cpu_ms_per_step": round(1e3 * cpu_s / steps, 4),
                    }
                )
    for row in bench.steady[-2 * len(batches) :]:
        say(f"{row['policy']}, batch {row['batch']}: {row['step_ms']} ms a step")


def rehearse(cluster: Cluster, bench: Bench) -> None:
    """Many requests abreast, so that the step-time law is learnt over a range of batches."""
    for abreast in (4, 16) if bench.dry else (8, 32, 128):
        rows = decode_rows(abreast * (1 if bench.dry else 2), bench, seed=abreast)
        send(cluster, rows, RELAXED_MS, RELAXED_MS, bench, abreast=abreast)


def send(
    cluster: Cluster,
    rows: Sequence[traces.Request],
    ttft_ms: float,
    tpot_ms: float,
    bench: Bench,
    abreast: int | None = None,
) -> Result:
    """Sends the rows at their times, or `abreast` at once, and waits for the last answer."""
    alone = cluster.spec.router == "none"
    jobs = make_jobs(rows, ttft_ms, tpot_ms, seed=bench.given.seed, extra=ALONE if alone else None)
    timeout_s = max(30.0, min(120.0, bench.left_s()))
    going = replay(cluster.url, jobs, timeout_s=timeout_s, concurrency=abreast, check=cluster.check)
    result = run(going)
    if abreast is not None and any(not outcome.ok for outcome in result.outcomes):
        raise ClusterError(f"warming up or measuring failed: {failures(result.outcomes)[0]}")
    return result


def decode_rows(count: int, bench: Bench, seed: int = 0) -> list[traces.Request]:
    """A long tail of contexts and outputs, within the KV of a server."""
    median, most = (150.0, 2000) if bench.dry else (200.0, 8000)
    longest = 60 if bench.dry else 400
    return traces.long_tail(
        count,
        1.0,
        bench.given.seed + seed,
        median_input=median,
        max_input=most,
        median_output=20.0 if bench.dry else 80.0,
        max_output=longest,
    )


def kv_capacity(kv_tokens: int, rows: Sequence[traces.Request], tpot_ms: float) -> float:
    """Requests per second that fill the KV, when each keeps its tokens for its output at `tpot_ms`."""
    held = [row.output_tokens * (row.input_tokens + row.output_tokens / 2) for row in rows]
    return 0.9 * kv_tokens / (float(np.mean(held)) * tpot_ms / 1e3)


def prefill_rows(
    count: int, bench: Bench, seed: int = 0, output: bool = False
) -> list[traces.Request]:
    """A long tail of prompts; one output token each, or some when `output`."""
    median, most = (300.0, 3000) if bench.dry else (2000.0, 30_000)
    outputs = {"median_output": 16.0, "max_output": 32} if bench.dry else {}
    if not output:
        outputs = {"median_output": 1.0, "sigma_output": 0.0, "max_output": 1}
    return traces.long_tail(
        count, 1.0, bench.given.seed + seed, median_input=median, max_input=most, **outputs
    )  # type: ignore[arg-type]


def scheduler_cpu_s(cluster: Cluster) -> float:
    """CPU seconds that the schedulers of a cluster have used."""
    total = 0.0
    for part in cluster.parts:
        root = psutil.Process(part.process.pid)
        for process in (root, *root.children(recursive=True)):
            if "scheduler" in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def reports(cluster: Cluster) -> dict[str, Any]:
    """Kairos' own reports, without their latest single steps."""
    found = demo.kairos_reports(cluster)
    return {key: {k: v for k, v in one.items() if k != "steps"} for key, one in found.items()}


def identity_jobs(count: int, seed: int) -> list[dict[str, Any]]:
    """Greedy requests over a long tail of prompts, a third of them sharing a prefix."""
    source = Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        length = min(2000, max(8, int(source.lognormvariate(5.0, 1.2))))
        prompt = [source.randrange(10, 500) for _ in range(length)]
        if prompts and source.random() < 0.33:
            prompt = source.choice(prompts)[:500] + prompt[: max(8, length // 4)]
        prompts.append(prompt)
    return [
        {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 0,
                "ignore_eos": True,
                "max_new_tokens": source.randrange(4, 60),
            },
        }
        for prompt in prompts
    ]


async def ask_all(url: str, jobs: Sequence[dict[str, Any]], gap_s: float) -> list[list[int] | None]:
    """Output ids of each request, None where one failed; sent `gap_s` seconds apart."""
    timeout = aiohttp.ClientTimeout(total=180)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def ask(index: int, body: dict[str, Any]) -> list[int] | None:
            await asyncio.sleep(index * gap_s)
            async with session.post(url + "/generate", json=body) as answer:
                if answer.status != 200:
                    return None
                return list((await answer.json(content_type=None))["output_ids"])

        return await asyncio.gather(*(ask(i, job) for i, job in enumerate(jobs)))
