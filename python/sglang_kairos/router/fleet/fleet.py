"""The servers behind the router, and the choice among them.

Everything runs on one event loop; times are seconds of the router's clock.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from random import Random
from typing import TypeVar

from sglang_kairos.policy.overload import OverloadOutcome
from sglang_kairos.policy.placement import DRAWN, LOOK_AT_ALL, PlacedRequest, choose_pair
from sglang_kairos.router.clock import SYSTEM_CLOCK, Clock
from sglang_kairos.router.fleet.estimators import Average, Margin
from sglang_kairos.router.fleet.policies import CacheRule, policy_of
from sglang_kairos.router.fleet.prefix_index import Blocks
from sglang_kairos.router.fleet.reservation import Reservation
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer, Server
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.policy_names import POLICIES
from sglang_kairos.slo.limits import NO_LIMITS, RequestLimits

S = TypeVar("S", bound=Server)

_NO_BLOCKS = Blocks()
# Prompts whose first block's server is remembered, for fleets too large to ask everybody.
_HOMES = 50_000


class Fleet:
    """All servers, what has been learnt of them together, and the choice among them."""

    def __init__(self, options: RouterOptions, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self._rules, self._now_s = options.health, clock.now_s
        self.prefills: list[PrefillServer] = []
        self.decodes: list[DecodeServer] = []
        for url, port in options.prefills:
            self.add_prefill(url, port)
        for url in options.decodes:
            self.add_decode(url)
        self.rng = Random(options.seed)
        self.handoff = Average(30e-3)
        self.bytes_per_token = Average(4.0)
        self.margin = Margin()
        names = (
            options.prefill_policy or options.policy,
            options.decode_policy or options.policy,
        )
        rule = CacheRule(
            options.cache_threshold, options.balance_abs_threshold, options.balance_rel_threshold
        )
        self._policy = policy_of(*names, self.rng, rule)
        # Whose policy compares all servers by a prediction each.
        roles = zip(("prefill", "decode"), names, strict=True)
        self._sampled = {role for role, name in roles if POLICIES[name].predicts}
        self.limits = NO_LIMITS
        self._uneven = False
        self._homes: OrderedDict[int, PrefillServer] = OrderedDict()

    @property
    def servers(self) -> list[PrefillServer | DecodeServer]:
        """Prefill servers, then decode servers."""
        return [*self.prefills, *self.decodes]

    def learn_limits(self) -> None:
        """After a server has told of itself: what a request may be for somebody here to hold it."""
        known = [server.limits for server in self.servers]
        longest = [server.limits.longest_prompt for server in self.decodes]
        fitting = NO_LIMITS
        if longest and None not in longest:
            fitting = max(
                (server.limits for server in self.decodes),
                key=lambda limits: limits.longest_prompt or 0,
            )
        self._uneven = len(set(longest)) > 1
        self.limits = RequestLimits(
            vocabulary=max((each.vocabulary for each in known if each.vocabulary), default=None),
            context_tokens=fitting.context_tokens,
            kv_tokens=fitting.kv_tokens,
            reserved_tokens=fitting.reserved_tokens,
            page_tokens=fitting.page_tokens,
        )

    @property
    def ready(self) -> bool:
        """Whether a pair can be formed of servers that are there. One that is ejected for failing
        requests still gets them while nobody else of its role is left."""
        return any(s.there for s in self.prefills) and any(s.there for s in self.decodes)

    @property
    def met(self) -> bool:
        """As `ready`, and one of each role has been looked at: whether it has that role is known."""
        return self.ready and all(
            any(s.looked_at and not s.misplaced for s in role)
            for role in (self.prefills, self.decodes)
        )

    @property
    def problems(self) -> dict[str, str]:
        """What somebody should mend, by URL."""
        return {server.url: server.problem for server in self.servers if server.problem}

    @property
    def nobody(self) -> str:
        """Why there is no pair, in words."""
        lost = [f"{s.role} {s.url}: {s.misplaced}" for s in self.servers if s.misplaced]
        return "; ".join(["no server", *lost])

    def find(self, url: str) -> PrefillServer | DecodeServer | None:
        """The server of that URL."""
        return next((server for server in self.servers if server.url == url), None)

    def add_prefill(self, url: str, bootstrap_port: int | None) -> PrefillServer:
        """A new prefill server; it takes requests from now on."""
        server = PrefillServer(url, bootstrap_port, self._rules, self._now_s)
        self.prefills.append(server)
        return server

    def add_decode(self, url: str) -> DecodeServer:
        """A new decode server; it takes requests from now on."""
        server = DecodeServer(url, self._rules, self._now_s)
        self.decodes.append(server)
        return server

    def remove(self, server: Server) -> None:
        """Forget a server; requests that it is serving are served to their end."""
        self.prefills = [one for one in self.prefills if one is not server]
        self.decodes = [one for one in self.decodes if one is not server]

    def others(self, server: Server) -> int:
        """How many other servers of its role are up."""
        return sum(s.up for s in self.servers if s.role == server.role and s is not server)

    def has_other(self, server: Server) -> bool:
        """Whether another server of its role is up."""
        return self.others(server) > 0

    def reserve(
        self, request: PlacedRequest, tried: Iterable[Server] = (), blocks: Blocks = _NO_BLOCKS
    ) -> Reservation | None:
        """The pair for a request; without `now_s`, for one that is placed now.

        Returns a reservation that its servers count from ``with`` (or `take`) on.

        Servers in `tried` are never chosen again, nor are those being removed or of another role.
        Servers that are down are chosen only when no other is left. None when a side has nobody left.
        """
        excluded = set(tried)
        prefills = self._candidates(self.prefills, excluded)
        decodes = self._candidates(self.decodes, excluded)
        if self._uneven and request.prompts == 1:
            decodes = [one for one in decodes if _holds(one, request.tokens)] or decodes
        if not prefills or not decodes:
            return None
        if len(self.prefills) > LOOK_AT_ALL and blocks.hashes:
            home = self._homes.get(blocks.hashes[0])
            if home is not None and home not in excluded and home.up and home not in prefills:
                prefills = [*prefills, home]
        if request.now_s == -math.inf:
            request = request._replace(now_s=self._now_s(), margin_s=self.margin.value_s)
        now = request.now_s
        prefill, decode, pair = self._policy.pick((prefills, decodes), request, blocks)
        if pair is None:
            state = prefill.state(now, request.handoff_s, blocks)
            pair = choose_pair([state], [decode.state(now)], request)
            assert pair is not None
        outcome = OverloadOutcome(
            pair.ttft_s,
            pair.keeps_ttft or not prefill.known,
            pair.keeps_tpot or not decode.known,
        )
        cached = prefill.prefix.cached_tokens(blocks)
        return Reservation(
            prefill,
            decode,
            request,
            self._now_s,
            cached,
            outcome,
            pair.tpot_s,
            partial(self._sent, prefill, blocks),
        )

    def _sent(self, prefill: PrefillServer, blocks: Blocks) -> None:
        """A prompt was sent there, so its beginning will be in that cache."""
        if not blocks.hashes:
            return
        prefill.prefix.add(blocks)
        if len(self.prefills) > LOOK_AT_ALL:
            self._homes[blocks.hashes[0]] = prefill
            self._homes.move_to_end(blocks.hashes[0])
            if len(self._homes) > _HOMES:
                self._homes.popitem(last=False)

    def _candidates(self, servers: list[S], excluded: set[Server]) -> list[S]:
        """Who may be picked; of a large fleet only a few, drawn at random."""
        if len(servers) > LOOK_AT_ALL and servers[0].role in self._sampled:
            found: dict[Server, S] = {}
            for _ in range(4 * DRAWN):
                server = servers[int(self.rng.random() * len(servers))]
                if server not in found and server not in excluded and server.up:
                    found[server] = server
                    if len(found) == DRAWN:
                        return list(found.values())
        left = [s for s in servers if s not in excluded and not s.draining and not s.misplaced]
        now = self._now_s()
        return [server for server in left if server.health.takes_requests(now)] or left


def _holds(decode: DecodeServer, tokens: float) -> bool:
    longest = decode.limits.longest_prompt
    return longest is None or tokens <= longest
