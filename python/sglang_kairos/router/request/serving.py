"""The serving endpoints: one request, from its body to the last byte of its answer.

Nothing is sent to the client before decode's first byte, which for a stream is its first token.
Until then the request can still move to another pair, or be answered with prefill's error.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp

from sglang_kairos.policy.overload import Overload, verdict
from sglang_kairos.router.cancellation import Cancellation
from sglang_kairos.router.errors import (
    Aborted,
    BadRequest,
    ClientLeft,
    Draining,
    Full,
    Rejected,
    ServerFailed,
    Shed,
    TimedOut,
    TooLarge,
)
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.outliers import (
    Failures,
    is_unreachable,
    never_sent,
    own_shortage,
    was_aborted,
)
from sglang_kairos.router.fleet.reservation import Reservation
from sglang_kairos.router.fleet.servers import Server
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.attempt import Attempts
from sglang_kairos.router.request.context import (
    Limits,
    RequestContext,
    RequestRegistry,
    accept,
    read_body,
)
from sglang_kairos.router.request.deferred_queue import DeferredQueue
from sglang_kairos.router.request.error_answers import end_with_error, refuse_shed
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
        self._clock = fleet.clock
        self.deferred = DeferredQueue(self._clock)
        # The requests that are being served, by their ids.
        self.registry = RequestRegistry()
        self._fleet = fleet
        self._table = table
        self._carries = carries
        self._max_wait = max_wait
        self._metrics = metrics
        self._options = options
        self._attempts = Attempts(fleet, session, metrics, self.registry)
        self._live: set[Cancellation] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = self._clock.now_s()
        path, slo_class, held, status = scope["path"], "", 0, CLIENT_LEFT
        try:
            self.limits.enter()
        except Full as error:
            await self._full(send, path, error)
            return
        try:
            raw = await read_body(receive, self.limits)
            held = len(raw)
            context = accept(
                raw, scope, arrived, self._fleet, self._table, self._options, self._carries
            )
            slo_class = context.slo.name
            for note in context.header_notes:
                self._metrics.odd_headers.labels(*note.split()).inc()
            self.registry.hold(context)
            try:
                status = await self._serve(context, receive, send)
            finally:
                self.registry.release(context)
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
        for cancellation in list(self._live):
            cancellation.interrupt(Draining())

    async def finish(self) -> None:
        """Wait a moment for drains and aborts still running (shutdown)."""
        await self._attempts.finish()

    async def _serve(self, context: RequestContext, receive: Receive, send: Send) -> int:
        """Serve a request, or say why not; the status it was answered with. ClientLeft."""
        cancellation = Cancellation()
        watching = asyncio.create_task(_tell_when_left(receive, cancellation))
        left_s = context.arrived_s + self._options.request_timeout_s - self._clock.now_s()
        timer = asyncio.get_running_loop().call_later(left_s, cancellation.interrupt, TimedOut())
        self._live.add(cancellation)
        try:
            return await self._pairs(context, cancellation, send)
        except Shed as shed:
            return await refuse_shed(context, shed, send)
        except TimedOut:
            text = f"no answer within {self._options.request_timeout_s:g} s"
            return await end_with_error(context, send, 504, text, "Timeout")
        except Aborted:
            return await end_with_error(context, send, 500, _ABORTED, "Aborted")
        except Draining:
            return await end_with_error(
                context, send, 503, "the router is shutting down", "Unavailable"
            )
        finally:
            self._live.discard(cancellation)
            timer.cancel()
            watching.cancel()

    async def _pairs(self, context: RequestContext, cancellation: Cancellation, send: Send) -> int:
        """Tries pairs until one serves the request; returns the HTTP status.

        Raises Shed, TimedOut, Draining, Aborted or ClientLeft.
        """
        failures = Failures(self._count_failure)
        try:
            return await self._try_pairs(context, cancellation, send, failures)
        except (Shed, TimedOut, Draining, ClientLeft, Aborted):
            failures.given_up(had_others=True)
            raise

    async def _try_pairs(
        self, context: RequestContext, cancellation: Cancellation, send: Send, failures: Failures
    ) -> int:
        reason, last = "", None
        for attempt in range(self._options.max_retries + 1):
            reservation = self._choose(context, torn=last is None)
            if reservation is None:
                break
            if attempt == 0:
                reservation = await self._admit(context, reservation, cancellation)
            else:
                self._metrics.retries.inc()
            try:
                status = await self._attempts.serve(context, reservation, cancellation, send)
                failures.served()
                return status
            except ServerFailed as error:
                if own_shortage(error.cause):
                    return await end_with_error(context, send, 503, _SHORTAGE, "Unavailable")
                reason, last = str(error), None
                server = reservation.server(error.role)
                self._note(context, reservation, server, error.cause)
                if context.seen.started:
                    return await end_with_error(context, send, 502, reason, "BadGateway")
                # One that is in the wrong place was cut off by us.
                if not never_sent(error.cause) and not server.misplaced:
                    async with cancellation:
                        why = await self._cut_off(context, failures, server)
                    if why:
                        failures.given_up(had_others=False)
                        return await end_with_error(
                            context, send, 502, f"{why}: {reason}", "BadGateway"
                        )
            except Rejected as rejected:
                last = rejected
                if rejected.status not in _RETRIED or was_aborted(rejected.body):
                    break
                self._rejected(context, reservation, rejected, failures)
            if context.aborted:
                break
            if context.aborting is not None and not context.own_rid:
                # The client's own id is still taken on the server that did answer.
                async with cancellation:
                    await asyncio.wait({context.aborting}, timeout=1.0)
        failures.given_up(had_others=self._options.max_retries > 0)
        return await self._unserved(context, send, last, reason, failures)

    async def _unserved(
        self,
        context: RequestContext,
        send: Send,
        last: Rejected | None,
        reason: str,
        failures: Failures,
    ) -> int:
        """No pair served it; returns the status that says why."""
        if last is not None:
            headers: Headers = [(b"content-type", last.content_type.encode("latin-1"))]
            await answer(send, last.status, last.body, headers + context.own_headers)
            return last.status
        if context.aborted:
            return await end_with_error(context, send, 500, _ABORTED, "Aborted")
        text = f"no server could take the request: {reason or self._fleet.nobody}"
        if failures.cuts:
            return await end_with_error(context, send, 502, text, "BadGateway")
        return await end_with_error(context, send, 503, text, "Unavailable")

    async def _cut_off(self, context: RequestContext, failures: Failures, server: Server) -> str:
        """A server died under the request or cut it off.

        Returns why it is not tried again; empty if it is.
        """
        protect = self._options.protect_last_server
        why = await failures.cut_off(server, self._fleet.others(server), protect)
        self._metrics.cut_off.labels(server.role, "ended" if why else "retried").inc()
        logger.warning(
            "request %s: cut off by %s server %s, %s",
            context.request_id,
            server.role,
            server.url,
            "ended" if why else "tried once more",
        )
        return why

    def _choose(self, context: RequestContext, torn: bool) -> Reservation | None:
        """Returns a pair, or None; best without any server of a pair that failed before.

        The failed pair itself is tried once more only if the connection was `torn`, rather than the
        request answered with an error.
        """
        request = context.placed(self._fleet)
        ways: list[set[Server]] = [context.gone | context.failed]
        if context.failed:
            for role in ("prefill", "decode"):
                ways.append(context.gone | {s for s in context.failed if s.role == role})
            if torn:
                ways.append(context.gone)
        for excluded in ways:
            reservation = self._fleet.reserve(request, excluded, context.blocks)
            if reservation is not None:
                context.predicted_s = (
                    reservation.outcome.ttft_s + self._clock.now_s() - context.arrived_s
                )
                return reservation
        return None

    async def _admit(
        self, context: RequestContext, reservation: Reservation, cancellation: Cancellation
    ) -> Reservation:
        """The pair to use, at once or after having been relegated. Shed."""
        policy = self._options.overload_of(context.slo.name)
        action = verdict(policy, reservation.outcome)
        if action is Overload.SERVE:
            return reservation
        self._metrics.overloaded.labels(action.value, context.slo.name).inc()
        if action is Overload.SHED:
            raise Shed(reservation.outcome.ttft_s, reservation.tpot_s)
        found = reservation

        def may_go() -> bool:
            nonlocal found
            found = self._choose(context, torn=True) or found
            # A Kairos server puts it behind those that can still be on time by itself.
            return found.prefill.kairos or found.prefill.owed_s <= _NEARLY_IDLE_S

        until = context.arrived_s + self._max_wait * context.slo.ttft_ms / 1e3
        context.relegated = cancellation
        try:
            async with cancellation:
                await self.deferred.wait(may_go, until)
        finally:
            context.relegated = None
        return self._choose(context, torn=True) or found

    async def _full(self, send: Send, path: str, error: Full) -> int:
        self._metrics.overloaded.labels("full", "").inc()
        return await refuse(send, path, 429, str(error), "Overloaded", retry_after_s=1)

    def _note(
        self,
        context: RequestContext,
        reservation: Reservation,
        server: Server,
        cause: BaseException,
    ) -> None:
        """A server broke off or could not be reached."""
        kind = "unreachable" if is_unreachable(cause) else type(cause).__name__
        self._metrics.errors.labels(server.url, kind).inc()
        logger.warning("%s server %s: %r", server.role, server.url, cause)
        if is_unreachable(cause):
            if server.health.request_refused():
                self._metrics.ejections.labels(server.url, "unreachable").inc()
            context.gone.add(server)
            return
        context.failed |= {reservation.prefill, reservation.decode}
        self._count_failure(server)

    def _rejected(
        self,
        context: RequestContext,
        reservation: Reservation,
        rejected: Rejected,
        failures: Failures,
    ) -> None:
        """A server answered 5xx. A decode server may do so for its prefill server's sake."""
        self._metrics.errors.labels(rejected.url, str(rejected.status)).inc()
        context.failed |= {reservation.prefill, reservation.decode}
        if rejected.status not in _BUSY and reservation.prefill.up:
            failures.answered(reservation.server(rejected.role), rejected.status)

    def _count_failure(self, server: Server) -> None:
        if not self._fleet.has_other(server):
            return  # a role is never emptied for failures alone
        if server.health.request_failed(self._clock.now_s()):
            self._metrics.ejections.labels(server.url, "outlier").inc()
            logger.warning("%s server %s is ejected: it fails requests", server.role, server.url)


async def _tell_when_left(receive: Receive, cancellation: Cancellation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    cancellation.interrupt(ClientLeft())
