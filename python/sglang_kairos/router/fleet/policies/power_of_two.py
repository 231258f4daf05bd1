"""The less loaded of two servers drawn at random, on each side (Mitzenmacher 2001)."""

from __future__ import annotations

from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.fleet.policies import Picked, Servers, register
from sglang_kairos.router.fleet.policies.least_load import LeastLoadPolicy
from sglang_kairos.router.fleet.prefix_index import Blocks


class PowerOfTwoPolicy(LeastLoadPolicy):
    """As `least_load`, among two of each side."""

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefills, decodes = servers
        few = self._rng.sample(list(prefills), min(2, len(prefills)))
        some = self._rng.sample(list(decodes), min(2, len(decodes)))
        return super().pick((few, some), request, blocks)


register("power_of_two", PowerOfTwoPolicy)
