"""The servers behind the router: what each owes, how fast it is, whether it is there.

Everything runs on one event loop; times are `time.monotonic` seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import aiohttp

from sglang_kairos.policy.placement import (
    DecodeState,
    Pair,
    PlacedRequest,
    PrefillSpeed,
    PrefillState,
    StepCost,
    choose_pair,
)
from sglang_kairos.router.learn import Average, SpeedEstimate
from sglang_kairos.router.options import RouterOptions

logger = logging.getLogger(__name__)

DEFAULT_BOOTSTRAP_PORT = 8998
_POLL_TIMEOUT_S = 5.0
# A server that has nothing to tell is asked rarely: a look costs its scheduler a round trip.
_STOCK_POLL_S = 5.0
_RETRY_DOWN_S = 1.0


@dataclass(slots=True)
class Ticket:
    """A prompt that a prefill server owes: `work_s` as predicted when it was sent."""

    tokens: float
    deadline_s: float
    work_s: float
    sent_s: float


class Server:
    """One SGLang server, as far as both roles have it in common."""

    role: ClassVar[str] = ""

    def __init__(self, url: str) -> None:
        self.url = url
        self.down_until_s = 0.0
        self.kairos = False

    @property
    def up(self) -> bool:
        """False for a while after a connection to it was refused or lost."""
        return time.monotonic() >= self.down_until_s

    def mark_down(self) -> None:
        """Take no new requests until the next look at it, or for a second."""
        self.down_until_s = time.monotonic() + _RETRY_DOWN_S

    def learn(self, info: Mapping[str, Any]) -> None:
        """Take what /server_info tells; anything missing or odd is ignored."""
        self.kairos = any(True for _ in _reports(info))


class PrefillServer(Server):
    """`bootstrap_port` None means: as the server reports it."""

    role = "prefill"

    def __init__(self, url: str, bootstrap_port: int | None) -> None:
        super().__init__(url)
        self.host = urlsplit(url).hostname or ""
        self._given_port = bootstrap_port
        self._reported_port = DEFAULT_BOOTSTRAP_PORT
        self._estimate = SpeedEstimate(PrefillSpeed())
        self._reported_speed: PrefillSpeed | None = None
        self._speed = PrefillSpeed()
        self._busy_since_s = 0.0
        # Parallel lists, by deadline: `policy.placement` reads them as they are.
        self._tickets: list[Ticket] = []
        self._deadlines: list[float] = []
        self._works: list[float] = []

    @property
    def bootstrap_port(self) -> int:
        """Port of the server's bootstrap service."""
        return self._given_port or self._reported_port

    @property
    def owed(self) -> int:
        """Requests sent to it that have not been prefilled."""
        return len(self._tickets)

    def owe(self, tokens: float, deadline_s: float, now_s: float) -> Ticket:
        """The server was just sent a prompt; `settle` takes the ticket back."""
        ticket = Ticket(tokens, deadline_s, self._speed.work_s(tokens), now_s)
        if not self._tickets:
            self._busy_since_s = now_s
        place = bisect_right(self._deadlines, deadline_s)
        self._tickets.insert(place, ticket)
        self._deadlines.insert(place, deadline_s)
        self._works.insert(place, ticket.work_s)
        return ticket

    def settle(self, ticket: Ticket, now_s: float, served: bool) -> None:
        """The prompt is prefilled (`served`) or gone. Settling twice does nothing."""
        place = bisect_left(self._deadlines, ticket.deadline_s)
        while place < len(self._tickets) and self._tickets[place] is not ticket:
            place += 1
        if place == len(self._tickets):
            return
        del self._tickets[place], self._deadlines[place], self._works[place]
        if served:
            self._busy_since_s = now_s
            self._estimate.finished(ticket.tokens, ticket.sent_s, now_s)
            self._speed = self._reported_speed or self._estimate.speed()

    def state(self, now_s: float) -> PrefillState:
        """As `policy.placement` sees it now. Valid until the next owe or settle."""
        progress = min(now_s - self._busy_since_s, self._works[0]) if self._works else 0.0
        return PrefillState(self._speed, self._deadlines, self._works, progress, self.kairos)

    def learn(self, info: Mapping[str, Any]) -> None:
        """Also: bootstrap port, chunk size and, from a Kairos server, its own speed."""
        super().learn(info)
        self._reported_port = int(
            _number(info, "disaggregation_bootstrap_port", 1, 65535) or self._reported_port
        )
        chunk = _number(info, "chunked_prefill_size", 1, 1e9)
        if chunk:
            self._estimate.set_chunk(int(chunk))
        for report in _reports(info):
            law = _law(report.get("prefill"))
            if law:
                self._reported_speed = PrefillSpeed(*law, self._estimate.speed().chunk_tokens)
        self._speed = self._reported_speed or self._estimate.speed()

    def describe(self) -> dict[str, Any]:
        """For the router's own /server_info."""
        return {
            "url": self.url,
            "up": self.up,
            "kairos": self.kairos,
            "owed_requests": len(self._tickets),
            "owed_s": round(sum(self._works), 6),
            "speed": [self._speed.a_s, self._speed.b_s, self._speed.c_s],
        }


