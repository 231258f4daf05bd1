"""The policies that can be compared, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_kairos.config import KairosConfig
from sglang_kairos.sim.baselines.order import ORDERS

KAIROS = KairosConfig()


@dataclass(frozen=True)
class Policy:
    """A policy to simulate.

    `order`: prefill order, a name in `order.ORDERS` or "urgency".
    `by_deadline`: the decode server reserves KV, and admits, in order of deadline.
    `gate`: it reserves by `policy.admission` instead. `park`: decode packing.
    `route`: chooses pairs by prediction instead of in turn. `config`: the Kairos settings that
    apply.
    """

    name: str
    order: str = "fcfs"
    by_deadline: bool = False
    gate: bool = False
    park: bool = False
    route: bool = False
    config: KairosConfig = KAIROS

    @property
    def urgent(self) -> bool:
        """Returns whether prefill follows `policy.urgency`."""
        return self.order == "urgency"


_FULL = Policy("kairos", "urgency", by_deadline=True, gate=True, park=True, route=True)

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        *(Policy(name, name) for name in ORDERS),
        replace(_FULL, name="kairos-prefill", gate=False, park=False, route=False),
        Policy("kairos-decode", by_deadline=True, gate=True, park=True),
        Policy("kairos-router", route=True),
        replace(_FULL, name="kairos-no-pause", config=replace(KAIROS, pause=False)),
        replace(_FULL, name="kairos-no-gate", gate=False),
        replace(_FULL, name="kairos-no-reserve-order", by_deadline=False, gate=False),
        replace(_FULL, name="kairos-full-throughput", config=replace(KAIROS, min_throughput=0.98)),
        _FULL,
    )
}
