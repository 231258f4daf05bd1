"""The open-loop driver against small servers that stream what SGLang streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from helpers.timing import once_undisturbed, promptly
from helpers.upstream import upstream_goodput
from sglang_kairos.loads.replay import (
    Job,
    Outcome,
    Result,
    failures,
    load,
    main,
    make_jobs,
    measure,
    replay,
    run,
)
from sglang_kairos.loads.traces import Request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def event(tokens: int, reason: dict[str, Any] | None = None) -> bytes:
    meta = {"completion_tokens": tokens, "finish_reason": reason}
    return b"data: " + json.dumps({"text": "x" * tokens, "meta_info": meta}).encode() + b"\n\n"


LENGTH = {"type": "length", "length": 1}


async def stream(request: web.Request, chunks: list[bytes | float]) -> web.StreamResponse:
    """Sends the bytes, sleeping the seconds in between."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        if isinstance(chunk, float):
            await asyncio.sleep(chunk)
        else:
            await response.write(chunk)
    await response.write_eof()
    return response


def drive(handler: Handler, jobs: list[Job], **options: Any) -> Result:
    async def body() -> Result:
        async with serving(handler) as url:
            return await replay(url, jobs, **options)

    return run(body())


def jobs_at(*arrivals: float, tokens: int = 3) -> list[Job]:
    return make_jobs([Request(at, 5, tokens) for at in arrivals], 1000.0, 100.0)


def one(chunks: list[bytes | float]) -> Outcome:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, chunks)

    return drive(handler, jobs_at(0.0)).outcomes[0]


def test_times_are_those_of_the_first_and_the_last_token() -> None:
    sent = [0.1, event(1), 0.1, event(2), 0.1, event(4), event(4, LENGTH), b"data: [DONE]\n\n"]

    def exactly() -> None:
        outcome = one(sent)
        assert outcome.ttft_ms == pytest.approx(100, abs=60)
        assert outcome.tpot_ms == pytest.approx(200 / 3, abs=30)
        assert outcome.itls_ms[1] == pytest.approx(50, abs=25)

    outcome = one(sent)
    assert (outcome.status, outcome.error, outcome.output_tokens) == ("ok", "", 4)
    # Two tokens in one event share its gap.
    assert len(outcome.itls_ms) == 3 and outcome.itls_ms[1] == outcome.itls_ms[2]
    assert sum(outcome.itls_ms) == pytest.approx(outcome.tpot_ms * 3, abs=0.01)
    once_undisturbed(exactly, AssertionError)


def test_an_outcome_can_be_found_in_the_servers_records() -> None:
    meta = {"id": "abc", "completion_tokens": 1, "finish_reason": LENGTH}
    chunk = b"data: " + json.dumps({"meta_info": meta}).encode() + b"\n\n"

    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [chunk])

    before_s = time.perf_counter()
    result = drive(handler, jobs_at(0.0))
    assert result.outcomes[0].rid == "abc"
    assert before_s < result.started_s < time.perf_counter() - result.duration_s + 1e-3
    assert one([event(1, LENGTH)]).rid == ""


def test_events_may_be_cut_anywhere() -> None:
    whole = event(1) + event(2) + event(3, LENGTH) + b"data: [DONE]\n\n"
    cuts: list[bytes | float] = []
    for at in range(0, len(whole), 17):
        cuts += [whole[at : at + 17], 0.001]
    assert one(cuts).output_tokens == 3


def test_one_token_has_no_interval() -> None:
    outcome = one([event(1, LENGTH)])
    assert (outcome.ok, outcome.tpot_ms, outcome.itls_ms) == (True, 0.0, [])


def test_the_body_asks_for_exactly_the_row() -> None:
    seen: list[Any] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(await request.json())
        return await stream(request, [event(1, LENGTH)])

    rows = [Request(0.0, 5, 7)]
    result = drive(handler, make_jobs(rows, lambda row: row.input_tokens * 10.0, 40.0, vocab=50))
    assert len(seen[0]["input_ids"]) == 5
    assert all(25 <= token < 50 for token in seen[0]["input_ids"])
    assert seen[0]["sampling_params"] == {"max_new_tokens": 7, "ignore_eos": True, "temperature": 0}
    assert (seen[0]["stream"], seen[0]["ttft_ms"], seen[0]["tpot_ms"]) == (True, 50.0, 40.0)
    assert result.outcomes[0].ttft_slo_ms == 50.0


def test_the_loop_is_open() -> None:
    """Requests leave at their times although none is answered meanwhile."""
    there = [0]

    async def handler(request: web.Request) -> web.StreamResponse:
        there[0] += 1
        while there[0] % 3:  # nobody is answered before all three are there
            await asyncio.sleep(0.005)
        return await stream(request, [event(1, LENGTH)])

    def in_time() -> None:
        result = drive(handler, jobs_at(0.0, 0.1, 0.2))
        sent_s = [o.sent_s for o in result.outcomes]
        assert [o.ok for o in result.outcomes] == [True] * 3
        assert all(at >= planned for at, planned in zip(sent_s, (0.0, 0.1, 0.2), strict=True))
        assert sent_s == pytest.approx([0.0, 0.1, 0.2], abs=0.08)
        assert 0.2 <= result.duration_s < 0.6 and result.lag_ms < 80

    once_undisturbed(in_time, AssertionError)


def test_closed_loop_keeps_that_many_in_flight() -> None:
    state = SimpleNamespace(now=0, most=0)

    async def handler(request: web.Request) -> web.StreamResponse:
        state.now += 1
        state.most = max(state.most, state.now)
        response = await stream(request, [0.02, event(1, LENGTH)])
        state.now -= 1
        return response

    result = drive(handler, jobs_at(*([99.0] * 12)), concurrency=3)
    assert (state.most, result.metrics.failed) == (3, 0)
    assert result.outcomes[-1].planned_s < 30


