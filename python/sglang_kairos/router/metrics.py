"""The router's Prometheus metrics, in a registry of their own. Times in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sglang_kairos.slo.attainment import TPOT_EDGES_S, TTFT_EDGES_S

_MISSES = (-10, -3, -1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 3, 10)


class RouterMetrics:
    """Counted per router process."""

    def __init__(self, ttft_buckets: Sequence[float] = ()) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"kairos_router_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: list[str]) -> Gauge:
            return Gauge(f"kairos_router_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, labels: list[str], edges: Any) -> Histogram:
            full = f"kairos_router_{name}"
            return Histogram(full, text, labels, buckets=edges, registry=registry)

        self._requests = counter(
            "requests",
            "Requests answered, by endpoint and HTTP status (499: the client left)",
            ["endpoint", "status", "slo_class"],
        )
        self.errors = counter("server_errors", "Failures of a server, by kind", ["server", "kind"])
        self.ejections = counter(
            "ejections", "Times a server was taken out, by reason", ["server", "reason"]
        )
        self.cut_off = counter(
            "cut_off",
            "Requests whose server died under them or cut them off before it answered",
            ["role", "outcome"],
        )
        self.retries = Counter(
            "kairos_router_retries", "Attempts after the first", registry=registry
        )
        self.overloaded = counter(
            "overloaded",
            "Requests that were shed or relegated, or found the router full",
            ["action", "slo_class"],
        )
        self._slo = counter(
            "slo", "Streams that met their target or did not", ["slo_class", "target", "met"]
        )
        self.odd_headers = counter(
            "slo_headers_adjusted",
            "SLO headers whose number was moved into the range, or that named none",
            ["header", "action"],
        )
        self._ttft = histogram(
            "ttft_seconds",
            "Arrival to the first byte of a stream",
            ["slo_class"],
            ttft_buckets or TTFT_EDGES_S,
        )
        self._tpot = histogram(
            "tpot_seconds",
            "Seconds per token after the first, of streams",
            ["slo_class"],
            TPOT_EDGES_S,
        )
        self._ttft_miss = histogram(
            "ttft_miss_seconds", "Observed minus predicted TTFT", ["server"], _MISSES
        )
        self._tpot_miss = histogram(
            "tpot_miss_seconds", "Observed minus predicted TPOT", ["server"], _MISSES
        )
        self.in_flight = gauge("in_flight", "Requests being served", [])
        self.held_bytes = gauge("held_bytes", "Bytes of request bodies held", [])
        self.relegated = gauge("relegated", "Requests that wait for their turn", [])
        self.up = gauge("server_up", "1 when the server takes requests", ["server", "role"])
        self.owed = gauge("server_owed_seconds", "Predicted prefill work sent there", ["server"])
        self.running = gauge("server_running", "Requests in flight there", ["server", "role"])
        # Looking a child up by its labels costs more than counting.
        self._request = cache(self._requests.labels)
        self._met = cache(self._slo.labels)
        self._of_ttft, self._of_tpot = cache(self._ttft.labels), cache(self._tpot.labels)
        self._missed_ttft = cache(self._ttft_miss.labels)
        self._missed_tpot = cache(self._tpot_miss.labels)

    def answered(self, endpoint: str, status: int, slo_class: str) -> None:
        """A request is over."""
        self._request(endpoint, str(status), slo_class).inc()

    def first_token(
        self, slo_class: str, prefill: str, ttft_s: float, predicted_s: float, met: bool
    ) -> None:
        """A stream's first byte was sent."""
        self._of_ttft(slo_class).observe(ttft_s)
        self._missed_ttft(prefill).observe(ttft_s - predicted_s)
        self._met(slo_class, "ttft", "yes" if met else "no").inc()

    def last_token(
        self, slo_class: str, decode: str, tpot_s: float, predicted_s: float, met: bool
    ) -> None:
        """A stream of two or more tokens has ended well."""
        self._of_tpot(slo_class).observe(tpot_s)
        self._missed_tpot(decode).observe(tpot_s - predicted_s)
        self._met(slo_class, "tpot", "yes" if met else "no").inc()

    def forget(self, server: str, role: str) -> None:
        """A removed server's gauges go with it; counters stay."""
        for gauge, labels in (
            (self.up, (server, role)),
            (self.owed, (server,)),
            (self.running, (server, role)),
        ):
            with suppress(KeyError):
                gauge.remove(*labels)

    def render(self) -> bytes:
        """Exposition text."""
        return generate_latest(self.registry)