class DecodeServer(Server):
    """`running` and `tokens`: requests and KV tokens this router has in flight there."""

    role = "decode"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.running = 0
        self.tokens = 0.0
        self._cost = StepCost()
        self._capacity = math.inf

    def join(self, requests: int, tokens: float) -> None:
        """Requests were just sent; `leave` with the same numbers takes them out."""
        self.running += requests
        self.tokens += tokens

    def leave(self, requests: int, tokens: float) -> None:
        """See `join`."""
        self.running -= requests
        self.tokens -= tokens

    def state(self) -> DecodeState:
        """As `policy.placement` sees it now."""
        return DecodeState(self._cost, self.running, self.tokens, self._capacity)

    def learn(self, info: Mapping[str, Any]) -> None:
        """Also: KV size and, from a Kairos server, its step cost."""
        super().learn(info)
        states = info.get("internal_states")
        ranks = len(states) if isinstance(states, list) else 1
        capacity = _number(info, "max_total_num_tokens", 1, 1e15)
        if capacity:
            self._capacity = capacity * max(1, ranks)
        for report in _reports(info):
            law = _law(report.get("decode"))
            if law:
                self._cost = StepCost(*law)

    def describe(self) -> dict[str, Any]:
        """For the router's own /server_info."""
        return {
            "url": self.url,
            "up": self.up,
            "kairos": self.kairos,
            "running": self.running,
            "tokens": round(self.tokens),
        }


S = TypeVar("S", bound=Server)


class Fleet:
    """All servers, the choice among them, and the loop that looks at them."""

    def __init__(self, options: RouterOptions) -> None:
        self.prefills = [PrefillServer(url, port) for url, port in options.prefills]
        self.decodes = [DecodeServer(url) for url in options.decodes]
        self.rng = Random(options.seed)
        self.handoff = Average(30e-3)
        self.bytes_per_token = Average(4.0)
        self._policy = options.policy
        self._poll_s = options.poll_s
        self._api_key = options.api_key
        self._turn = itertools.count()

    @property
    def servers(self) -> list[PrefillServer | DecodeServer]:
        """Prefill servers, then decode servers."""
        return [*self.prefills, *self.decodes]

    @property
    def ready(self) -> bool:
        """Whether a pair can be formed of servers that are up."""
        return any(s.up for s in self.prefills) and any(s.up for s in self.decodes)

    def choose(
        self, request: PlacedRequest, tried: Iterable[Server] = ()
    ) -> tuple[PrefillServer, DecodeServer, float] | None:
        """The pair for a request and its predicted TTFT (seconds from now).

        Servers in `tried` are never chosen again; servers that are down only when no other is left.
        None when a side has nobody left.
        """
        excluded = set(tried)
        prefills = _candidates(self.prefills, excluded)
        decodes = _candidates(self.decodes, excluded)
        if not prefills or not decodes:
            return None
        now = time.monotonic()
        if self._policy == "random":
            prefills, decodes = [self.rng.choice(prefills)], [self.rng.choice(decodes)]
        elif self._policy == "round_robin":
            turn = next(self._turn)
            prefills = [prefills[turn % len(prefills)]]
            decodes = [decodes[turn // len(prefills) % len(decodes)]]
        pair: Pair | None = choose_pair(
            [server.state(now) for server in prefills],
            [server.state() for server in decodes],
            request,
            self.rng,
        )
        if pair is None:
            return None
        return prefills[pair.prefill], decodes[pair.decode], pair.ttft_s

    async def watch(self, session: aiohttp.ClientSession) -> None:
        """Look at every server for ever; cancel to stop."""
        async with asyncio.TaskGroup() as group:
            for server in self.servers:
                group.create_task(self._watch(session, server))

    async def _watch(
        self, session: aiohttp.ClientSession, server: PrefillServer | DecodeServer
    ) -> None:
        was_up = True
        while True:
            try:
                await self._look(session, server)
                server.down_until_s = 0.0
            except Exception as error:  # this loop must outlive whatever a server answers
                if is_unreachable(error):
                    server.down_until_s = time.monotonic() + 4 * self._poll_s
            if server.up != was_up:
                was_up = server.up
                logger.warning("%s %s is %s", server.role, server.url, "up" if was_up else "down")
            silent = was_up and not server.kairos
            await asyncio.sleep(max(self._poll_s, _STOCK_POLL_S) if silent else self._poll_s)

    async def _look(
        self, session: aiohttp.ClientSession, server: PrefillServer | DecodeServer
    ) -> None:
        headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        timeout = aiohttp.ClientTimeout(total=_POLL_TIMEOUT_S)
        url = server.url + "/server_info"
        async with session.get(url, timeout=timeout, headers=headers) as response:
            info = await response.json(content_type=None)
            if response.status == 200 and isinstance(info, dict):
                server.learn(info)


def is_unreachable(error: BaseException) -> bool:
    """Whether an error means that nobody answers there, rather than slowly or badly."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return True
    if isinstance(error, TimeoutError):
        return False
    return isinstance(error, aiohttp.ClientConnectionError | OSError)


def _candidates(servers: list[S], excluded: set[Server]) -> list[S]:
    left = [server for server in servers if server not in excluded]
    return [server for server in left if server.up] or left


def _reports(info: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    states = info.get("internal_states")
    for state in states if isinstance(states, list) else ():
        report = state.get("kairos") if isinstance(state, Mapping) else None
        if isinstance(report, Mapping):
            yield report


def _law(raw: Any) -> tuple[float, float, float] | None:
    """(a_s, b_s, c_s) of a report, or None unless all three make sense."""
    if not isinstance(raw, Mapping):
        return None
    found = [_number(raw, key, 0.0, 1e3) for key in ("a_s", "b_s", "c_s")]
    a, b, c = found
    if a is None or b is None or c is None or a + b <= 0.0:
        return None
    return a, b, c


def _number(raw: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if low <= value <= high else None
