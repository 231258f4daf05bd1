"""The ways to pick a pair, by the names of ``--policy``.

Each gets the servers that may be picked and says which; `fleet` then predicts what the picked pair
will do, so that overload is judged and measured alike under every policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from sglang_kairos.policy.placement import Pair, PlacedRequest, choose_pair
from sglang_kairos.router.fleet.prefix_index import Blocks
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer

T = TypeVar("T")
Servers = tuple[Sequence[PrefillServer], Sequence[DecodeServer]]


class CacheRule(NamedTuple):
    """As in upstream's gateway: a match of `threshold` of a prompt decides, unless the load is
    uneven: the fullest server has `balance_abs` requests more than the emptiest, and `balance_rel`
    times as many."""

    threshold: float = 0.3
    balance_abs: float = 64
    balance_rel: float = 1.5


_RULE = CacheRule()


class Choice(NamedTuple):
    """A pair; `predicted` if the policy has predicted anything to find it."""

    prefill: PrefillServer
    decode: DecodeServer
    predicted: Pair | None = None


class Chooser:
    """One policy. Both sides given are never empty."""

    def __init__(self, rng: Random, rule: CacheRule = _RULE) -> None:
        self._rng, self._rule = rng, rule

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        """The pair for a request."""
        raise NotImplementedError

    def _least(self, servers: Sequence[T], load: Callable[[T], float]) -> T:
        least = min(load(server) for server in servers)
        return self._rng.choice([server for server in servers if load(server) == least])


class Kairos(Chooser):
    """By predicted completion: `policy.placement`."""

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills, decodes = servers
        now = request.now_s
        pair = choose_pair(
            [server.state(now, request.handoff_s, blocks) for server in prefills],
            [server.state(now) for server in decodes],
            request,
            self._rng,
        )
        assert pair is not None
        return Choice(prefills[pair.prefill], decodes[pair.decode], pair)


class Uniform(Chooser):
    """Both at random: what upstream's Python PD balancer does."""

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills, decodes = servers
        return Choice(self._rng.choice(prefills), self._rng.choice(decodes))


class RoundRobin(Chooser):
    """Prefill servers in turn, and every decode server with every prefill server."""

    def __init__(self, rng: Random, rule: CacheRule = _RULE) -> None:
        super().__init__(rng, rule)
        self._turn = itertools.count()

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills, decodes = servers
        turn = next(self._turn)
        return Choice(prefills[turn % len(prefills)], decodes[turn // len(prefills) % len(decodes)])


class LeastLoad(Chooser):
    """Fewest requests: not yet prefilled on the one side, in flight on the other."""

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills, decodes = servers
        return Choice(
            self._least(prefills, lambda server: server.owed),
            self._least(decodes, lambda server: server.running),
        )


class PowerOfTwo(LeastLoad):
    """The less loaded of two drawn at random, on each side."""

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills, decodes = servers
        few = self._rng.sample(list(prefills), min(2, len(prefills)))
        some = self._rng.sample(list(decodes), min(2, len(decodes)))
        return super().choose((few, some), request, blocks)


class CacheAware(LeastLoad):
    """The prefill server with the longest match in its cache, or the least loaded one when no match
    is long or the load is uneven (upstream's gateway's rule and thresholds)."""

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills = servers[0]
        prefill, decode, _ = super().choose(servers, request, blocks)
        most = max(server.owed for server in prefills)
        least = min(server.owed for server in prefills)
        rule = self._rule
        if most - least > rule.balance_abs and most > rule.balance_rel * least:
            return Choice(prefill, decode)
        best = max(prefills, key=lambda server: server.prefix.cached_tokens(blocks))
        if best.prefix.cached_tokens(blocks) >= rule.threshold * max(1.0, request.tokens):
            prefill = best
        return Choice(prefill, decode)


CHOOSERS: dict[str, type[Chooser]] = {
    "kairos": Kairos,
    "random": Uniform,
    "round_robin": RoundRobin,
    "least_load": LeastLoad,
    "power_of_two": PowerOfTwo,
    "cache_aware": CacheAware,
}


class InTurn(RoundRobin):
    """Each side's servers in turn, whatever the other side does."""

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefills, decodes = servers
        turn = next(self._turn)
        return Choice(prefills[turn % len(prefills)], decodes[turn % len(decodes)])


class PerRole(Chooser):
    """One policy's prefill server, and another's decode server."""

    def __init__(self, prefill: Chooser, decode: Chooser) -> None:
        self._prefill, self._decode = prefill, decode

    def choose(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Choice:
        prefill = self._prefill.choose(servers, request, blocks).prefill
        return Choice(prefill, self._decode.choose(servers, request, blocks).decode)


def chooser_of(prefill: str, decode: str, rng: Random, rule: CacheRule = _RULE) -> Chooser:
    """The chooser for a policy per role; both may be the same."""
    if prefill == decode:
        return CHOOSERS[prefill](rng, rule)
    kinds = {**CHOOSERS, "round_robin": InTurn}
    return PerRole(kinds[prefill](rng, rule), kinds[decode](rng, rule))
