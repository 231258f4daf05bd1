"""Sends each request of a trace at its time, however slow the answers are (an open loop).

Times are the client's. Definitions are those of SGLang's ``benchmark/goodput.py``. TTFT runs from
the sending of a request to its first token. TPOT is (last token - first token) / (tokens - 1), 0
for one token. Attainment is the share of all sent requests that met the target; failed ones miss
it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
import orjson

from sglang_kairos.commands import parser_of
from sglang_kairos.loads import traces

T = TypeVar("T")

OK = "ok"
CHECK_EVERY_S = 1.0


@dataclass(slots=True)
class Outcome:
    """The outcome of one request. Times are seconds from the start of the run.

    `status` is ``ok``, ``http 429`` and the like, ``aborted`` (the server ended it early),
    ``timeout`` or ``error``. `first_token_s` and `last_token_s` are 0 when there was no token.
    `rid`: the id that the servers know it by, empty when no token came. `missed_by_tool`: targets
    (``ttft``, ``tpot``) that count as missed whatever the times, because the tool that sent it
    counts them so.
    """

    index: int
    planned_s: float
    sent_s: float
    input_tokens: int
    asked_tokens: int
    ttft_slo_ms: float
    tpot_slo_ms: float
    status: str = "error"
    error: str = ""
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    ended_s: float = 0.0
    output_tokens: int = 0
    itls_ms: list[float] = field(default_factory=list)
    rid: str = ""
    missed_by_tool: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == OK

    @property
    def ttft_ms(self) -> float:
        return (self.first_token_s - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        if self.output_tokens <= 1:
            return 0.0
        return (self.last_token_s - self.first_token_s) * 1e3 / (self.output_tokens - 1)

    @property
    def waited_ms(self) -> float:
        """Returns the time to the first token, or to the end of a request that never had one."""
        return ((self.first_token_s if self.output_tokens else self.ended_s) - self.sent_s) * 1e3

    @property
    def met_ttft(self) -> bool:
        return self.ok and self._met("ttft", self.ttft_ms, self.ttft_slo_ms)

    @property
    def met_tpot(self) -> bool:
        return self.ok and self._met("tpot", self.tpot_ms, self.tpot_slo_ms)

    def _met(self, name: str, took_ms: float, slo_ms: float) -> bool:
        return took_ms <= slo_ms and (name not in self.missed_by_tool or math.isinf(slo_ms))


@dataclass(frozen=True)
class Metrics:
    """One run in numbers. Attainments are fractions of `sent`; percentiles are of answered requests.

    A percentile is None when nothing was answered.
    """

    ttft_attainment: float
    tpot_attainment: float
    e2e_attainment: float
    goodput_rps: float
    decode_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    tpot_p99_ms: float | None
    longest_wait_ms: float
    sent: int
    failed: int


def measure(outcomes: Sequence[Outcome], duration_s: float) -> Metrics:
    """Returns the metrics of a run that took `duration_s` from its start to its last answer."""
    answered = [outcome for outcome in outcomes if outcome.ok]
    ttfts = [outcome.ttft_ms for outcome in answered]
    tpots = [outcome.tpot_ms for outcome in answered if outcome.output_tokens > 1]
    both = sum(outcome.met_ttft and outcome.met_tpot for outcome in outcomes)
    sent = len(outcomes)

    def percentile(values: list[float], share: float) -> float | None:
        return float(np.percentile(values, share)) if values else None

    return Metrics(
        ttft_attainment=sum(outcome.met_ttft for outcome in outcomes) / max(1, sent),
        tpot_attainment=sum(outcome.met_tpot for outcome in outcomes) / max(1, sent),
        e2e_attainment=both / max(1, sent),
        goodput_rps=both / duration_s if duration_s > 0 else 0.0,
        decode_tokens_per_s=(
            sum(outcome.output_tokens for outcome in answered) / duration_s
            if duration_s > 0
            else 0.0
        ),
        ttft_p50_ms=percentile(ttfts, 50),
        ttft_p99_ms=percentile(ttfts, 99),
        tpot_p99_ms=percentile(tpots, 99),
        longest_wait_ms=max((outcome.waited_ms for outcome in outcomes), default=0.0),
        sent=sent,
        failed=sent - len(answered),
    )


@dataclass(frozen=True)
class Result:
    """The outcomes of a run, in order of sending, and its length in seconds.

    `started_s`: its start by ``time.perf_counter``; 0 when that is not known.
    """

    outcomes: list[Outcome]
    duration_s: float
    started_s: float = field(default=0.0, kw_only=True)

    @property
    def metrics(self) -> Metrics:
        return measure(self.outcomes, self.duration_s)

    @property
    def lag_ms(self) -> float:
        """Returns the most that the driver itself was late in sending; large: it was overloaded."""
        return max((o.sent_s - o.planned_s for o in self.outcomes), default=0.0) * 1e3

    def dump(self, path: Path) -> None:
        """Writes one JSON line per request."""
        with path.open("w", encoding="utf-8") as file:
            for outcome in self.outcomes:
                file.write(json.dumps(asdict(outcome)) + "\n")


def is_dump(path: Path) -> bool:
    """Returns whether `Result.dump` wrote the file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next(file, "")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and {"planned_s", "sent_s", "status"} <= row.keys()


