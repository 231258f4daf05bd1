"""Exports a scheduler's metrics to Prometheus, on SGLang's own ``/metrics`` (``--enable-metrics``).

SGLang collects its processes' metrics from files (prometheus-client's multiprocess mode), so values
set in this process show there. Rank 0 exports; the other ranks decide alike.
"""

from __future__ import annotations

import functools
from collections import Counter as Counts
from collections.abc import Callable, Sequence
from typing import Any

from sglang_kairos import names
from sglang_kairos.engine import compat
from sglang_kairos.engine.state.tp_sync import leads
from sglang_kairos.predict.prediction_error import PredictError
from sglang_kairos.slo.attainment import OUTCOMES, TPOT_EDGES_S, TTFT_EDGES_S, Verdict

EVERY_S = 1.0
LABELS = ("role", "model_name")


class SchedulerMetrics:
    """Gauges and counters named ``kairos_…``, updated at most once in `EVERY_S` seconds."""

    def __init__(self, scheduler: Any, role: str) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._labels = role, str(scheduler.server_args.served_model_name)

        def gauge(name: str, text: str, *more: str, of_all: Any = "mostrecent") -> Any:
            return Gauge(f"kairos_{name}", text, [*LABELS, *more], multiprocess_mode=of_all)

        self._error = gauge(
            "predict_error",
            "Relative error of the latest step-time predictions: mape, p90, bias (above 0: too long);"
            " response: how much of a predicted difference steps show (1: all, 0: none)",
            "statistic",
        )
        self._steps = gauge("predict_samples", "Executed steps that the predictor has seen")
        self._breaker = gauge("breaker_open", "1 while predictions do not hold: nobody is parked")
        self._paused = gauge("paused_prefills", "Half-done prefills that sit out now")
        self._events = Counter(
            "kairos_events", "Counters of /server_info, by name", [*LABELS, "event"]
        )

        def histogram(name: str, text: str, edges: Sequence[float], *more: str) -> Any:
            labels = [*LABELS, "slo_class", *more]
            return Histogram(f"kairos_{name}_seconds", text, labels, buckets=edges)

        def of(metric: Any) -> Callable[..., Any]:
            """Looking a child up by its labels costs more than counting."""
            return functools.cache(lambda *labels: metric.labels(*self._labels, *labels))

        slo = "Requests served that met their target or did not"
        self._slo = of(Counter("kairos_slo", slo, [*LABELS, "slo_class", "target", "met"]))
        outcomes = "Requests that are over, by what became of them; health checks excepted"
        self._outcome = of(Counter("kairos_requests", outcomes, [*LABELS, "outcome"]))
        for outcome in OUTCOMES:  # a rate needs the 0 before the first
            self._outcome(outcome)
        ttft = "Arrival to the first token; on a prefill server, to the end of the prefill"
        self._ttft = of(histogram("ttft", ttft, TTFT_EDGES_S))
        tpot = "Seconds per token after the first; 0 for a single token"
        self._tpot = of(histogram("tpot", tpot, TPOT_EDGES_S))
        late = (
            "How late those were that missed: the first token, or the last counted from the first"
        )
        self._late = of(histogram("lateness", late, TTFT_EDGES_S, "target"))
        itl = "The longest time between two tokens of a request"
        self._itl = [of(histogram(name, itl, TTFT_EDGES_S)) for name in both("request_max_itl")]
        longest = "The longest time between two tokens of any request so far"
        self._longest_itl = [
            gauge(f"{name}_seconds", longest, of_all="max") for name in both("max_itl")
        ]
        self._told: Counts[str] = Counts()
        self._due_s = float("-inf")

    @classmethod
    def of(cls, scheduler: Any, role: str) -> SchedulerMetrics | None:
        """Returns the metrics; None where SGLang exports none, or another rank has the same requests."""
        if not compat.feature(scheduler, "enable_metrics") or not leads(scheduler):
            return None
        return cls(scheduler, role)

    def due(self, now_s: float) -> bool:
        """Returns whether it is time for `tell`."""
        if now_s < self._due_s:
            return False
        self._due_s = now_s + EVERY_S
        return True

    def ended(self, outcome: str, verdict: Verdict | None, longest_silence_s: float) -> None:
        """Counts a request that is over. `verdict`: if it was served."""
        self._outcome(outcome).inc()
        if verdict is None:
            return
        label = verdict.slo_class
        for target, met in verdict.met.items():
            self._slo(label, target, "true" if met else "false").inc()
        self._ttft(label).observe(verdict.ttft_s)
        for target, late_s in verdict.late_s.items():
            self._late(label, target).observe(late_s)
        if verdict.tpot_s is not None:
            self._tpot(label).observe(verdict.tpot_s)
            for metric in self._itl:
                metric(label).observe(verdict.silent_s)
            for metric in self._longest_itl:
                metric.labels(*self._labels).set(longest_silence_s)

    def tell(
        self, error: PredictError, *, breaker_open: bool, paused: int, counters: Counts[str]
    ) -> None:
        """Publishes the present values."""
        for statistic in ("mape", "p90", "bias", "response"):
            self._error.labels(*self._labels, statistic).set(getattr(error, statistic))
        self._steps.labels(*self._labels).set(error.samples)
        self._breaker.labels(*self._labels).set(float(breaker_open))
        self._paused.labels(*self._labels).set(paused)
        for event, count in counters.items():
            self._events.labels(*self._labels, event).inc(count - self._told[event])
        self._told = counters.copy()


def both(name: str) -> list[str]:
    """Returns the name of a metric in seconds, without ``kairos_`` and unit, and its old one."""
    new = f"kairos_{name}_seconds"
    found = [new, *filter(None, [names.old_name("metric", new)])]
    return [each.removeprefix("kairos_").removesuffix("_seconds") for each in found]


def header_counter(server_args: Any) -> Callable[[str], None]:
    """Returns a counter of SLO headers that were not taken as written ("x-slo-ttft-ms clamped").

    It is for the HTTP process, which reads them; see `slo.age.HeaderNotes`.
    """
    from prometheus_client import Counter

    counter = Counter(
        "kairos_slo_headers_adjusted",
        "SLO headers whose number was moved into the range, or that said nothing to be used",
        [*LABELS, "header", "action"],
    )
    own = str(server_args.disaggregation_mode), str(server_args.served_model_name)
    return lambda note: counter.labels(*own, *note.split()).inc()
