"""What a scheduler tells Prometheus."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.engine.state.metrics import EVERY_S, SchedulerMetrics, header_counter
from sglang_kairos.predict.prediction_error import PredictError
from sglang_kairos.slo.attainment import OUTCOMES, Verdict


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


def exported(*names: str) -> dict[str, float]:
    """Samples of the metrics whose names begin so, by name and the sorted values of their labels."""
    from prometheus_client import REGISTRY

    starts = tuple(f"kairos_{name}" for name in names)
    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith(starts) and not sample.name.endswith("_created")
    }


def test_errors_gauges_and_counters_are_exported(metrics: SchedulerMetrics) -> None:
    counters = Counter(parked=3)
    told = {"breaker_open": True, "paused": 2, "counters": counters}
    metrics.tell(PredictError(0.1, 0.2, 40, -0.05, 0.9), **told)
    counters["parked"] += 4
    metrics.tell(PredictError(0.1, 0.2, 40, -0.05, 0.9), **told)
    assert exported("predict", "breaker", "paused", "events") == {
        "kairos_predict_errordecodemmape": 0.1,
        "kairos_predict_errordecodemp90": 0.2,
        "kairos_predict_errorbiasdecodem": -0.05,
        "kairos_predict_errordecodemresponse": 0.9,
        "kairos_predict_samplesdecodem": 40.0,
        "kairos_breaker_opendecodem": 1.0,
        "kairos_paused_prefillsdecodem": 2.0,
        "kairos_events_totaldecodemparked": 7.0,
    }


def test_ends_of_requests_are_counted_and_measured(metrics: SchedulerMetrics) -> None:
    slow = Verdict(
        "chat",
        ttft_s=1.5,
        tpot_s=0.04,
        met={"ttft": False, "tpot": True, "both": False},
        late_s={"ttft": 0.5},
        silent_s=0.3,
    )
    metrics.ended("served", slow, 0.3)
    metrics.ended("served", slow, 0.3)
    metrics.ended("served", Verdict("other", 0.2, None, {"ttft": True}, {}), 0.3)
    metrics.ended("aborted", None, 0.3)
    assert {
        name: value
        for name, value in exported(
            "slo", "requests", "ttft", "tpot", "lateness", "silence", "request_max_itl", "max_itl"
        ).items()
        if value and "_bucket" not in name
    } == {
        "kairos_slo_totalchatdecodefalsemttft": 2.0,
        "kairos_slo_totalchatdecodemtpottrue": 2.0,
        "kairos_slo_totalbothchatdecodefalsem": 2.0,
        "kairos_slo_totaldecodemothertruettft": 1.0,
        "kairos_requests_totaldecodemserved": 3.0,
        "kairos_requests_totalaborteddecodem": 1.0,
        "kairos_ttft_seconds_countchatdecodem": 2.0,
        "kairos_ttft_seconds_sumchatdecodem": 3.0,
        "kairos_ttft_seconds_countdecodemother": 1.0,
        "kairos_ttft_seconds_sumdecodemother": 0.2,
        "kairos_tpot_seconds_countchatdecodem": 2.0,
        "kairos_tpot_seconds_sumchatdecodem": 0.08,
        "kairos_lateness_seconds_countchatdecodemttft": 2.0,
        "kairos_lateness_seconds_sumchatdecodemttft": 1.0,
        "kairos_request_max_itl_seconds_countchatdecodem": 2.0,
        "kairos_request_max_itl_seconds_sumchatdecodem": 0.6,
        "kairos_max_itl_secondsdecodem": 0.3,
        # Old names, for one release.
        "kairos_silence_seconds_countchatdecodem": 2.0,
        "kairos_silence_seconds_sumchatdecodem": 0.6,
        "kairos_silence_max_secondsdecodem": 0.3,
    }
    # A target's buckets tell how many were late by more than that.
    assert exported("lateness")["kairos_lateness_seconds_bucket0.5chatdecodemttft"] == 2.0


def test_it_is_told_once_in_a_while(metrics: SchedulerMetrics) -> None:
    assert [metrics.due(s) for s in (5.0, 5.1, 5.0 + EVERY_S, 5.1 + EVERY_S)] == [
        True,
        False,
        True,
        False,
    ]


def test_the_page_for_3_a_m_names_what_there_is(metrics: SchedulerMetrics, repo_root: Path) -> None:
    from prometheus_client import REGISTRY

    args = SimpleNamespace(disaggregation_mode="decode", served_model_name="m")
    header_counter(args)("x-slo-ttft-ms clamped")
    assert exported("slo_headers_adjusted_total") == {
        "kairos_slo_headers_adjusted_totalclampeddecodemx-slo-ttft-ms": 1.0
    }
    page = (repo_root / "docs" / "attainment.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`?(kairos_[a-z_]+)", page)) - {"kairos_router_slo_total"}
    there = {family.name for family in REGISTRY.collect()}
    named = {re.sub(r"_(total|bucket)$", "", name) for name in named}
    told = ("slo", "requests", "ttft_seconds", "tpot_seconds", "lateness_seconds")
    told += ("request_max_itl_seconds", "max_itl_seconds")
    assert {f"kairos_{name}" for name in told} <= named <= there
    assert all(f"`{outcome}`" in page for outcome in OUTCOMES)


def test_nothing_is_told_where_sglang_exports_nothing() -> None:
    off = scheduler()
    off.server_args.enable_metrics = False
    assert SchedulerMetrics.of(off, "prefill") is None
