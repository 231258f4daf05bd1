"""Both at random: what upstream's Python PD balancer does."""

from __future__ import annotations

from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.fleet.policies import Picked, RoutingPolicy, Servers, register
from sglang_kairos.router.fleet.prefix_index import Blocks


class RandomPolicy(RoutingPolicy):
    """Every server of a role is as likely as any other."""

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefills, decodes = servers
        return self._rng.choice(prefills), self._rng.choice(decodes), None


register("random", RandomPolicy)
