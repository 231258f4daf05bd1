"""What a scheduler tells Prometheus."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.engine.metrics import EVERY_S, SchedulerMetrics
from sglang_kairos.predict.error import PredictError


def scheduler(**args: Any) -> Any:
    return SimpleNamespace(
        tp_size=1,
        server_args=SimpleNamespace(enable_metrics=True, served_model_name="m", **args),
    )


@pytest.fixture(scope="module")
def metrics() -> SchedulerMetrics:
    """Once: the names go into the process' registry."""
    made = SchedulerMetrics.of(scheduler(), "decode")
    assert made is not None
    return made


def exported() -> dict[str, float]:
    from prometheus_client import REGISTRY

    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("kairos_") and not sample.name.endswith("_created")
    }


def test_errors_gauges_and_counters_are_exported(metrics: SchedulerMetrics) -> None:
    counters = Counter(parked=3)
    told = {"breaker_open": True, "paused": 2, "counters": counters}
    metrics.tell(PredictError(0.1, 0.2, 40, -0.05, 0.9), **told)
    counters["parked"] += 4
    metrics.tell(PredictError(0.1, 0.2, 40, -0.05, 0.9), **told)
    assert exported() == {
        "kairos_predict_errordecodemmape": 0.1,
        "kairos_predict_errordecodemp90": 0.2,
        "kairos_predict_errorbiasdecodem": -0.05,
        "kairos_predict_errordecodemresponse": 0.9,
        "kairos_predict_samplesdecodem": 40.0,
        "kairos_breaker_opendecodem": 1.0,
        "kairos_paused_prefillsdecodem": 2.0,
        "kairos_events_totaldecodemparked": 7.0,
    }


def test_it_is_told_once_in_a_while(metrics: SchedulerMetrics) -> None:
    assert [metrics.due(s) for s in (5.0, 5.1, 5.0 + EVERY_S, 5.1 + EVERY_S)] == [
        True,
        False,
        True,
        False,
    ]


def test_nothing_is_told_where_sglang_exports_nothing() -> None:
    off = scheduler()
    off.server_args.enable_metrics = False
    assert SchedulerMetrics.of(off, "prefill") is None
