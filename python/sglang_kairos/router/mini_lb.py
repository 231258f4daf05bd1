"""``--policy kairos`` for upstream's Python PD balancer: what `patches/sglang-router-0.3.2` calls.

The same fleet, placement and watching as in our own router; everything else (one session per
request, no retries, headers dropped, errors hidden) stays as upstream has it. SLOs come from the
body only, since that balancer forwards no headers; the servers read them there as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.placement import OUTPUT_SHARE, PlacedRequest
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.poller import Watch
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer, Ticket
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.body import describe, prompt_blocks
from sglang_kairos.slo.body import CHAT, COMPLETIONS, GENERATE
from sglang_kairos.slo.request import request_slo
from sglang_kairos.slo.targets import SloError


@dataclass(slots=True)
class _Placed:
    """A request on the books of its pair."""

    request: PlacedRequest
    prefill: PrefillServer
    decode: DecodeServer
    ticket: Ticket
    ended: bool = False

    @property
    def grown(self) -> float:
        return self.request.tokens + self.request.output_tokens

    def prefilled(self) -> None:
        self.prefill.settle(self.ticket, time.monotonic(), served=True)

    def over(self) -> None:
        if self.ended:
            return
        self.ended = True
        self.prefill.settle(self.ticket, time.monotonic(), served=False)
        self.decode.leave(self.request.prompts, self.grown, self.request.tpot_s)


class Balancer:
    """Picks pairs for a ``MiniLoadBalancer``, on whose event loop it lives.

    `select_pair` is called in the task of a request, before one of the two methods that were
    wrapped by `followed`: that is how the two know of each other.
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
        self._watch: Watch | None = None
        self._placed: dict[asyncio.Task[Any], _Placed] = {}

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
            deadline_s=time.monotonic() + slo.ttft_ms / 1e3,
            output_tokens=OUTPUT_SHARE * prompt.output_tokens * prompt.samples,
            prompts=prompt.prompts * prompt.samples,
            handoff_s=fleet.handoff.value,
            tpot_s=slo.tpot_ms / 1e3,
            weight=slo.weight,
        )
        blocks = prompt_blocks(dict(body), path, fleet.bytes_per_token.value)
        found = fleet.choose(request, (), blocks)
        assert found is not None  # nobody is ever excluded here
        ticket = found.prefill.owe(
            request.tokens,
            request.deadline_s,
            time.monotonic(),
            found.cached_tokens,
            request.weight,
        )
        placed = _Placed(request, found.prefill, found.decode, ticket)
        found.decode.join(request.prompts, placed.grown, request.tpot_s)
        fleet.sent(found.prefill, blocks)
        task = asyncio.current_task()
        assert task is not None
        self._placed[task] = placed
        return found.prefill.url, found.prefill.bootstrap_port, found.decode.url

    def followed(self, serve: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """`serve`, which answers a request, with the end of prefill and of the request noticed."""

        async def wrapped(*args: Any, **named: Any) -> Any:
            task = asyncio.current_task()
            placed = self._placed.pop(task) if task in self._placed else None
            if placed is None or task is None:
                return await serve(*args, **named)
            streams = False
            try:
                response = await serve(*args, **named)
                streams = hasattr(response, "body_iterator")
                if streams:
                    response.body_iterator = _follow(response.body_iterator, placed)
                    # A client that leaves at once leaves an iterator that was never begun.
                    weakref.finalize(response, placed.over)
                else:
                    placed.prefilled()
                return response
            finally:
                if not streams:
                    placed.over()

        return wrapped

    def _start(self) -> None:
        """Look at the servers, from the first request on."""
        if self._watch is None:
            session = aiohttp.ClientSession()
            self._watch = Watch(self._fleet, session, self._options, RouterMetrics())
            self._watch.start()


async def _follow(chunks: AsyncIterator[bytes], placed: _Placed) -> AsyncIterator[bytes]:
    try:
        async with contextlib.aclosing(chunks) as source:  # type: ignore[type-var]
            async for chunk in source:
                placed.prefilled()
                yield chunk
    finally:
        placed.over()
