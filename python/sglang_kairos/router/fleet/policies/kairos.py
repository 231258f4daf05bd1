"""By predicted completion: the pair that keeps most promises (`policy.placement`)."""

from __future__ import annotations

from sglang_kairos.policy.placement import PlacedRequest, choose_pair
from sglang_kairos.router.fleet.policies import Picked, RoutingPolicy, Servers, register
from sglang_kairos.router.fleet.prefix_index import Blocks


class KairosPolicy(RoutingPolicy):
    """Compares all pairs by what they are predicted to do, for this request and those before it."""

    predicts = True

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns the pair, and what is predicted of it."""
        prefills, decodes = servers
        now = request.now_s
        pair = choose_pair(
            [server.state(now, request.handoff_s, blocks) for server in prefills],
            [server.state(now) for server in decodes],
            request,
            self._rng,
        )
        assert pair is not None, "neither side is empty"
        return prefills[pair.prefill], decodes[pair.decode], pair


register("kairos", KairosPolicy)
