"""Drives a prefill/decode pair directly (no router), collects output tokens, aborts some requests."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from sglang_kairos.cluster.run import Cluster, ClusterSpec

T = TypeVar("T")
Counters = Counter[str]
Enough = Callable[[Counters, Counters], bool]

# Times the step of one request: enough for some while prefill runs beside it, too short for a crowd.
CONTESTED = 3.0


def once(prefill: Counters, decode: Counters) -> bool:
    """One round is enough."""
    return True


@dataclass(frozen=True)
class Job:
    """One greedy request: when it is sent (s), its prompt, how many tokens it wants.

    `abort_after_s` after sending, or after its first token when `decoding`, it is aborted.
    `tpot_ms`: its target, if not the server's.
    """

    at_s: float
    prompt: list[int]
    tokens: int
    abort_after_s: float | None = None
    decoding: bool = False
    tpot_ms: float | None = None


def long_tail_jobs(count: int, seed: int, rate: float = 20.0) -> list[Job]:
    """Lognormal prompt lengths up to 3,000 tokens; a third shares a prefix with an earlier one."""
    rng = random.Random(seed)
    jobs: list[Job] = []
    at_s = 0.0
    for _ in range(count):
        length = min(3000, max(8, int(rng.lognormvariate(5.4, 1.2))))
        prompt = [rng.randrange(10, 500) for _ in range(length)]
        if jobs and rng.random() < 0.33:
            shared = rng.choice(jobs).prompt
            prompt = shared[: rng.randrange(1, len(shared) + 1)] + prompt[: max(8, length // 4)]
        jobs.append(Job(at_s, prompt, rng.randrange(4, 80)))
        at_s += rng.expovariate(rate)
    return jobs


def doomed_jobs(prefilling: int, decoding: int, seed: int, span_s: float) -> list[Job]:
    """Requests that will be aborted, some in their long prefill, some while they decode."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, 500) for _ in range(length)]

    return [
        Job(rng.uniform(0.0, span_s), prompt(4500), 8, rng.uniform(0.3, 8.0))
        for _ in range(prefilling)
    ] + [
        Job(rng.uniform(0.0, span_s), prompt(20), 1500, rng.uniform(0.05, 1.0), decoding=True)
        for _ in range(decoding)
    ]


