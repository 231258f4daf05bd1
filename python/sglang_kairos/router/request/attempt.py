"""One attempt at one request: on the books of both servers, both legs, the answer, the lessons."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import aiohttp

from sglang_kairos.router.cancellation import Attention
from sglang_kairos.router.fleet.fleet import Fleet, Placement
from sglang_kairos.router.fleet.servers import Server
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.request.body import name_requests, pair_up
from sglang_kairos.router.request.context import Call, ClientLeft
from sglang_kairos.router.request.logprobs import KEEP_BYTES as KEEP_LOGPROBS
from sglang_kairos.router.request.logprobs import TOO_LONG, Merger, wants_merge, wants_prompts
from sglang_kairos.router.request.registry import CallRegistry
from sglang_kairos.router.request.relay import Passage, Relayed
from sglang_kairos.router.request.token_times import Meter, ask_for_counts
from sglang_kairos.router.request.upstream_stream import (
    KEEP_BYTES,
    DecodeHead,
    Exchange,
    Refusal,
    ServerFailed,
    stream_error,
)
from sglang_kairos.router.responses import Send
from sglang_kairos.slo.body import GENERATE, error_body

_DRAIN_S = 30.0


class Rejected(Exception):
    """A server answered with an error before anything was sent to the client."""

    def __init__(self, server: Server, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"{server.role} server {server.url} answered {status}")
        self.server, self.status = server, status
        self.content_type, self.body = content_type, body


class Attempts:
    """Makes attempts, and sees to what they leave behind."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        calls: CallRegistry,
    ) -> None:
        self._calls = calls
        self._fleet, self._session, self._metrics = fleet, session, metrics
        self._background: set[asyncio.Task[Any]] = set()

    async def serve(
        self, call: Call, placement: Placement, attention: Attention, send: Send
    ) -> int:
        """One pair; the status sent. ServerFailed, Rejected, or what `attention` is told."""
        prefill, decode = placement.prefill, placement.decode
        rids = name_requests(call.body, call.prompt, call.own_rid)
        if call.own_rid:
            self._calls.name(call, rids)
        pair_up(call.body, call.prompt.batch, prefill.host, prefill.bootstrap_port)
        merge = wants_merge(call.path, call.body)
        choices = call.prompt.prompts * call.prompt.samples
        hidden = ask_for_counts(
            call.body, call.path, choices, call.stream_options, decode.usage_by_default
        )
        exchange = Exchange(
            self._session,
            prefill,
            decode,
            call.path,
            call.payload(),
            call.headers,
            rids,
            KEEP_LOGPROBS if merge else KEEP_BYTES,
        )
        request, seen = placement.request, call.seen
        grown = request.tokens + request.output_tokens
        ticket = prefill.owe(
            request.tokens,
            call.deadline_s,
            time.monotonic(),
            placement.cached_tokens,
            request.weight,
        )
        decode.join(request.prompts, grown, request.tpot_s)
        self._fleet.sent(prefill, call.blocks)

        def prefilled() -> None:
            prefill.settle(ticket, time.monotonic(), served=True)
            prefill.health.request_answered()
            prefill.attempts.discard(attention)
            self._learn_length(call, exchange.prompt_tokens)

        def prefill_ended(task: asyncio.Task[Refusal | None]) -> None:
            if task.cancelled():
                return
            error = task.exception()
            if error is None and (refused := task.result()) is not None:
                error = Rejected(prefill, refused.status, refused.content_type, refused.body)
            if isinstance(error, Exception) and not over and not seen.started:
                attention.interrupt(error)

        over = answered = not_taken = False
        status = 0
        passage: Passage | None = None
        servers: tuple[Server, Server] = (prefill, decode)
        for server in servers:
            server.attempts.add(attention)
        first = asyncio.create_task(exchange.run_prefill(prefilled))
        first.add_done_callback(prefill_ended)
        try:
            async with attention:
                head = await exchange.run_decode()
                status = head.response.status
                if status >= 400:
                    raise await _rejection(decode, head)
                if (refused := stream_error(head.first)) is not None and call.prompt.stream:
                    raise Rejected(decode, refused.status, refused.content_type, refused.body)
                decode.health.request_answered()
                merger = None
                if merge:
                    await asyncio.wait({first})
                    merger = _merger(call, exchange)
                # Decode has the KV: what becomes of the prefill server is no concern any more.
                prefill.attempts.discard(attention)
                self._observe_first(call, placement, exchange)
                passage = Passage(head, seen, send, Meter(call.path, choices), hidden, merger)
                broken = await passage.relay(call.own_headers)
            if broken is not None:
                raise ServerFailed(decode, broken)
            answered = True
        except Exception as error:
            not_taken = isinstance(error, Rejected) and error.status < 500
            # Nothing takes back an answer that was sent. A client need not wait for its last words.
            answered = seen.whole or (isinstance(error, ClientLeft) and seen.enough())
            if not answered or passage is None:
                raise
            await passage.end()
        finally:
            over = True
            for server in servers:
                server.attempts.discard(attention)
            attention.forget((ServerFailed, Rejected))
            prefill.settle(ticket, time.monotonic(), served=False)
            decode.leave(request.prompts, grown, request.tpot_s)
            if not answered:
                first.cancel()
                # A chosen id that was refused may be somebody else's, and an abort ends whatever
                # begins with it. Closing the connections then has to do.
                named = call.own_rid or (not not_taken and all(map(self._calls.may_abort, rids)))
                call.aborting = self._spawn(_abort(first, exchange, named))
        if seen.whole:
            self._observe_end(call, placement, seen)
        if not passage.exhausted:
            self._spawn(self._finish(call, placement, passage, first, exchange))
        elif not first.done():
            self._let_finish(first, exchange)
        return status

    async def finish(self) -> None:
        """Wait a moment for drains and aborts still running (shutdown)."""
        if self._background:
            await asyncio.wait(self._background, timeout=1.0)

    def _learn_length(self, call: Call, prompt_tokens: int) -> None:
        if prompt_tokens and call.prompt.text_bytes and call.prompt.batch is None:
            of_text = prompt_tokens - call.prompt.tokens
            if of_text > 0:
                self._fleet.bytes_per_token.observe(call.prompt.text_bytes / of_text)

    def _observe_first(self, call: Call, placement: Placement, exchange: Exchange) -> None:
        """Decode's first byte is here: for a stream, the first token."""
        if not call.prompt.stream:
            return
        now = time.monotonic()
        ttft = now - call.arrived_s
        self._fleet.margin.observe(call.predicted_s, ttft)
        self._metrics.first_token(
            call.slo.name, placement.prefill.url, ttft, call.predicted_s, now <= call.deadline_s
        )
        if exchange.prefilled_s is not None:
            self._fleet.handoff.observe(now - exchange.prefilled_s)

    def _observe_end(self, call: Call, placement: Placement, seen: Relayed) -> None:
        tpot = seen.tpot_s()
        if tpot is not None and call.prompt.stream:
            self._metrics.last_token(
                call.slo.name,
                placement.decode.url,
                tpot,
                placement.tpot_s,
                1e3 * tpot <= call.slo.tpot_ms,
            )

    async def _finish(
        self,
        call: Call,
        placement: Placement,
        passage: Passage,
        prefill: asyncio.Task[Refusal | None],
        exchange: Exchange,
    ) -> None:
        """Let both servers finish their answers, so that their connections can be used again."""
        measured = call.seen.whole
        try:
            async with asyncio.timeout(_DRAIN_S):
                await passage.read_on()
                if not measured:
                    self._observe_end(call, placement, call.seen)
                await asyncio.wait({prefill})
        except (aiohttp.ClientError, OSError):
            pass
        finally:
            prefill.cancel()
            exchange.close()

    def _let_finish(self, prefill: asyncio.Task[Any], exchange: Exchange) -> None:
        """As `_finish`, where decode has: without a task that waits for the task."""
        timer = asyncio.get_running_loop().call_later(_DRAIN_S, prefill.cancel)

        def over(_: asyncio.Task[Any]) -> None:
            timer.cancel()
            exchange.close()
            self._background.discard(prefill)

        self._background.add(prefill)
        prefill.add_done_callback(over)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _rejection(server: Server, head: DecodeHead) -> Rejected:
    """Decode's error, read to its end."""
    response = head.response
    content_type = response.headers.get("content-type", "application/json")
    try:
        body = head.first + await response.content.read()
    except (aiohttp.ClientError, OSError):
        body = head.first
    return Rejected(server, response.status, content_type, body)


def _merger(call: Call, exchange: Exchange) -> Merger | None:
    """For prefill's answer, which has come. Rejected: its part cannot be joined and is asked for."""
    if not exchange.prefill_cut:
        merger = Merger(exchange.prefill_body, call.prompt.stream, call.path)
        if merger.found:
            return merger
    if not wants_prompts(call.path, call.body):
        return None
    if exchange.prefill_cut:
        param = "top_logprobs_num" if call.path == GENERATE else "logprobs"
        body = error_body(call.path, 413, TOO_LONG, "PayloadTooLarge", param)
        raise Rejected(exchange.prefill, 413, "application/json", body)
    text = "prefill's answer has no log probabilities of the prompt"
    body = error_body(call.path, 502, text, "BadGateway")
    raise Rejected(exchange.prefill, 502, "application/json", body)


async def _abort(prefill: asyncio.Task[Any], exchange: Exchange, named: bool) -> None:
    await asyncio.gather(prefill, return_exceptions=True)
    if named:
        await exchange.abort()
    else:
        exchange.close()
