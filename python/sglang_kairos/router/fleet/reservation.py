"""A request's place on the books of one prefill and one decode server.

    with fleet.reserve(request, blocks=blocks) as reservation:
        …                            # both servers count the request
        reservation.prefilled()      # its KV is computed: prefill has no more to do for it
        …
    # neither server counts it, however the block ended

The router, upstream's mini-lb (`router.mini_lb`) and the simulator use this one class. Nobody else
writes the books (`PrefillServer.enqueue`, `dequeue`; `DecodeServer.admit`, `release`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from sglang_kairos.policy.overload import OverloadOutcome
from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.cancellation import Cancellation
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer, QueuedPrompt, Server

_ON_TIME = OverloadOutcome(0.0, True, True)


class Reservation:
    """The pair chosen for `request`; its servers count it from `take` to `release`.

    `outcome` and `tpot_s` are predicted (seconds). `cached_tokens`: prompt tokens that prefill's
    cache should hold. `now_s` tells the time; `sent` is called when the servers begin to count.
    """

    __slots__ = (
        "_cancellation",
        "_now_s",
        "_queued",
        "_sent",
        "_taken",
        "cached_tokens",
        "decode",
        "outcome",
        "prefill",
        "request",
        "tpot_s",
    )

    def __init__(
        self,
        prefill: PrefillServer,
        decode: DecodeServer,
        request: PlacedRequest,
        now_s: Callable[[], float],
        cached_tokens: float = 0.0,
        outcome: OverloadOutcome = _ON_TIME,
        tpot_s: float = 0.0,
        sent: Callable[[], None] | None = None,
    ) -> None:
        self.prefill, self.decode, self.request = prefill, decode, request
        self.cached_tokens, self.outcome, self.tpot_s = cached_tokens, outcome, tpot_s
        self._now_s, self._sent = now_s, sent
        self._cancellation: Cancellation | None = None
        self._queued: QueuedPrompt | None = None
        self._taken = False

    def server(self, role: str) -> Server:
        """Returns the server of that role."""
        return self.prefill if role == self.prefill.role else self.decode

    def take(self, cancellation: Cancellation | None = None) -> Reservation:
        """Both servers count the request from now on; once is enough.

        A server that goes away meanwhile interrupts `cancellation`.
        """
        if self._taken:
            return self
        self._taken = True
        request = self.request
        self._queued = self.prefill.enqueue(
            request.tokens, request.deadline_s, self._now_s(), self.cached_tokens, request.weight
        )
        self.decode.admit(request.prompts, self._grown_tokens, request.tpot_s)
        if self._sent is not None:
            self._sent()
        if cancellation is not None:
            self._cancellation = cancellation
            self.prefill.attempts.add(cancellation)
            self.decode.attempts.add(cancellation)
        return self

    def prefilled(self) -> None:
        """The prompt's KV is computed; prefill may go away from now on."""
        self._dequeue(served=True)
        self.prefill.health.request_answered()
        self.leave_prefill()

    def leave_prefill(self) -> None:
        """What becomes of the prefill server is no concern of the request any more."""
        if self._cancellation is not None:
            self.prefill.attempts.discard(self._cancellation)

    def release(self) -> None:
        """Neither server counts the request any more; once is enough."""
        if not self._taken:
            return
        self._taken = False
        self._dequeue(served=False)
        request = self.request
        self.decode.release(request.prompts, self._grown_tokens, request.tpot_s)
        self.leave_prefill()
        if self._cancellation is not None:
            self.decode.attempts.discard(self._cancellation)

    def __enter__(self) -> Reservation:
        return self.take()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def _grown_tokens(self) -> float:
        """KV tokens that decode will hold for it at the end."""
        return self.request.tokens + self.request.output_tokens

    def _dequeue(self, *, served: bool) -> None:
        queued, self._queued = self._queued, None
        if queued is not None:
            self.prefill.dequeue(queued, self._now_s(), served)
