"""Calibration finds again what a recording was made from, and says so when it cannot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.loads.replay import OK, Outcome
from sglang_kairos.loads.traces import Request, long_tail
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.calibrate.calibrate import (
    Calibration,
    CalibrationError,
    Machine,
    MachinePace,
    calibrate,
)
from sglang_kairos.sim.calibrate.recording import (
    DecodeStep,
    PrefillStep,
    Recording,
    cycles,
    delays,
    read_record,
)

PREFILL = PrefillLatency(8e-3, 3e-5, 5e-9, 1.5e-8)
DECODE = DecodeLatency.of((4e-3, 2e-4, 5e-4, 0.0, 2e-7))
SIZES = {"chunk_tokens": 512, "prefill_kv_tokens": 200_000, "decode_kv_tokens": 200_000}
EVEN = MachinePace((1.0,), (1.0,))
KNOWN = Calibration(
    PREFILL, DECODE, EVEN, EVEN, front_s=0.03, handoff_s=0.01, delivery_s=0.02, sizes=SIZES
)
ROWS = long_tail(120, 4.0, seed=5, max_input=4000, max_output=60)


def made_recording(noise: float = 0.0, requests: int = 60) -> Recording:
    """One request at a time, an idle machine: every delay shows, no step follows another of its
    kind but the chunks of a prompt and the tokens of an answer."""
    rng = np.random.default_rng(1)
    recording = Recording([], [], [], begun_s=100.0)
    now = 100.0

    def stretched(seconds: float) -> float:
        return seconds * float(np.exp(rng.normal(0, noise))) if noise else seconds

    for room in range(requests):
        prompt = int(rng.integers(20, 3000))
        sent = Outcome(room, now - 100.0, now - 100.0, prompt, 8, 1e3, 1e2, OK)
        now = queued = now + KNOWN.front_s
        for done in range(0, prompt, 512):
            new = min(512, prompt - done)
            end = now + stretched(PREFILL.step_s(new, done))
            recording.prefill.append(
                PrefillStep(now, end, done == 0, (room,), (new,), (done,), (prompt,), (queued,))
            )
            now = end
        now += KNOWN.handoff_s
        sent.first_token_s, sent.output_tokens = now + KNOWN.delivery_s - 100.0, 8
        beside = int(rng.integers(0, 40))
        for token in range(7):
            rooms = (room, *range(1000, 1000 + beside))
            kv = prompt + token + beside * 300
            end = now + stretched(DECODE.step_s(len(rooms), kv))
            recording.decode.append(DecodeStep(now, end, token == 0, rooms, kv))
            now = end
        recording.outcomes.append(sent)
        now += 1.0
    return recording


def test_laws_and_delays_are_found_again() -> None:
    found = calibrate(made_recording(), SIZES, late_results=False)
    assert found.prefill == pytest.approx(PREFILL, rel=1e-3, abs=1e-12)
    times = replace(found, decode_pace=EVEN).system(0).times
    known = KNOWN.system(0).times
    for batch, kv in ((1, 100), (8, 3000), (30, 12_000)):
        assert times.decode_s(batch, kv) == pytest.approx(known.decode_s(batch, kv), rel=0.01)
    assert (found.front_s, found.handoff_s, found.delivery_s) == pytest.approx((0.03, 0.01, 0.02))


def test_a_few_stolen_seconds_bend_no_law() -> None:
    recording = made_recording(noise=0.05)
    for at in range(0, len(recording.prefill), 10):
        step = recording.prefill[at]
        recording.prefill[at] = replace(step, start_s=step.start_s - 1.5)
    law = calibrate(recording, SIZES, late_results=False).prefill
    for new, prefix in ((64, 0), (512, 0), (512, 2048)):
        wanted = PREFILL.step_s(new, prefix)
        assert law.step_s(new, prefix) == pytest.approx(wanted, rel=0.1)


def test_a_pace_keeps_the_time_that_was_taken() -> None:
    recording = made_recording(noise=0.3)
    found = calibrate(recording, SIZES, late_results=False)
    law = found.prefill
    assert found.prefill_pace.taken_s == pytest.approx(tuple(cycles(recording.prefill)))
    told = [law.step_s(step.new, step.prefix) for step in recording.prefill]
    assert found.prefill_pace.told_s == pytest.approx(tuple(told))
    machine = Machine(found.prefill_pace, 0.0)
    assert [machine.takes_s(step) for step in told] == pytest.approx(cycles(recording.prefill))


PACES = st.lists(st.tuples(st.floats(1e-3, 5.0), st.floats(1e-3, 50.0)), min_size=1, max_size=8)


@given(PACES, st.floats(0, 0.999), st.lists(st.floats(0.0, 20.0), max_size=10))
def test_a_machine_neither_loses_nor_wins_time(
    steps: list[tuple[float, float]], start: float, asked: list[float]
) -> None:
    pace = MachinePace(tuple(told for told, _ in steps), tuple(taken for _, taken in steps))
    one, all_at_once = Machine(pace, start), Machine(pace, start)
    took = [one.takes_s(told) for told in asked]
    assert min(took, default=0.0) >= -1e-9
    assert sum(took) == pytest.approx(all_at_once.takes_s(sum(asked)), rel=1e-6, abs=1e-6)
    once_around = Machine(pace, start).takes_s(sum(pace.told_s))
    assert once_around == pytest.approx(sum(pace.taken_s), rel=1e-6)


def test_a_long_step_meets_short_ups_and_downs() -> None:
    machine = Machine(MachinePace((1.0,) * 4, (1.0, 3.0, 1.0, 3.0)), 0.0)
    assert [machine.takes_s(told) for told in (0.5, 1.0, 0.5, 4.0)] == [0.5, 2.0, 1.5, 8.0]


def test_the_seed_says_where_in_the_pace_a_run_starts() -> None:
    uneven = replace(
        KNOWN, prefill_pace=MachinePace((1e-3,) * 50, tuple(1e-3 * i for i in range(1, 51)))
    )
    first = [uneven.system(seed).times.prefill_s([1], [0]) for seed in (1, 2, 1)]
    assert first[0] == first[2] != first[1]


def test_a_step_lasts_until_the_next_that_follows_it() -> None:
    step = DecodeStep(0.0, 1.0, True, (1,), 10)
    follows = replace(step, start_s=1.2, end_s=2.0, idle=False)
    later = replace(step, start_s=9.0, end_s=9.5)
    assert cycles([step, follows, later]) == pytest.approx([1.2, 1.0, 0.7])


def test_requests_of_one_length_are_told_apart_by_their_order() -> None:
    recording = made_recording(requests=2)
    first, second = recording.outcomes
    second.input_tokens = first.input_tokens
    recording.prefill[:] = [
        PrefillStep(at, at + 0.1, True, (room,), (9,), (0,), (9,), (at,))
        for at, room in ((100.3, 0), (101.3 + second.sent_s, 1))
    ]
    first.input_tokens = second.input_tokens = 9
    first.sent_s, second.sent_s = 0.1, 1.1 + second.sent_s
    assert delays(recording, False).front == pytest.approx([0.2, 0.2])


def test_a_late_result_counts_from_the_end_of_the_next_step() -> None:
    recording = made_recording(requests=1)
    last = recording.prefill[-1]
    recording.prefill.append(
        replace(last, start_s=last.end_s, end_s=last.end_s + 0.004, idle=False, rooms=(77,))
    )
    assert delays(recording, False).handoff == pytest.approx([0.010])
    assert delays(recording, True).handoff == pytest.approx([0.006])


@pytest.mark.parametrize(("kind", "wanted"), [("prefill", "prefill"), ("decode", "decode")])
def test_too_few_steps_are_refused(kind: str, wanted: str) -> None:
    recording = made_recording()
    del getattr(recording, kind)[5:]
    with pytest.raises(CalibrationError, match=f"5 {wanted} steps recorded, 20 needed"):
        calibrate(recording, SIZES, late_results=False)


def test_a_machine_that_was_never_idle_is_refused() -> None:
    recording = made_recording()
    recording.prefill[:] = [replace(step, idle=False) for step in recording.prefill]
    with pytest.raises(CalibrationError, match="front"):
        calibrate(recording, SIZES, late_results=False)


def test_a_lone_request_takes_every_delay_once() -> None:
    row = Request(0.0, 100, 5)
    (outcome,) = KNOWN.simulate(POLICIES["fcfs"], [row], 1e3, 1e2, 0).result.outcomes
    prefill = PREFILL.step_s(100, 0)
    assert outcome.ttft_ms == pytest.approx(1e3 * (0.03 + prefill + 0.01 + 0.02))
    assert (outcome.sent_s, outcome.ttft_slo_ms, outcome.output_tokens) == (0.0, 1e3, 5)


def test_with_late_results_the_first_token_waits_for_the_next_step() -> None:
    rows = [Request(0.0, 500, 2), Request(0.001, 500, 2)]
    late = KNOWN.simulate(POLICIES["fcfs"], rows, 1e3, 1e2, 0).result.outcomes
    prompt = replace(KNOWN, late_results=False)
    soon = prompt.simulate(POLICIES["fcfs"], rows, 1e3, 1e2, 0).result.outcomes
    step_ms = 1e3 * PREFILL.step_s(500, 0)
    assert late[0].ttft_ms - soon[0].ttft_ms == pytest.approx(step_ms, abs=0.1)
    assert late[1].ttft_ms == pytest.approx(soon[1].ttft_ms, abs=0.1)


@pytest.mark.parametrize("policy", ["fcfs", "hrrn", "shortest-prefill-first", "kairos"])
def test_late_results_lose_no_request(policy: str) -> None:
    run = KNOWN.simulate(POLICIES[policy], ROWS, 1e3, 1e2, 0)
    assert run.result.metrics.failed == 0
    assert [o.output_tokens for o in run.result.outcomes] == [row.output_tokens for row in ROWS]


def test_a_slower_machine_is_busy_longer() -> None:
    base = KNOWN.simulate(POLICIES["fcfs"], ROWS, 1e3, 1e2, 0)
    slow = KNOWN.scaled(prefill=1.3).simulate(POLICIES["fcfs"], ROWS, 1e3, 1e2, 0)
    assert slow.prefill_busy_s == pytest.approx(1.3 * base.prefill_busy_s, rel=0.05)
    assert slow.result.metrics.ttft_attainment < base.result.metrics.ttft_attainment


def test_a_recorders_line_is_read_back() -> None:
    line = {"kind": "decode", "start_s": 1.0, "end_s": 2.0, "idle": True, "rooms": [1, 2], "kv": 9}
    assert read_record(line) == DecodeStep(1.0, 2.0, True, (1, 2), 9)
    with pytest.raises(TypeError):
        read_record({**line, "unknown": 1})
