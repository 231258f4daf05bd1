"""The serving endpoints: one request, from its body to the last byte of its answer.

Nothing is sent to the client before decode's first byte, which for a stream is its first token:
until then the request can still move to another pair, or be answered with prefill's error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import aiohttp

from sglang_kairos.policy.overload import Overload, retry_after_s, verdict
from sglang_kairos.router.cancellation import Attention
from sglang_kairos.router.fleet.fleet import Fleet, Placement
from sglang_kairos.router.fleet.outliers import (
    Suspicion,
    Verdicts,
    never_sent,
    own_shortage,
    was_aborted,
)
from sglang_kairos.router.fleet.servers import Server
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.attempt import Attempts, Rejected
from sglang_kairos.router.request.context import BadRequest, Call, ClientLeft, accept, read_body
from sglang_kairos.router.request.deferred_queue import Later
from sglang_kairos.router.request.limits import Full, Limits, TooLarge
from sglang_kairos.router.request.registry import Aborted, CallRegistry
from sglang_kairos.router.request.relay import break_off
from sglang_kairos.router.request.upstream_stream import ServerFailed, is_unreachable
from sglang_kairos.router.responses import Headers, Receive, Scope, Send, answer, refuse
from sglang_kairos.slo.targets import SloTable

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
# Another server may well do what this one could not; a client's mistake (4xx) it could not either.
_RETRIED = frozenset((429, 500, 502, 503, 504))
_BUSY = frozenset((429, 503))
# A stock server takes relegated work when it has no more than this left to do.
_NEARLY_IDLE_S = 0.1


_ABORTED = "aborted by a call to /abort_request"
_SHORTAGE = "the router has no file descriptor left: raise its limit (ulimit -n)"


class TimedOut(Exception):
    """The request has used up --request-timeout-secs."""


class Draining(Exception):
    """The router ends before the request did."""


class Shed(Exception):
    """No pair can keep the request's SLO, and its class is refused then."""

    def __init__(self, placement: Placement) -> None:
        super().__init__("no pair of servers can keep the SLO")
        self.placement = placement


