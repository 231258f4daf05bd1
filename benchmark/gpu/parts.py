"""The parts of the GPU benchmark: decode alone, prefill alone, a pair, and identity."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import aiohttp
import numpy as np

from benchmark.gpu.session import SYSTEMS, GpuSession, own_reports
from benchmark.harness.driver import RELAXED_MS
from benchmark.harness.servers import cpu_s, schedulers
from sglang_kairos.calibrate.server import cadence
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import run
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.predict.online_prefill import PrefillTimeModel

STEPS_OF_BATCH_1 = 1.6  # the TPOT target, in steps of a batch of one: steps bind before the KV does
TINY_TPOT_MS = 30.0
DRY_MOST_RPS, MOST_RPS = 30.0, 400.0
MIXED = (32, 300, 1200, 100)


def decode(session: GpuSession) -> None:
    """Runs a decode server of each system, with made-up KV."""
    given, dry = session.given, session.dry
    fake = ["--disaggregation-transfer-backend", "fake"]
    specs = {name: session.spec("decode", name, prefill=0, decode_args=fake) for name in SYSTEMS}
    with session.both(specs) as clusters:
        session.warm(clusters, MIXED, 16, abreast=2)
        # Many requests abreast, so that the step-time law is learnt over a range of batches.
        for abreast in (4, 16) if dry else (8, 32, 128):
            rows = decode_rows(abreast * (1 if dry else 2), session, seed=abreast)
            session.send(clusters["kairos"], rows, abreast=abreast)
        law = own_reports(clusters["kairos"])["kairos_decode"]["decode"]
        measure_steady(clusters, session)
        session.save()
        alone_ms = 1e3 * DecodeLatency.from_json(law).step_s(1, 500.0)
        tpot = given.tpot_ms or (TINY_TPOT_MS if dry else STEPS_OF_BATCH_1 * alone_ms)
        rows = decode_rows(400 if dry else 4000, session)
        capacity = min(capacity_of(law, rows, tpot), kv_capacity(given.kv_tokens, rows, tpot))
        rate = min(given.load * capacity, DRY_MOST_RPS if dry else MOST_RPS)
        rows = traces.scale_rate(rows[: max(8, round(rate * given.load_s))], rate)
        session.say(f"{len(rows)} requests at {rate:.1f} req/s, TPOT {tpot:.1f} ms")
        session.alternate("decode", clusters, rows, tpot)


def prefill(session: GpuSession) -> None:
    """Runs a prefill server of each system; every request ends with its first token."""
    given, dry = session.given, session.dry
    more = [] if dry else ["--disaggregation-transfer-backend", given.transfer]
    specs = {name: session.spec("prefill", name, decode=0, prefill_args=more) for name in SYSTEMS}
    with session.both(specs) as clusters:
        sizes = (32, 300, 1200, 2500) if dry else (32, 300, 1200, 6000, 16_000, 600, 100)
        session.warm(clusters, sizes, 1, abreast=1)
        sample = prefill_rows(30 if dry else 100, session, seed=1)
        session.send(clusters["kairos"], sample, abreast=2)
        law = own_reports(clusters["kairos"])["kairos_prefill"]["prefill"]
        model = PrefillTimeModel(*PrefillLatency.from_json(law))
        rows = prefill_rows(200 if dry else 4000, session)
        tokens = np.array([row.input_tokens for row in rows], float)
        total = np.cumsum(model.remaining_s(tokens, np.zeros_like(tokens), 512 if dry else 8192))
        # Above capacity the queue only grows: no order helps for long.
        load = min(0.9, given.load)
        count = max(8, min(len(rows), int(np.searchsorted(total, load * given.load_s))))
        rate = load * count / float(total[count - 1])
        rows = traces.scale_rate(rows[:count], rate)
        share = f"{100 * load:.0f} % of the capacity found"
        session.say(f"{count} prompts at {rate:.1f} req/s: {share}")
        session.alternate("prefill", clusters, rows, RELAXED_MS)


def pair(session: GpuSession) -> None:
    """Runs prefill and decode on one GPU, behind the router: does all of it work together."""
    given, dry = session.given, session.dry
    with session.both({name: session.pair_spec("pd", name) for name in SYSTEMS}) as clusters:
        session.warm(clusters, MIXED, 16, abreast=2)
        rate = 4.0 if dry else 10.0
        rows = prefill_rows(max(8, round(rate * given.load_s)), session, output=True)
        tpot = given.tpot_ms or (75.0 if dry else 25.0)
        session.alternate("pd", clusters, traces.scale_rate(rows, rate), tpot)


def identity(session: GpuSession) -> None:
    """Compares greedy tokens of stock, of stock again, and of Kairos with random legal decisions.

    The second stock run is the control: what differs there differs by arithmetic, not by scheduling.
    """
    chaos_seed = {"chaos_seed": 11}
    specs = {
        "stock": session.pair_spec("identity", "stock"),
        "kairos": session.pair_spec("identity", "kairos", chaos_seed),
    }
    jobs = identity_jobs(24 if session.dry else 200, session.given.seed)
    with session.both(specs) as clusters:
        first = run(ask_all(clusters["stock"].url, jobs, gap_s=0.05))
        again = run(ask_all(clusters["stock"].url, jobs, gap_s=0.02))
        chaos = run(ask_all(clusters["kairos"].url, jobs, gap_s=0.05))
        told = own_reports(clusters["kairos"])
    for name, other in (("stock against stock", again), ("stock against chaos", chaos)):
        equal = sum(a is not None and a == b for a, b in zip(first, other, strict=True))
        session.identity[name] = {"requests": len(jobs), "equal": equal}
        session.say(f"{name}: {equal} of {len(jobs)} equal")
    session.identity["stock against chaos"] |= {
        "parked": told["kairos_decode"]["counters"].get("parked", 0),
        "pauses": told["kairos_prefill"]["counters"].get("pauses", 0),
    }
    session.save()


RUN: dict[str, Callable[[GpuSession], None]] = {
    "decode": decode,
    "prefill": prefill,
    "pd": pair,
    "identity": identity,
}


def measure_steady(clusters: dict[str, Cluster], session: GpuSession) -> None:
    """Notes step time and scheduler CPU at a constant batch with slack for all: what Kairos costs."""
    batches = (8,) if session.dry else (1, 16, 64)
    steps = 48 if session.dry else 256
    for batch in batches:
        rows = [traces.Request(0.0, 200, steps)] * batch
        for turn, system in session.turns():
            cluster = clusters[system]
            before = cpu_s(schedulers(cluster))
            result = session.send(cluster, rows, abreast=batch)
            used_s = cpu_s(schedulers(cluster)) - before
            pace = cadence(result.outcomes)
            row = {
                "policy": system,
                "batch": batch,
                "repeat": turn,
                "step_ms": None if pace is None else round(1e3 * pace, 4),
                "scheduler_cpu_ms_per_step": round(1e3 * used_s / steps, 4),
            }
            session.steady.append(row)
            session.say(f"{system}, batch {batch}: {row['step_ms']} ms a step")


def capacity_of(report: Mapping[str, Any], rows: Sequence[traces.Request], tpot_ms: float) -> float:
    """Returns requests per second whose steps, all of them in each, last just `tpot_ms`.

    `report`: a `predict.latency_model.DecodeLatency` as a server reports it.
    As good as the law at that batch: it should have been learnt with about as many abreast.
    """
    outputs = np.array([row.output_tokens for row in rows], float)
    contexts = np.array([row.input_tokens for row in rows], float) + outputs / 2
    context = float((contexts * outputs).sum() / outputs.sum())
    law, target = DecodeLatency.from_json(report), tpot_ms / 1e3
    sizes = range(1, 4096)
    abreast = max(1, bisect_right(sizes, target, key=lambda size: law.step_s(size, size * context)))
    return abreast / (target * float(outputs.mean()))


def kv_capacity(kv_tokens: int, rows: Sequence[traces.Request], tpot_ms: float) -> float:
    """Returns requests per second that fill the KV, each kept for its output at `tpot_ms`."""
    held = [row.output_tokens * (row.input_tokens + row.output_tokens / 2) for row in rows]
    return 0.9 * kv_tokens / (float(np.mean(held)) * tpot_ms / 1e3)


def decode_rows(count: int, session: GpuSession, seed: int = 0) -> list[traces.Request]:
    """Returns a long tail of contexts and outputs, within the KV of a server."""
    tail: dict[str, Any] = {"median_input": 200.0, "max_input": 8000}
    tail |= {"median_output": 80.0, "max_output": 400}
    if session.dry:
        tail = {"median_input": 150.0, "max_input": 2000, "median_output": 20.0, "max_output": 60}
    return traces.long_tail(count, 1.0, session.given.seed + seed, **tail)


def prefill_rows(
    count: int, session: GpuSession, seed: int = 0, output: bool = False
) -> list[traces.Request]:
    """Returns a long tail of prompts; one output token each, or some when `output`."""
    median, most = (300.0, 3000) if session.dry else (2000.0, 30_000)
    tail: dict[str, Any] = {"median_input": median, "max_input": most}
    if not output:
        tail |= {"median_output": 1.0, "sigma_output": 0.0, "max_output": 1}
    elif session.dry:
        tail |= {"median_output": 16.0, "max_output": 32}
    return traces.long_tail(count, 1.0, session.given.seed + seed, **tail)


def identity_jobs(count: int, seed: int) -> list[dict[str, Any]]:
    """Returns greedy requests over a long tail of prompts, a third of them sharing a prefix."""
    source = Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        length = min(2000, max(8, int(source.lognormvariate(5.0, 1.2))))
        prompt = [source.randrange(10, 500) for _ in range(length)]
        if prompts and source.random() < 0.33:
            prompt = source.choice(prompts)[:500] + prompt[: max(8, length // 4)]
        prompts.append(prompt)
    greedy = {"temperature": 0, "ignore_eos": True}
    return [
        {
            "input_ids": prompt,
            "sampling_params": {**greedy, "max_new_tokens": source.randrange(4, 60)},
        }
        for prompt in prompts
    ]


async def ask_all(url: str, jobs: Sequence[dict[str, Any]], gap_s: float) -> list[list[int] | None]:
    """Returns output ids of each request, None where one failed; sent `gap_s` seconds apart."""
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
