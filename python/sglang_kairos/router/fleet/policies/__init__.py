"""The ways to pick a pair: one file each, registered by the name that ``--policy`` takes.

A policy gets the servers that may be picked and says which. `fleet` then predicts what the picked
pair will do, so that overload is judged and measured alike under every policy. A new one is a file
here with a class and a call of `register`; the flag's choices are what is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import ClassVar, NamedTuple, TypeVar

from sglang_kairos.policy.placement import Pair, PlacedRequest
from sglang_kairos.router.fleet.prefix_index import Blocks
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.router.policy_names import POLICIES

T = TypeVar("T")
Servers = tuple[Sequence[PrefillServer], Sequence[DecodeServer]]
# A pair, and what the policy has predicted of it, if it has predicted anything to find it.
Picked = tuple[PrefillServer, DecodeServer, Pair | None]


class CacheRule(NamedTuple):
    """When a cached prefix decides, as in upstream's gateway: a match of `threshold` of the prompt.

    Not while the load is uneven: the fullest server has `balance_abs` requests more than the
    emptiest, and `balance_rel` times as many.
    """

    threshold: float = 0.3
    balance_abs: float = 64
    balance_rel: float = 1.5


_RULE = CacheRule()


class RoutingPolicy:
    """One policy. Neither side that it is given is ever empty."""

    # Whether it predicts for each server it is given: of a large fleet it is given a few only.
    predicts: ClassVar[bool] = False

    def __init__(self, rng: Random, rule: CacheRule = _RULE) -> None:
        self._rng, self._rule = rng, rule

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns the pair for a request whose prompt has these blocks."""
        raise NotImplementedError

    @classmethod
    def for_one_role(cls) -> type[RoutingPolicy]:
        """Returns the policy to use where another one picks the servers of the other role."""
        return cls

    def _least(self, servers: Sequence[T], load: Callable[[T], float]) -> T:
        least = min(load(server) for server in servers)
        return self._rng.choice([server for server in servers if load(server) == least])


class PolicyPerRole(RoutingPolicy):
    """One policy's prefill server, and another's decode server."""

    def __init__(self, prefill: RoutingPolicy, decode: RoutingPolicy) -> None:
        self._prefill, self._decode = prefill, decode

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefill = self._prefill.pick(servers, request, blocks)[0]
        return prefill, self._decode.pick(servers, request, blocks)[1], None


def register(name: str, policy: type[RoutingPolicy]) -> None:
    """Registers a policy. Raises ValueError if another one has the name."""
    POLICIES.add(name, policy)


def policy_of(prefill: str, decode: str, rng: Random, rule: CacheRule = _RULE) -> RoutingPolicy:
    """Returns the policy for one name per role; both may be the same. Raises KeyError."""
    first: type[RoutingPolicy] = POLICIES[prefill]
    second: type[RoutingPolicy] = POLICIES[decode]
    if first is second:
        return first(rng, rule)
    return PolicyPerRole(
        first.for_one_role()(rng, rule),
        second.for_one_role()(rng, rule),
    )
