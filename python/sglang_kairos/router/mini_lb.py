"""``--policy kairos`` for upstream's Python PD balancer: what `patches/sglang-router-0.3.2` calls.

The same fleet, placement and polling as in our own router. Everything else stays as upstream has it:
one session per request, no retries, headers dropped, errors hidden. SLOs come from the
body only, since that balancer forwards no headers; the servers read them there as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.placement import OUTPUT_SHARE, PlacedRequest
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.poller import Poller
from sglang_kairos.router.fleet.reservation import Reservation
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.body import describe, prompt_blocks
from sglang_kairos.slo.body import CHAT, COMPLETIONS, GENERATE
from sglang_kairos.slo.request import request_slo
from sglang_kairos.slo.targets import SloError


class Balancer:
    """Picks pairs for a ``MiniLoadBalancer``, on whose event loop it lives.

    `select_pair` is called in the task of a request. One of the two methods that were wrapped by
    `followed` comes after it in the same task, and finds the reservation by that.
    """

    def __init__(
        self,
        prefills: Sequence[tuple[str, int | None]],
        decodes: Sequence[str],
        api_key: str | None = None,
    ) -> None:
        self._options = RouterOptions(
            prefills=tuple((url.rstrip("/"), port) for url, port in prefills),
            decodes=tuple(url.rstrip("/") for url in decodes),
            api_key=api_key or "",
        )
        self._fleet = Fleet(self._options)
        self._table = KairosConfig.from_env().slo_table()
        self._poller: Poller | None = None
        self._reserved: dict[asyncio.Task[Any], Reservation] = {}

    def select_pair(self, body: Mapping[str, Any]) -> tuple[str, int, str]:
        """Prefill URL, its bootstrap port and decode URL for a request with this body."""
        self._start()
        path = CHAT if "messages" in body else COMPLETIONS if "prompt" in body else GENERATE
        fleet, prompt = self._fleet, describe(dict(body), path)
        try:
            slo = request_slo(dict(body), {}, self._table) or self._table.default
        except SloError:
            slo = self._table.default  # the servers will answer 400
        request = PlacedRequest(
            tokens=prompt.tokens + prompt.text_bytes / fleet.bytes_per_token.value,
            deadline_s=fleet.clock.now_s() + slo.ttft_ms / 1e3,
            output_tokens=OUTPUT_SHARE * prompt.output_tokens * prompt.samples,
            prompts=prompt.prompts * prompt.samples,
            handoff_s=fleet.handoff.value,
            tpot_s=slo.tpot_ms / 1e3,
            weight=slo.weight,
        )
        blocks = prompt_blocks(dict(body), path, fleet.bytes_per_token.value)
        reservation = fleet.reserve(request, (), blocks)
        assert reservation is not None, "nobody is ever excluded here"
        task = asyncio.current_task()
        assert task is not None
        self._reserved[task] = reservation.take()
        prefill = reservation.prefill
        return prefill.url, prefill.bootstrap_port, reservation.decode.url

    def followed(self, serve: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """`serve`, which answers a request, with the end of prefill and of the request noticed."""

        async def wrapped(*args: Any, **named: Any) -> Any:
            task = asyncio.current_task()
            reservation = self._reserved.pop(task, None) if task is not None else None
            if reservation is None:
                return await serve(*args, **named)
            streams = False
            try:
                response = await serve(*args, **named)
                streams = hasattr(response, "body_iterator")
                if streams:
                    response.body_iterator = _follow(response.body_iterator, reservation)
                    # A client that leaves at once leaves an iterator that was never begun.
                    weakref.finalize(response, reservation.release)
                else:
                    reservation.prefilled()
                return response
            finally:
                if not streams:
                    reservation.release()

        return wrapped

    def _start(self) -> None:
        """Look at the servers, from the first request on."""
        if self._poller is None:
            session = aiohttp.ClientSession()
            self._poller = Poller(self._fleet, session, self._options, RouterMetrics())
            self._poller.start()


async def _follow(chunks: AsyncIterator[bytes], reservation: Reservation) -> AsyncIterator[bytes]:
    try:
        async with contextlib.aclosing(chunks) as source:  # type: ignore[type-var]
            async for chunk in source:
                reservation.prefilled()
                yield chunk
    finally:
        reservation.release()