class PdClient:
    """Talks to the first prefill and decode server of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.prefill, self.decode = cluster.prefill_urls[0], cluster.decode_urls[0]
        self.bootstrap_port = cluster.bootstrap_ports[0]
        self._rooms = random.Random()

    def run(self, jobs: list[Job], timeout_s: float = 120.0) -> list[tuple[int, Any]]:
        """Sends every job at its time; returns (status, output token ids or error) per job."""
        return asyncio.run(self._run(jobs, timeout_s))

    def run_until(
        self, jobs: list[Job], enough: Enough, rounds: int = 4
    ) -> list[list[tuple[int, Any]]]:
        """Sends the load, again from empty caches while the counters do not show enough of it.

        How often anybody is paused or parked depends on how requests overlap, hence on the machine.
        Returns what `run` does, per round; `enough` is asked of the prefill and the decode server.
        """
        answers = [self.run(jobs)]
        while len(answers) < rounds and self.settles():
            prefill, decode = (report.get("counters", {}) for report in self.kairos())
            if enough(Counter(prefill), Counter(decode)):
                break
            answers.append(self.run(jobs))
        return answers

    async def _run(self, jobs: list[Job], timeout_s: float) -> list[tuple[int, Any]]:
        limits = aiohttp.ClientTimeout(total=timeout_s)
        # SGLang closes idle connections after 5 s: on a slow machine a reused one is closed as we write.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:
            return list(await asyncio.gather(*(self._one(session, job) for job in jobs)))

    async def _one(self, session: aiohttp.ClientSession, job: Job) -> tuple[int, Any]:
        await asyncio.sleep(job.at_s)
        rid = f"job{self._rooms.getrandbits(60)}"
        body = {
            "rid": rid,
            "input_ids": job.prompt,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": job.tokens,
                "ignore_eos": True,
            },
            "stream": job.decoding,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.bootstrap_port,
            "bootstrap_room": self._rooms.getrandbits(62),
        }
        if job.tpot_ms is not None:
            body["tpot_ms"] = job.tpot_ms

        decodes = asyncio.Event()

        async def post(url: str, path: str, content: Any) -> tuple[int, Any]:
            async with session.post(url + path, json=content) as response:
                if not job.decoding:
                    return response.status, await response.json(content_type=None)
                async for _ in response.content:
                    if url == self.decode:
                        decodes.set()
                return response.status, {}

        async def abort(url: str, answering: asyncio.Task[tuple[int, Any]]) -> None:
            if job.decoding:
                await decodes.wait()
            await asyncio.sleep(job.abort_after_s or 0.0)
            # An abort that overtakes its request is lost, and SGLang then waits for a hand-shake.
            while not answering.done():
                async with session.post(url + "/abort_request", json={"rid": rid}) as response:
                    await response.read()
                await asyncio.wait([answering], timeout=0.5)

        both = [
            asyncio.create_task(post(url, "/generate", body)) for url in (self.prefill, self.decode)
        ]
        if job.abort_after_s is not None:
            await asyncio.gather(*map(abort, (self.prefill, self.decode), both))
        _, (status, answer) = await asyncio.gather(*both)
        return status, answer.get("output_ids") if status == 200 else answer

    def contested_tpot_ms(self) -> float:
        """A TPOT target that one request alone meets here and now, and a crowd does not.

        A fixed one would be out of everybody's reach on a slow machine, and nobody be parked for it.
        """
        few, many, prompt = 4, 44, list(range(10, 74))
        alone_ms = []
        for _ in range(5):
            started = time.monotonic()
            self.run([Job(0.0, prompt, few)])
            between = time.monotonic()
            self.run([Job(0.0, prompt, many)])
            longer_s = time.monotonic() - between - (between - started)
            alone_ms.append(1e3 * longer_s / (many - few))
        return CONTESTED * statistics.median(alone_ms)

    def kairos(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Kairos' own report of the prefill and the decode server."""
        return asyncio.run(self._kairos())

    async def _kairos(self) -> tuple[dict[str, Any], dict[str, Any]]:
        reports = []
        async with aiohttp.ClientSession() as session:
            for url in (self.prefill, self.decode):
                async with session.get(url + "/server_info") as response:
                    state = (await response.json())["internal_states"][0]
                    reports.append(state.get("kairos", {}))
        return reports[0], reports[1]

    def settles(self, timeout_s: float = 60.0) -> bool:
        """Whether both servers become idle: a cache flush is refused while anything is held."""
        return asyncio.run(self._settles(timeout_s))

    async def _settles(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        async with aiohttp.ClientSession() as session:
            for url in (self.prefill, self.decode):
                while True:
                    async with session.post(url + "/flush_cache") as response:
                        if response.status == 200:
                            break
                    if time.monotonic() > deadline:
                        return False
                    await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # the idle check runs in the scheduler's next idle pass
        return True


TROUBLE = re.compile(r"hit an exception|AssertionError|memory leak|Traceback.*Scheduler", re.I)


def rounds_of(
    spec: ClusterSpec, jobs: list[Job], enough: Enough
) -> tuple[list[list[tuple[int, Any]]], dict[str, Any], dict[str, Any]]:
    """`run_until` on a pair of its own, which must settle without trouble; then its two reports."""
    with Cluster(spec) as cluster:
        client = PdClient(cluster)
        rounds = client.run_until(jobs, enough)
        assert client.settles(), "a server did not become idle after the last request"
        assert not trouble_in(cluster.logs)
        return rounds, *client.kairos()


# What a prefill server's log says when stock SGLang has lost a request, or all of them, to a race of
# its own threads (docs/upstream.md). The second line also comes from a request that is aborted early.
LOST = ("Transfer thread failed because of", "Prefill bootstrap failed")


def again_if_stock_lost_one(log_dir: Path | str | None, run: Callable[[], T]) -> T:
    """`run()`, which starts a stock pair that logs to `log_dir`; once more if it lost a request."""
    try:
        return run()
    except TimeoutError:  # of a request that stock had two minutes for
        return run()
    except AssertionError:
        logs = (path.read_text(errors="replace") for path in Path(log_dir or "").glob("p0*"))
        if not any(line in log for log in logs for line in LOST):
            raise
        return run()


def stock_outputs(spec: ClusterSpec, jobs: list[Job]) -> list[tuple[int, Any]]:
    """One round on stock SGLang, whose every answer is a 200."""
    spec = dataclasses.replace(spec, kairos=False)

    def run() -> list[tuple[int, Any]]:
        (outputs,), prefill, decode = rounds_of(spec, jobs, once)
        assert prefill == decode == {}, "Kairos must not be there when it is off"
        assert all(status == 200 for status, _ in outputs)
        return outputs

    return again_if_stock_lost_one(spec.log_dir, run)


def trouble_in(logs: dict[str, Path]) -> list[str]:
    """Lines of the servers' logs that speak of a crash or a leak."""
    return [
        f"{name}: {line[:300]}"
        for name, path in logs.items()
        for line in path.read_text(errors="replace").splitlines()
        if TROUBLE.search(line) and "server_args=" not in line
    ]
