"""The router's Prometheus metrics, in a registry of their own. Times in seconds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 13, 21, 34, 60, 120)


class RouterMetrics:
    """Counted per router process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kairos_router_requests",
            "Requests answered, by endpoint and HTTP status (499: the client left)",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.errors = Counter(
            "kairos_router_server_errors",
            "Failures of a server, by kind",
            ["server", "kind"],
            registry=self.registry,
        )
        self.retries = Counter(
            "kairos_router_retries", "Requests moved to another pair", registry=self.registry
        )
        self.ttft = Histogram(
            "kairos_router_ttft_seconds",
            "Arrival to the first byte of the answer",
            ["endpoint"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.late = Counter(
            "kairos_router_ttft_missed",
            "First bytes that came after the request's TTFT target",
            ["endpoint"],
            registry=self.registry,
        )
        self.prediction_error = Histogram(
            "kairos_router_ttft_prediction_error_seconds",
            "Absolute difference of predicted and observed TTFT",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "kairos_router_in_flight", "Requests being served", registry=self.registry
        )
        self.up = Gauge(
            "kairos_router_server_up",
            "1 when the server takes requests",
            ["server", "role"],
            registry=self.registry,
        )

    def render(self) -> bytes:
        """Exposition text."""
        return generate_latest(self.registry)
