"""Fewest requests: not yet prefilled on the one side, in flight on the other."""

from __future__ import annotations

from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.fleet.policies import Picked, RoutingPolicy, Servers, register
from sglang_kairos.router.fleet.prefix_index import Blocks


class LeastLoadPolicy(RoutingPolicy):
    """The least loaded server of each side; among equals one at random."""

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefills, decodes = servers
        prefill = self._least(prefills, lambda server: server.owed)
        return prefill, self._least(decodes, lambda server: server.running), None


register("least_load", LeastLoadPolicy)
