"""The routing policies by the names of ``--policy``: each is one file in `fleet/policies/`."""

from __future__ import annotations

from typing import Any

from sglang_kairos.registry import Registry

# Of subclasses of `fleet.policies.RoutingPolicy`.
POLICIES: Registry[Any] = Registry("sglang_kairos.router.fleet.policies")
