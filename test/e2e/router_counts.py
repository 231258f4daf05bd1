"""What the router and the first decode server of a cluster have counted, in a client's terms."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from sglang_kairos.cluster.run import Cluster


@dataclass(frozen=True)
class Counted:
    """What router and decode server have counted so far."""

    router: Counter[str]
    served: Counter[str]

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.router - other.router, self.served - other.served)

    def answers(self, status: str = "") -> int:
        """Requests that the router answered, with this status; with any."""
        return round(sum(n for name, n in self.router.items() if name.startswith(f"http {status}")))

    def met(self, target: str) -> tuple[int, int]:
        """Streams that met that target, and that had one to meet."""
        met, missed = self.router[f"{target} yes"], self.router[f"{target} no"]
        return round(met), round(met + missed)

    def mean_ms(self, target: str) -> float:
        return 1e3 * self.router[f"{target} sum"] / self.router[f"{target} count"]


def counted(cluster: Cluster) -> Counted:
    router: Counter[str] = Counter()
    for family in text_string_to_metric_families(_get(cluster.url + "/metrics").decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("kairos_router_")
            if name == "requests_total":
                router["http " + sample.labels["status"]] += sample.value
            elif name == "overloaded_total" and sample.labels["action"] == "full":
                # Whom it had no room for counts only here.
                router["http 429"] += sample.value
            elif name == "slo_total":
                router[f"{sample.labels['target']} {sample.labels['met']}"] += sample.value
            elif name in ("ttft_seconds_sum", "tpot_seconds_sum"):
                router[f"{name[:4]} sum"] += sample.value
            elif name in ("ttft_seconds_count", "tpot_seconds_count"):
                router[f"{name[:4]} count"] += sample.value
    state = json.loads(_get(cluster.decode_urls[0] + "/server_info"))["internal_states"][0]
    return Counted(router, Counter(state["kairos"]["attainment"]["requests"]))


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        found: bytes = answer.read()
        return found
