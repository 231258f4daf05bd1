"""Servers in turn."""

from __future__ import annotations

import itertools
from random import Random

from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.fleet.policies import (
    CacheRule,
    Picked,
    RoutingPolicy,
    Servers,
    register,
)
from sglang_kairos.router.fleet.prefix_index import Blocks


class RoundRobinPolicy(RoutingPolicy):
    """Prefill servers in turn, and every decode server with every prefill server."""

    def __init__(self, rng: Random, rule: CacheRule) -> None:
        super().__init__(rng, rule)
        self._turn = itertools.count()

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefills, decodes = servers
        turn = next(self._turn)
        return prefills[turn % len(prefills)], decodes[turn // len(prefills) % len(decodes)], None

    @classmethod
    def for_one_role(cls) -> type[RoutingPolicy]:
        """Returns the policy that does not count the other role's servers."""
        return RoundRobinPerRole


class RoundRobinPerRole(RoundRobinPolicy):
    """Each side's servers in turn, whatever the other side does."""

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefills, decodes = servers
        turn = next(self._turn)
        return prefills[turn % len(prefills)], decodes[turn % len(decodes)], None


register("round_robin", RoundRobinPolicy)
