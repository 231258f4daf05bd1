"""When a server is out, and when it is back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.router.fleet.health import Health
from sglang_kairos.router.health_rules import HealthRules

RULES = HealthRules(probe_failures=3, request_failures=2, eject_s=5.0, longest_eject_s=15.0)


def test_one_refused_probe_is_enough_and_one_answer_brings_it_back() -> None:
    health = Health(RULES)
    assert health.probe_failed(refused=True)
    assert not health.probe_failed(refused=True)  # it was gone already
    assert health.state(0.0) == "gone"
    health.probe_answered()
    assert health.takes_requests(0.0)


def test_silence_counts_only_after_several_probes_in_a_row() -> None:
    health = Health(RULES)
    assert not health.probe_failed(refused=False)
    assert not health.probe_failed(refused=False)
    health.probe_answered()
    assert [health.probe_failed(refused=False) for _ in range(3)] == [False, False, True]
    assert not health.takes_requests(0.0)


def test_a_refused_request_takes_it_out_until_a_probe_is_answered() -> None:
    health = Health(RULES)
    health.request_refused()
    assert not health.takes_requests(1e9)
    health.probe_answered()
    assert health.takes_requests(0.0)


def test_an_outlier_is_out_for_twice_as_long_each_time_and_probes_do_not_help() -> None:
    health, now, lengths = Health(RULES), 0.0, []
    assert not health.request_failed(now)
    while len(lengths) < 4:
        assert health.request_failed(now)
        health.probe_answered()
        began = now
        while not health.takes_requests(now):
            assert not health.request_failed(now)  # of what was sent before
            now += 0.5
        assert health.state(now) == "probation"
        lengths.append(now - began)
    assert lengths == [5.0, 10.0, 15.0, 15.0]
    health.request_answered()
    assert health.state(now) == "up"
    assert not health.request_failed(now)


def test_failures_count_only_in_a_row() -> None:
    health = Health(RULES)
    for _ in range(10):
        assert not health.request_failed(0.0)
        health.request_answered()


@given(st.lists(st.sampled_from(["ok", "fail", "refused", "probe", "silence"]), max_size=60))
def test_it_always_comes_back_when_probes_are_answered_and_time_passes(events: list[str]) -> None:
    health, now = Health(RULES), 0.0
    for event in events:
        now += 0.1
        if event == "ok":
            health.request_answered()
        elif event == "fail":
            health.request_failed(now)
        elif event == "refused":
            health.request_refused()
        elif event == "probe":
            health.probe_answered()
        else:
            health.probe_failed(refused=False)
    health.probe_answered()
    assert health.takes_requests(now + RULES.longest_eject_s)
