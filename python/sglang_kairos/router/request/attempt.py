"""One attempt at one request: on the books of both servers, both legs, the answer, the lessons."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import aiohttp

from sglang_kairos.router.cancellation import Cancellation
from sglang_kairos.router.errors import ClientLeft, Rejected, ServerFailed
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.reservation import Reservation
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.request.body import (
    KEEP_LOGPROBS_BYTES,
    name_requests,
    pair_up,
    wants_prompts,
)
from sglang_kairos.router.request.context import RequestContext, RequestRegistry
from sglang_kairos.router.request.logprobs import TOO_LONG, Merger
from sglang_kairos.router.request.sse import Meter, Relayed, ask_for_counts
from sglang_kairos.router.request.upstream_stream import KEEP_BYTES, AnswerRelay, UpstreamPair
from sglang_kairos.router.responses import Send
from sglang_kairos.slo.body import GENERATE, error_body

_DRAIN_S = 30.0


class Attempts:
    """Makes attempts, and sees to what they leave behind."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        registry: RequestRegistry,
    ) -> None:
        self._registry, self._clock = registry, fleet.clock
        self._fleet, self._session, self._metrics = fleet, session, metrics
        self._background: set[asyncio.Task[Any]] = set()

    async def serve(
        self,
        context: RequestContext,
        reservation: Reservation,
        cancellation: Cancellation,
        send: Send,
    ) -> int:
        """One pair of servers; returns the HTTP status sent.

        Raises ServerFailed, Rejected, or whatever interrupts `cancellation`.
        """
        merge, choices = context.prompt.logprobs, context.prompt.choices
        hidden = ask_for_counts(
            context.body,
            context.path,
            choices,
            context.stream_options,
            reservation.decode.usage_by_default,
        )
        upstream = self._upstream(context, reservation)
        seen = context.seen
        over = answered = not_taken = False
        status = 0
        answer: AnswerRelay | None = None

        def prefilled() -> None:
            reservation.prefilled()
            self._learn_length(context, upstream.prompt_tokens)

        def prefill_ended(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if isinstance(error, Exception) and not over and not seen.started:
                cancellation.interrupt(error)

        with reservation.take(cancellation):
            prefilling = asyncio.create_task(upstream.run_prefill(prefilled))
            prefilling.add_done_callback(prefill_ended)
            try:
                async with cancellation:
                    head = await upstream.run_decode(context.prompt.stream)
                    status = head.response.status
                    reservation.decode.health.request_answered()
                    merger = None
                    if merge:
                        await asyncio.wait({prefilling})
                        merger = _merger(context, upstream)
                    # Decode has the KV: what becomes of the prefill server is no concern any more.
                    reservation.leave_prefill()
                    self._observe_first(context, reservation, upstream)
                    meter = Meter(context.path, choices)
                    answer = AnswerRelay(head, seen, send, meter, hidden, merger, self._clock)
                    broken = await answer.relay(context.own_headers)
                if broken is not None:
                    raise ServerFailed(reservation.decode, broken)
                answered = True
            except Exception as error:
                not_taken = isinstance(error, Rejected) and error.status < 500
                # Nothing takes back an answer that was sent. A client need not wait for its last words.
                answered = seen.whole or (isinstance(error, ClientLeft) and seen.enough())
                if not answered or answer is None:
                    raise
                await answer.end()
            finally:
                over = True
                cancellation.forget((ServerFailed, Rejected))
                if not answered:
                    prefilling.cancel()
                    # A chosen id that was refused may be somebody else's, and an abort ends whatever
                    # begins with it. Closing the connections then has to do.
                    named = context.own_rid or (
                        not not_taken and all(map(self._registry.may_abort, upstream.rids))
                    )
                    context.aborting = self._spawn(_abort(prefilling, upstream, named))
        if seen.whole:
            self._observe_end(context, reservation, seen)
        if not answer.exhausted:
            self._spawn(self._finish(context, reservation, answer, prefilling, upstream))
        elif not prefilling.done():
            self._let_finish(prefilling, upstream)
        return status

    def _upstream(self, context: RequestContext, reservation: Reservation) -> UpstreamPair:
        """Writes the pair and the attempt's ids into the body; returns what sends it."""
        prefill, prompt, body = reservation.prefill, context.prompt, context.body
        port = prefill.bootstrap_port
        rids = name_requests(body, prompt, context.own_rid)
        pair_up(body, prompt.batch, prefill.host, port)
        if context.own_rid:
            self._registry.name(context, rids)
        return UpstreamPair(
            self._session,
            prefill,
            reservation.decode,
            context.path,
            context.payload(self._clock.now_s()),
            context.headers,
            rids,
            KEEP_LOGPROBS_BYTES if prompt.logprobs else KEEP_BYTES,
            self._clock,
        )

    async def finish(self) -> None:
        """Wait a moment for drains and aborts still running (shutdown)."""
        if self._background:
            await asyncio.wait(self._background, timeout=1.0)

    def _learn_length(self, context: RequestContext, prompt_tokens: int) -> None:
        if prompt_tokens and context.prompt.text_bytes and context.prompt.batch is None:
            of_text = prompt_tokens - context.prompt.tokens
            if of_text > 0:
                self._fleet.bytes_per_token.observe(context.prompt.text_bytes / of_text)

    def _observe_first(
        self, context: RequestContext, reservation: Reservation, upstream: UpstreamPair
    ) -> None:
        """Decode's first byte is here: for a stream, the first token."""
        if not context.prompt.stream:
            return
        now = self._clock.now_s()
        ttft = now - context.arrived_s
        self._fleet.margin.observe(context.predicted_s, ttft)
        self._metrics.first_token(
            context.slo.name,
            reservation.prefill.url,
            ttft,
            context.predicted_s,
            now <= context.deadline_s,
        )
        if upstream.prefilled_s is not None:
            self._fleet.handoff.observe(now - upstream.prefilled_s)

    def _observe_end(
        self, context: RequestContext, reservation: Reservation, seen: Relayed
    ) -> None:
        tpot = seen.tpot_s()
        if tpot is not None and context.prompt.stream:
            self._metrics.last_token(
                context.slo.name,
                reservation.decode.url,
                tpot,
                reservation.tpot_s,
                1e3 * tpot <= context.slo.tpot_ms,
            )

    async def _finish(
        self,
        context: RequestContext,
        reservation: Reservation,
        answer: AnswerRelay,
        prefill: asyncio.Task[None],
        upstream: UpstreamPair,
    ) -> None:
        """Let both servers finish their answers, so that their connections can be used again."""
        measured = context.seen.whole
        try:
            async with asyncio.timeout(_DRAIN_S):
                await answer.read_on()
                if not measured:
                    self._observe_end(context, reservation, context.seen)
                await asyncio.wait({prefill})
        except (aiohttp.ClientError, OSError):
            pass
        finally:
            prefill.cancel()
            upstream.close()

    def _let_finish(self, prefill: asyncio.Task[Any], upstream: UpstreamPair) -> None:
        """As `_finish`, where decode has: without a task that waits for the task."""
        timer = asyncio.get_running_loop().call_later(_DRAIN_S, prefill.cancel)

        def over(_: asyncio.Task[Any]) -> None:
            timer.cancel()
            upstream.close()
            self._background.discard(prefill)

        self._background.add(prefill)
        prefill.add_done_callback(over)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _merger(context: RequestContext, upstream: UpstreamPair) -> Merger | None:
    """For prefill's answer, which has come. Rejected: its part cannot be joined and is asked for."""
    if not upstream.prefill_cut:
        merger = Merger(upstream.prefill_body, context.prompt.stream, context.path)
        if merger.found:
            return merger
    if not wants_prompts(context.path, context.body):
        return None
    if upstream.prefill_cut:
        param = "top_logprobs_num" if context.path == GENERATE else "logprobs"
        body = error_body(context.path, 413, TOO_LONG, "PayloadTooLarge", param)
        raise Rejected(upstream.prefill, 413, "application/json", body)
    text = "prefill's answer has no log probabilities of the prompt"
    body = error_body(context.path, 502, text, "BadGateway")
    raise Rejected(upstream.prefill, 502, "application/json", body)


async def _abort(prefill: asyncio.Task[Any], upstream: UpstreamPair, named: bool) -> None:
    await asyncio.gather(prefill, return_exceptions=True)
    if named:
        await upstream.abort()
    else:
        upstream.close()