def load(path: Path) -> Result:
    """Reads what `Result.dump` wrote. Raises ValueError, which names the line."""
    outcomes: list[Outcome] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                outcomes.append(Outcome(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number}: {error}") from None
    return Result(outcomes, max((outcome.ended_s for outcome in outcomes), default=0.0))


@dataclass(frozen=True)
class Job:
    """One request ready to go: its row, its SLO and the encoded body."""

    row: traces.Request
    ttft_ms: float
    tpot_ms: float
    body: bytes


def make_jobs(
    rows: Sequence[traces.Request],
    ttft_ms: float | Callable[[traces.Request], float],
    tpot_ms: float | Callable[[traces.Request], float],
    *,
    seed: int = 0,
    vocab: int = 1000,
    extra: dict[str, Any] | None = None,
) -> list[Job]:
    """Returns the jobs of a trace, encoded beforehand so that the run itself costs little.

    Targets are milliseconds, for all requests alike or by row. Prompts take token ids below
    `vocab`. `extra` joins every body.
    """
    jobs = []
    for row, ids in zip(rows, traces.prompts(rows, seed, min(100, vocab // 2), vocab), strict=True):
        ttft = ttft_ms(row) if callable(ttft_ms) else ttft_ms
        tpot = tpot_ms(row) if callable(tpot_ms) else tpot_ms
        body = {
            "input_ids": ids,
            "sampling_params": {
                "max_new_tokens": row.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
            },
            "stream": True,
            "ttft_ms": ttft,
            "tpot_ms": tpot,
            **(extra or {}),
        }
        jobs.append(Job(row, ttft, tpot, orjson.dumps(body)))
    return jobs


async def replay(
    url: str,
    jobs: Sequence[Job],
    *,
    timeout_s: float = 120.0,
    concurrency: int | None = None,
    check: Callable[[], None] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
    headers: dict[str, str] | None = None,
) -> Result:
    """Sends every job at its arrival time to ``url/generate`` and waits for all answers.

    A request still unanswered after `timeout_s` seconds has failed, so a run is bounded. With
    `concurrency` the loop is closed instead: arrival times are ignored, and that many requests are
    in flight. `check` runs every second and ends the run by raising. `progress(sent, done, all)` is
    called then too.
    """
    limit = asyncio.Semaphore(concurrency) if concurrency else None
    outcomes: list[Outcome] = []
    tasks: list[asyncio.Task[None]] = []
    # A server may close a reused connection just as we write. That would count as a failed request.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=2**20
    ) as session:
        start = time.perf_counter()

        async def one(outcome: Outcome, job: Job) -> None:
            try:
                await _send(session, url + "/generate", job.body, outcome, start)
            finally:
                outcome.ended_s = time.perf_counter() - start
                if limit is not None:
                    limit.release()

        async def send_all() -> None:
            for index, job in enumerate(jobs):
                if limit is not None:
                    await limit.acquire()
                else:
                    await asyncio.sleep(start + job.row.arrival_s - time.perf_counter())
                now = time.perf_counter() - start
                outcome = Outcome(
                    index,
                    job.row.arrival_s if limit is None else now,
                    now,
                    job.row.input_tokens,
                    job.row.output_tokens,
                    job.ttft_ms,
                    job.tpot_ms,
                )
                outcomes.append(outcome)
                tasks.append(asyncio.create_task(one(outcome, job)))
            await asyncio.gather(*tasks)

        async def watch() -> None:
            while True:
                await asyncio.sleep(CHECK_EVERY_S)
                if check is not None:
                    await asyncio.to_thread(check)
                if progress is not None:
                    progress(len(tasks), sum(task.done() for task in tasks), len(jobs))

        watcher = asyncio.create_task(watch())
        sender = asyncio.create_task(send_all())
        try:
            await asyncio.wait((watcher, sender), return_when=asyncio.FIRST_COMPLETED)
            (watcher if watcher.done() else sender).result()
            duration_s = time.perf_counter() - start
        finally:
            everything = [watcher, sender, *tasks]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
    return Result(outcomes, duration_s, started_s=start)


async def _send(
    session: aiohttp.ClientSession, url: str, body: bytes, outcome: Outcome, start: float
) -> None:
    """Sends one request and follows its stream, writing into `outcome`."""
    outcome.sent_s = time.perf_counter() - start
    try:
        async with session.post(
            url, data=body, headers={"Content-Type": "application/json"}
        ) as response:
            if response.status != 200:
                outcome.status = f"http {response.status}"
                outcome.error = (await response.text(errors="replace"))[:500]
                return
            pending = b""
            async for data in response.content.iter_any():
                now = time.perf_counter() - start
                *events, pending = (pending + data).split(b"\n\n")
                for event in events:
                    _take_event(event, now, outcome)
    except TimeoutError:
        outcome.status, outcome.error = "timeout", "no complete answer in time"
        return
    except (aiohttp.ClientError, OSError, ValueError) as error:
        outcome.status, outcome.error = "error", f"{type(error).__name__}: {error}"[:500]
        return
    if outcome.ok and outcome.output_tokens == 0:
        outcome.status, outcome.error = "error", "the answer has no token"
    elif outcome.status == "error" and not outcome.error:
        outcome.error = "the stream ended early"


def _take_event(event: bytes, now: float, outcome: Outcome) -> None:
    payload = event.strip().removeprefix(b"data:").strip()
    if not payload.startswith(b"{"):
        return
    chunk = orjson.loads(payload)
    meta = chunk.get("meta_info") or {}
    if "error" in chunk:
        outcome.status, outcome.error = "error", str(chunk["error"])[:500]
        return
    fresh = meta.get("completion_tokens", 0) - outcome.output_tokens
    if fresh > 0:
        if outcome.output_tokens:
            gap_ms = (now - outcome.last_token_s) * 1e3
            outcome.itls_ms += [round(gap_ms / fresh, 3)] * fresh
        else:
            outcome.first_token_s = now
            outcome.rid = str(meta.get("id", ""))
        outcome.last_token_s = now
        outcome.output_tokens += fresh
    reason = meta.get("finish_reason")
    if reason is not None:
        kind = reason.get("type") if isinstance(reason, dict) else reason
        if kind == "abort":
            outcome.status = "aborted"
            outcome.error = str(reason.get("message") if isinstance(reason, dict) else reason)[:500]
        else:
            outcome.status = OK


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs like `asyncio.run`, on uvloop if it is installed: the driver shares cores with servers."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``kairos replay``."""
    parser = parser_of(
        "replay",
        description="Send each request of a trace at its time, however slow the answers are, and "
        "print the run's metrics as JSON.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="a server or a router")
    parser.add_argument(
        "--trace", type=Path, help="trace file, see docs/simulator.md (default: a made long tail)"
    )
    traces.add_reading_options(parser)
    parser.add_argument("--requests", type=int, default=100, help="most requests to send")
    parser.add_argument(
        "--rate", type=float, help="requests/s (default: the trace's own; 4 for a long tail)"
    )
    parser.add_argument("--max-input", type=int, default=16_000, help="longest prompt, tokens")
    parser.add_argument("--max-output", type=int, default=400, help="longest answer, tokens")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="TTFT target, ms")
    parser.add_argument("--tpot-ms", type=float, default=100.0, help="TPOT target, ms")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="limit of one request"
    )
    parser.add_argument("--vocab", type=int, default=1000, help="prompts use token ids below this")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and of a long tail")
    parser.add_argument("--out", type=Path, help="write one JSON line per request here")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Replays a trace against a running server or router. Returns the exit status."""
    given = build_parser().parse_args(argv)
    try:
        if given.trace:
            rows = traces.window(
                traces.read_trace(given.trace, given.block_tokens, given.time_unit),
                n=given.requests,
            )
            rows = traces.scale_rate(rows, given.rate) if given.rate else rows
        else:
            rows = traces.long_tail(given.requests, given.rate or 4.0, given.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = traces.cap_lengths(rows, given.max_input, given.max_output)
    jobs = make_jobs(rows, given.ttft_ms, given.tpot_ms, seed=given.seed, vocab=given.vocab)
    result = run(replay(given.url.rstrip("/"), jobs, timeout_s=given.timeout, progress=_progress()))
    if given.out:
        result.dump(given.out)
    print(json.dumps(asdict(result.metrics), indent=2))
    for text in failures(result.outcomes):
        print(text, file=sys.stderr)
    return 0


def _progress(every: int = 5) -> Callable[[int, int, int], None]:
    ticks = iter(range(1, 10**9))

    def show(sent: int, done: int, total: int) -> None:
        if next(ticks) % every == 0:
            print(f"sent {sent}/{total}, answered {done}", file=sys.stderr, flush=True)

    return show


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """Returns one line per kind of failure, with an example."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if not outcome.ok:
            kinds.setdefault(outcome.status, []).append(outcome)
    return [f"{len(some)} × {kind}: e.g. {some[0].error}" for kind, some in kinds.items()]


if __name__ == "__main__":
    sys.exit(main())
