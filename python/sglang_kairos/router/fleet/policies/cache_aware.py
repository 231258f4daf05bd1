"""The prefill server with the longest match in its prefix cache, as upstream's gateway picks it.

The least loaded one instead when no match is long or the load is uneven (`CacheRule`).
"""

from __future__ import annotations

from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.fleet.policies import Picked, Servers, register
from sglang_kairos.router.fleet.policies.least_load import LeastLoadPolicy
from sglang_kairos.router.fleet.prefix_index import Blocks


class CacheAwarePolicy(LeastLoadPolicy):
    """The decode server is always the least loaded one."""

    def pick(self, servers: Servers, request: PlacedRequest, blocks: Blocks) -> Picked:
        """Returns a pair of which nothing is predicted."""
        prefills = servers[0]
        prefill, decode, _ = super().pick(servers, request, blocks)
        most = max(server.owed for server in prefills)
        least = min(server.owed for server in prefills)
        rule = self._rule
        if most - least > rule.balance_abs and most > rule.balance_rel * least:
            return prefill, decode, None
        best = max(prefills, key=lambda server: server.prefix.cached_tokens(blocks))
        if best.prefix.cached_tokens(blocks) >= rule.threshold * max(1.0, request.tokens):
            prefill = best
        return prefill, decode, None


register("cache_aware", CacheAwarePolicy)