class PairProxy:
    """The ASGI app of the three endpoints. With `carries` off, SLOs are neither read nor sent."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        table: SloTable,
        metrics: RouterMetrics,
        options: RouterOptions,
        *,
        carries: bool = True,
        max_wait: float = 10.0,
    ) -> None:
        self.limits = Limits(options.max_in_flight, options.max_body_bytes, options.max_held_bytes)
        self.later = Later()
        # The requests that are being served, by their ids.
        self.calls = CallRegistry()
        self._fleet = fleet
        self._table = table
        self._carries = carries
        self._max_wait = max_wait
        self._metrics = metrics
        self._options = options
        self._attempts = Attempts(fleet, session, metrics, self.calls)
        self._live: set[Attention] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        path, slo_class, held, status = scope["path"], "", 0, CLIENT_LEFT
        try:
            self.limits.enter()
        except Full as error:
            await self._full(send, path, error)
            return
        try:
            raw = await read_body(receive, self.limits)
            held = len(raw)
            call = accept(
                raw, scope, arrived, self._fleet, self._table, self._options, self._carries
            )
            slo_class = call.slo.name
            for note in call.header_notes:
                self._metrics.odd_headers.labels(*note.split()).inc()
            self.calls.hold(call)
            try:
                status = await self._serve(call, receive, send)
            finally:
                self.calls.release(call)
        except BadRequest as error:
            status = await refuse(send, path, 400, str(error), "BadRequestError", param=error.param)
        except TooLarge as error:
            status = await refuse(send, path, 413, str(error), "PayloadTooLarge")
        except Full as error:
            status = await self._full(send, path, error)
        except ClientLeft:
            pass
        finally:
            self.limits.leave(held)
            self._metrics.answered(path, status, slo_class)

    def interrupt_all(self) -> None:
        """The router is about to end: whoever is still being served gets an error now."""
        for attention in list(self._live):
            attention.interrupt(Draining())

    async def finish(self) -> None:
        """Wait a moment for drains and aborts still running (shutdown)."""
        await self._attempts.finish()

    async def _serve(self, call: Call, receive: Receive, send: Send) -> int:
        """Serve a request, or say why not; the status it was answered with. ClientLeft."""
        attention = Attention()
        watching = asyncio.create_task(_tell_when_left(receive, attention))
        left_s = call.arrived_s + self._options.request_timeout_s - time.monotonic()
        timer = asyncio.get_running_loop().call_later(left_s, attention.interrupt, TimedOut())
        self._live.add(attention)
        try:
            return await self._pairs(call, attention, send)
        except Shed as shed:
            return await self._shed(call, shed.placement, send)
        except TimedOut:
            text = f"no answer within {self._options.request_timeout_s:g} s"
            return await self._end(call, send, 504, text, "Timeout")
        except Aborted:
            return await self._end(call, send, 500, _ABORTED, "Aborted")
        except Draining:
            return await self._end(call, send, 503, "the router is shutting down", "Unavailable")
        finally:
            self._live.discard(attention)
            timer.cancel()
            watching.cancel()

    async def _pairs(self, call: Call, attention: Attention, send: Send) -> int:
        """One pair after another until one serves it. Shed, TimedOut, Draining, ClientLeft."""
        verdicts = Verdicts(self._count_failure)
        try:
            status = await self._try_pairs(call, attention, send, verdicts)
        except (Shed, TimedOut, Draining, ClientLeft, Aborted):
            verdicts.given_up(had_others=True)
            raise
        return status

    async def _try_pairs(
        self, call: Call, attention: Attention, send: Send, verdicts: Verdicts
    ) -> int:
        reason, last, suspicion = self._fleet.nobody, None, Suspicion()
        for attempt in range(self._options.max_retries + 1):
            placement = self._choose(call, torn=last is None)
            if placement is None:
                break
            if attempt == 0:
                placement = await self._admit(call, placement, attention)
            if attempt:
                self._metrics.retries.inc()
            try:
                status = await self._attempts.serve(call, placement, attention, send)
                verdicts.served()
                return status
            except ServerFailed as error:
                if own_shortage(error.cause):
                    return await self._end(call, send, 503, _SHORTAGE, "Unavailable")
                reason, last = str(error), None
                self._note(call, placement, error.server, error.cause)
                if call.seen.started:
                    return await self._end(call, send, 502, reason, "BadGateway")
                # One that is in the wrong place was cut off by us.
                if not never_sent(error.cause) and not error.server.misplaced:
                    async with attention:
                        why = await self._suspect(call, suspicion, error)
                    if why:
                        verdicts.given_up(had_others=False)
                        return await self._end(call, send, 502, f"{why}: {reason}", "BadGateway")
            except Rejected as rejected:
                last = rejected
                if rejected.status not in _RETRIED or was_aborted(rejected.body):
                    break
                self._rejected(call, placement, rejected, verdicts)
            if call.aborted:
                break
            if call.aborting is not None and not call.own_rid:
                # The client's own id is still taken on the server that did answer.
                async with attention:
                    await asyncio.wait({call.aborting}, timeout=1.0)
        verdicts.given_up(had_others=self._options.max_retries > 0)
        if last is not None:
            headers: Headers = [(b"content-type", last.content_type.encode("latin-1"))]
            await answer(send, last.status, last.body, headers + call.own_headers)
            return last.status
        if call.aborted:
            return await self._end(call, send, 500, _ABORTED, "Aborted")
        text = f"no server could take the request: {reason}"
        if suspicion.cuts:
            return await self._end(call, send, 502, text, "BadGateway")
        return await self._end(call, send, 503, text, "Unavailable")

    async def _suspect(self, call: Call, suspicion: Suspicion, error: ServerFailed) -> str:
        """A server died under the request or cut it off; why it is not tried again, if it is not."""
        server = error.server
        protect = self._options.protect_last_server
        why = await suspicion.verdict(server, self._fleet.others(server), protect)
        self._metrics.cut_off.labels(server.role, "ended" if why else "retried").inc()
        logger.warning(
            "request %s: cut off by %s server %s, %s",
            call.request_id,
            server.role,
            server.url,
            "ended" if why else "tried once more",
        )
        return why

    def _choose(self, call: Call, torn: bool) -> Placement | None:
        """A pair, best without any server of a pair that failed before; the failed pair itself once
        more only if the connection was `torn` rather than the request answered with an error."""
        request = call.placed(self._fleet)
        ways: list[set[Server]] = [call.gone | call.failed]
        if call.failed:
            for role in ("prefill", "decode"):
                ways.append(call.gone | {s for s in call.failed if s.role == role})
            if torn:
                ways.append(call.gone)
        for excluded in ways:
            placement = self._fleet.choose(request, excluded, call.blocks)
            if placement is not None:
                call.predicted_s = placement.outcome.ttft_s + time.monotonic() - call.arrived_s
                return placement
        return None

    async def _admit(self, call: Call, placement: Placement, attention: Attention) -> Placement:
        """The pair to use, at once or after having been relegated. Shed."""
        policy = self._options.overload_of(call.slo.name)
        action = verdict(policy, placement.outcome)
        if action is Overload.SERVE:
            return placement
        self._metrics.overloaded.labels(action.value, call.slo.name).inc()
        if action is Overload.SHED:
            raise Shed(placement)
        found = placement

        def may_go() -> bool:
            nonlocal found
            found = self._choose(call, torn=True) or found
            # A Kairos server puts it behind those that can still be on time by itself.
            return found.prefill.kairos or found.prefill.owed_s <= _NEARLY_IDLE_S

        until = call.arrived_s + self._max_wait * call.slo.ttft_ms / 1e3
        call.relegated = attention
        try:
            async with attention:
                await self.later.wait(may_go, until)
        finally:
            call.relegated = None
        return self._choose(call, torn=True) or found

    async def _shed(self, call: Call, placement: Placement, send: Send) -> int:
        predicted_s, slo = placement.outcome.ttft_s, call.slo
        facts: dict[str, Any] = {
            "predicted_ttft_ms": round(1e3 * predicted_s, 1),
            "ttft_ms": slo.ttft_ms,
            "predicted_tpot_ms": round(1e3 * placement.tpot_s, 3),
            "tpot_ms": slo.tpot_ms,
        }
        text = (
            f"no pair of servers can keep the SLO: TTFT {facts['predicted_ttft_ms']:g} ms predicted"
            f" (target {slo.ttft_ms:g}), TPOT {facts['predicted_tpot_ms']:g} ms"
            f" (target {slo.tpot_ms:g}), without breaking one promised to another request"
        )
        return await refuse(
            send,
            call.path,
            429,
            text,
            "Overloaded",
            retry_after_s=retry_after_s(predicted_s, slo.ttft_ms / 1e3),
            facts=facts,
            headers=call.own_headers,
        )

    async def _full(self, send: Send, path: str, error: Full) -> int:
        self._metrics.overloaded.labels("full", "").inc()
        return await refuse(send, path, 429, str(error), "Overloaded", retry_after_s=1)

    async def _end(self, call: Call, send: Send, status: int, text: str, kind: str) -> int:
        """An error, as a status or inside the stream that has begun. The status to count."""
        logger.warning("request %s ends with %d: %s", call.request_id, status, text)
        if call.seen.started:
            await break_off(call.seen, send, status, text, kind)
            return status
        retry = 1 if status == 503 else None
        return await refuse(
            send, call.path, status, text, kind, retry_after_s=retry, headers=call.own_headers
        )

    def _note(self, call: Call, placement: Placement, server: Server, cause: BaseException) -> None:
        """A server broke off or could not be reached."""
        kind = "unreachable" if is_unreachable(cause) else type(cause).__name__
        self._metrics.errors.labels(server.url, kind).inc()
        logger.warning("%s server %s: %r", server.role, server.url, cause)
        if is_unreachable(cause):
            if server.health.request_refused():
                self._metrics.ejections.labels(server.url, "unreachable").inc()
            call.gone.add(server)
            return
        call.failed |= {placement.prefill, placement.decode}
        self._count_failure(server)

    def _rejected(
        self, call: Call, placement: Placement, rejected: Rejected, verdicts: Verdicts
    ) -> None:
        """A server answered 5xx. A decode server may do so for its prefill server's sake."""
        self._metrics.errors.labels(rejected.server.url, str(rejected.status)).inc()
        call.failed |= {placement.prefill, placement.decode}
        if rejected.status not in _BUSY and placement.prefill.up:
            verdicts.said(rejected.server, rejected.status)

    def _count_failure(self, server: Server) -> None:
        if not self._fleet.has_other(server):
            return  # a role is never emptied for failures alone
        if server.health.request_failed(time.monotonic()):
            self._metrics.ejections.labels(server.url, "outlier").inc()
            logger.warning("%s server %s is ejected: it fails requests", server.role, server.url)


async def _tell_when_left(receive: Receive, attention: Attention) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    attention.interrupt(ClientLeft())
