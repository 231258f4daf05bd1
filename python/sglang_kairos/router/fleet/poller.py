"""Looks at the servers: are they there, how fast are they, what do they hold.

Probe and report are one call, ``/server_info``: it goes through the scheduler, so a hung one does
not answer. That costs the scheduler a round trip. Between two calls the poller waits 100 times
as long as the fastest of the last answers took: below 1 % of the server's time. In between
``/v1/loads`` is asked, which SGLang answers from shared memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any

import aiohttp

from sglang_kairos.router.errors import ServerFailed, ServerGone
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.outliers import is_unreachable, own_shortage
from sglang_kairos.router.fleet.server_info import load_of
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.router.metrics import RouterMetrics
from sglang_kairos.router.options import RouterOptions

logger = logging.getLogger(__name__)

_INFO_EVERY_S = 2.0
_INFO_SHARE = 100.0
_INFO_AT_LEAST_S = 30.0
_LOADS = "/v1/loads?include=core"

AnyServer = PrefillServer | DecodeServer


class Poller:
    """One task per server, from `start` to `stop`."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        options: RouterOptions,
        metrics: RouterMetrics,
    ) -> None:
        self._fleet, self._session, self._metrics = fleet, session, metrics
        self._now_s = fleet.clock.now_s
        self._poll_s, self._info_every_s = options.poll_s, max(_INFO_EVERY_S, options.probe_s)
        self._heeded, self._enough = options.probes, options.probe_successes
        self._answered: dict[AnyServer, int] = {}
        self._timeout = aiohttp.ClientTimeout(total=options.probe_timeout_s)
        key = options.api_key
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._tasks: dict[AnyServer, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Look at every server of the fleet."""
        for server in self._fleet.servers:
            self.add(server)

    def add(self, server: AnyServer) -> None:
        """Look at one more."""
        self._tasks[server] = asyncio.create_task(self._poll(server))

    def drop(self, server: AnyServer) -> None:
        """Look at it no more."""
        self._answered.pop(server, None)
        task = self._tasks.pop(server, None)
        if task is not None:
            task.cancel()

    async def stop(self) -> None:
        """Look at nobody any more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def _poll(self, server: AnyServer) -> None:
        was = True, server.misplaced
        info_due_s = 0.0
        took: deque[float] = deque(maxlen=5)
        while True:
            began = self._now_s()
            try:
                if began >= info_due_s or server.health.gone or server.misplaced:
                    await self._info(server)
                    now = self._now_s()
                    took.append(now - began)
                    spacing = min(_INFO_SHARE * min(took), _INFO_AT_LEAST_S)
                    info_due_s = now + max(self._info_every_s, spacing)
                await self._loads(server)
            except Exception as error:  # this loop must outlive whatever a server answers
                info_due_s = 0.0
                self._failed(server, error)
            now_is = server.up, server.misplaced
            if now_is != was:
                was = now_is
                why = f": {server.misplaced}" if server.misplaced else ""
                word = "up" if server.up else "down"
                logger.warning("%s %s is %s%s", server.role, server.url, word, why)
            await asyncio.sleep(self._poll_s * self._fleet.rng.uniform(0.8, 1.2))

    async def _info(self, server: AnyServer) -> None:
        status, info = await self._get(server, "/server_info")
        self._answered[server] = self._answered.get(server, 0) + 1
        if not server.health.gone or self._answered[server] >= self._enough:
            server.health.probe_answered()
        self._allowed(server, status)
        if status == 200 and isinstance(info, dict):
            before = server.misplaced
            server.learn(info)
            self._fleet.learn_limits()
            if server.misplaced and not before:
                # What was sent there before its role was known waits for what never comes.
                server.cut(ServerFailed(server, ServerGone(server.misplaced)))
        server.looked_at = True

    def _allowed(self, server: AnyServer, status: int) -> None:
        """Say once that a server refuses the router's key. It may well serve clients with theirs."""
        denied = None
        if status in (401, 403):
            fault = "is not one it takes" if self._headers else "is missing"
            denied = (
                f"it answers {status} to the router's probes, its load and speed are unknown: "
                f"--api-key of the router {fault}"
            )
        if denied and not server.denied:
            logger.warning("%s %s: %s", server.role, server.url, denied)
        server.denied = denied

    async def _loads(self, server: AnyServer) -> None:
        status, answer = await self._get(server, _LOADS)
        server.learn_load(load_of(answer) if status == 200 else None, self._now_s())

    async def _get(self, server: AnyServer, path: str) -> tuple[int, Any]:
        async with self._session.get(
            server.url + path, timeout=self._timeout, headers=self._headers
        ) as response:
            try:
                return response.status, await response.json(content_type=None)
            except ValueError:
                return response.status, None

    def _failed(self, server: AnyServer, error: BaseException) -> None:
        if own_shortage(error):
            return  # it says nothing about the server
        refused = is_unreachable(error)
        if not isinstance(error, aiohttp.ClientError | OSError):  # TimeoutError is an OSError
            logger.warning("%s %s: odd answer: %r", server.role, server.url, error)
            return
        self._answered[server] = 0
        if not self._heeded:
            return
        if server.health.probe_failed(refused):
            server.misplaced = None  # whatever comes back there
            reason = "unreachable" if refused else "silent"
            self._metrics.ejections.labels(server.url, reason).inc()
            # A silent one may be compiling a kernel. Where nobody else could take its requests
            # over they are better left with it, each until its own time-out.
            if refused or self._fleet.has_other(server):
                server.cut(ServerFailed(server, ServerGone(f"{reason}: {error!r}")))