def test_failures_are_told_apart_and_miss() -> None:
    answers: list[list[bytes | float] | int] = [
        429,
        [event(1), event(1, {"type": "abort", "message": "queue is full"})],
        [event(1)],
        [b'data: {"error": {"message": "boom"}}\n\n'],
        [b"data: {broken\n\n"],
        [5.0],
        [event(0, LENGTH)],
        [event(3, LENGTH)],
    ]

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = answers[(await request.json())["sampling_params"]["max_new_tokens"] - 1]
        if isinstance(answer, int):
            return web.Response(status=answer, text="shed")
        return await stream(request, answer)

    rows = [Request(0.0, 5, 1 + index) for index in range(len(answers))]
    jobs = make_jobs(rows, 1000.0, 100.0)
    result = drive(handler, jobs, timeout_s=2.0)
    assert [(o.status, o.error.partition(":")[0]) for o in result.outcomes] == [
        ("http 429", "shed"),
        ("aborted", "queue is full"),
        ("error", "the stream ended early"),
        ("error", "{'message'"),
        ("error", "JSONDecodeError"),
        ("timeout", "no complete answer in time"),
        ("error", "the answer has no token"),
        ("ok", ""),
    ]
    metrics = result.metrics
    assert (metrics.sent, metrics.failed, metrics.e2e_attainment) == (8, 7, 1 / 8)
    assert failures(result.outcomes)[0] == "1 × http 429: e.g. shed"

    def waited() -> None:
        longest_ms = drive(handler, jobs, timeout_s=0.7).metrics.longest_wait_ms
        assert longest_ms == pytest.approx(700, abs=150)

    once_undisturbed(waited, AssertionError)


def test_no_server_at_all() -> None:
    result = run(replay("http://127.0.0.1:9", jobs_at(0.0)))
    assert result.outcomes[0].status == "error"
    assert "ClientConnector" in result.outcomes[0].error


def test_a_failing_check_ends_the_run_at_once() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [30.0])

    def check() -> None:
        raise RuntimeError("d0 died")

    seen: list[tuple[int, int, int]] = []

    def at_once() -> None:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="d0 died"):
            drive(handler, jobs_at(0.0, 60.0), check=check, progress=lambda *n: seen.append(n))
        assert seen == []
        promptly(begun, 5)

    once_undisturbed(at_once)


def test_progress_counts() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, [event(1, LENGTH)])

    seen: list[tuple[int, int, int]] = []
    drive(handler, jobs_at(0.0, 1.3), progress=lambda *n: seen.append(n))
    assert seen == [(1, 1, 2)]


def outcome(ttft_ms: float, tpot_ms: float, tokens: int = 11, status: str = "ok") -> Outcome:
    last = (ttft_ms + tpot_ms * (tokens - 1)) / 1e3
    return Outcome(
        0, 0.0, 0.0, 5, tokens, 1000.0, 100.0, status, "", ttft_ms / 1e3, last, last, tokens
    )


def test_metrics_are_those_of_upstream_goodput() -> None:
    """The very cases of SGLang's ``calculate_goodput``: equal is met, failed misses."""
    outcomes = [
        outcome(1000.0, 50.0),
        outcome(500.0, 101.0),
        outcome(1500.0, 50.0),
        outcome(100.0, 0.0, tokens=1),
        outcome(100.0, 10.0, status="aborted"),
    ]
    metrics = measure(outcomes, 10.0)
    assert asdict(metrics) == pytest.approx(
        {
            "ttft_attainment": 0.6,
            "tpot_attainment": 0.6,
            "e2e_attainment": 0.4,
            "goodput_rps": 0.2,
            "decode_tokens_per_s": 3.4,
            "ttft_p50_ms": 750.0,
            "ttft_p99_ms": 1485.0,
            "tpot_p99_ms": 99.98,
            "longest_wait_ms": 1500.0,
            "sent": 5,
            "failed": 1,
        }
    )
    goodput = upstream_goodput()
    theirs = goodput.calculate_goodput(
        [
            SimpleNamespace(
                success=o.ok,
                output_len=o.output_tokens,
                ttft=o.first_token_s,
                latency=o.last_token_s,
            )
            for o in outcomes
        ],
        {"ttft": 1000.0, "tpot": 100.0},
        10.0,
    )
    assert theirs.slo_attainment == metrics.e2e_attainment
    assert theirs.request_goodput == metrics.goodput_rps
    assert theirs.slo_attainment_by_metric == {
        "ttft": metrics.ttft_attainment,
        "tpot": metrics.tpot_attainment,
    }


def test_metrics_of_nothing_answered() -> None:
    metrics = measure([outcome(1.0, 1.0, status="error")], 1.0)
    assert (metrics.ttft_p50_ms, metrics.tpot_p99_ms, metrics.failed) == (None, None, 1)
    assert measure([], 0.0).sent == 0


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    result = Result([outcome(10.0, 1.0), outcome(20.0, 2.0, status="timeout")], 0.04)
    result.dump(tmp_path / "run.jsonl")
    assert load(tmp_path / "run.jsonl").outcomes == result.outcomes


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(tmp_path / "missing")]) == 2
    out = tmp_path / "run.jsonl"
    argv = ["--url", "http://127.0.0.1:9/", "--requests", "2", "--rate", "100", "--out", str(out)]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 2
    assert len(load(out).outcomes) == 2
