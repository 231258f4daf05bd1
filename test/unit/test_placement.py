"""Placement: the pair with the earliest first token, as a table and as properties."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.policy.placement import (
    DecodeState,
    PlacedRequest,
    PrefillSpeed,
    PrefillState,
    StepCost,
    choose_pair,
    prefill_end_s,
)

FAST = PrefillSpeed(a_s=0.0, b_s=1e-3, c_s=0.0, chunk_tokens=100)
SLOW = PrefillSpeed(a_s=0.0, b_s=2e-3, c_s=0.0, chunk_tokens=100)
IDLE = DecodeState()


def owing(*jobs: tuple[float, float], speed: PrefillSpeed = FAST, **rest: object) -> PrefillState:
    """A server owing (deadline, work) seconds each."""
    ordered = sorted(jobs)
    return PrefillState(speed, [d for d, _ in ordered], [w for _, w in ordered], **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "server", "tokens", "deadline", "expected"),
    [
        ("an idle server takes its own work only", owing(), 1000, 5.0, 1.0),
        ("work due earlier goes first", owing((1.0, 2.0)), 1000, 5.0, 3.0),
        ("work due at the same time was there first", owing((5.0, 2.0)), 1000, 5.0, 3.0),
        ("of work due later only a chunk is in the way", owing((9.0, 2.0)), 1000, 5.0, 1.1),
        ("later work smaller than a chunk is in the way whole", owing((9.0, 0.04)), 100, 5.0, 0.14),
        ("both kinds add up", owing((1.0, 2.0), (9.0, 3.0)), 1000, 5.0, 3.1),
        (
            "a stock server makes it wait for everything",
            owing((9.0, 2.0), by_deadline=False),
            1000,
            5.0,
            3.0,
        ),
        ("work already done does not count", owing((1.0, 2.0), progress_s=1.5), 1000, 5.0, 1.5),
        ("progress never makes time negative", owing((1.0, 2.0), progress_s=9.0), 1000, 5.0, 1.0),
        ("an empty prompt costs nothing itself", owing((1.0, 2.0)), 0, 5.0, 2.0),
    ],
)
def test_prefill_end(
    name: str, server: PrefillState, tokens: float, deadline: float, expected: float
) -> None:
    assert prefill_end_s(server, tokens, deadline) == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("name", "prefills", "decodes", "request_", "pair"),
    [
        ("a tie falls to the lower index", [owing(), owing()], [IDLE, IDLE], None, (0, 0)),
        ("the faster of two idle servers", [owing(speed=SLOW), owing()], [IDLE], None, (1, 0)),
        ("the shorter queue", [owing((1.0, 2.0)), owing((1.0, 1.0))], [IDLE], None, (1, 0)),
        (
            "urgent work counts, not queue length",
            [owing((1.0, 1.0)), owing((9.0, 50.0))],
            [IDLE],
            None,
            (1, 0),
        ),
        ("fewer running decodes", [owing()], [DecodeState(running=9), IDLE], None, (0, 1)),
        (
            "a shorter step, though more are running",
            [owing()],
            [DecodeState(running=2, tokens=1e6), DecodeState(running=9, tokens=1e3)],
            None,
            (0, 1),
        ),
        (
            "room in the KV comes before a short step",
            [owing()],
            [DecodeState(tokens=950, capacity_tokens=1000), DecodeState(running=50)],
            None,
            (0, 1),
        ),
        (
            "servers already tried are skipped",
            [owing(), owing((1.0, 9.0))],
            [IDLE, DecodeState(running=9)],
            PlacedRequest(100, 5.0, skip_prefills=frozenset({0}), skip_decodes=frozenset({0})),
            (1, 1),
        ),
    ],
)
def test_choice(
    name: str,
    prefills: list[PrefillState],
    decodes: list[DecodeState],
    request_: PlacedRequest | None,
    pair: tuple[int, int],
) -> None:
    chosen = choose_pair(prefills, decodes, request_ or PlacedRequest(100, 5.0))
    assert chosen is not None
    assert chosen[:2] == pair, name


def test_no_server_left_on_a_side_is_no_pair() -> None:
    request = PlacedRequest(10, 1.0)
    assert choose_pair([], [IDLE], request) is None
    assert choose_pair([owing()], [], request) is None
    skipping = PlacedRequest(10, 1.0, skip_prefills=frozenset({0}))
    assert choose_pair([owing()], [IDLE], skipping) is None


def test_predicted_ttft_adds_prefill_hand_off_and_one_decode_step() -> None:
    decode = DecodeState(StepCost(a_s=0.01, b_s=0.001, c_s=0.0))
    pair = choose_pair([owing()], [decode], PlacedRequest(1000, 5.0, handoff_s=0.1))
    assert pair is not None
    assert pair.ttft_s == pytest.approx(1.0 + 0.1 + 0.011)


def test_a_seed_fixes_the_choice_among_equals_and_spreads_it() -> None:
    servers, decodes = [owing() for _ in range(4)], [IDLE] * 4
    request = PlacedRequest(100, 5.0)

    def run(seed: int) -> list[tuple[int, int]]:
        rng = Random(seed)
        pairs = [choose_pair(servers, decodes, request, rng) for _ in range(200)]
        return [(pair.prefill, pair.decode) for pair in pairs if pair]

    assert run(1) == run(1)
    assert {p for p, _ in run(1)} == {0, 1, 2, 3} == {d for _, d in run(1)}


jobs = st.lists(st.tuples(st.floats(-10, 100), st.floats(0, 10)), max_size=8)
servers = st.lists(jobs.map(lambda found: owing(*found)), min_size=1, max_size=5)
decoders = st.lists(
    st.builds(DecodeState, running=st.integers(0, 500), tokens=st.floats(0, 1e6)),
    min_size=1,
    max_size=5,
)


@given(servers, decoders, st.floats(0, 1e5), st.floats(-10, 100), st.integers(0, 9))
def test_nobody_else_would_have_been_earlier(
    prefills: list[PrefillState],
    decodes: list[DecodeState],
    tokens: float,
    deadline: float,
    seed: int,
) -> None:
    pair = choose_pair(prefills, decodes, PlacedRequest(tokens, deadline), Random(seed))
    assert pair is not None
    ends = [prefill_end_s(server, tokens, deadline) for server in prefills]
    assert ends[pair.prefill] <= min(ends) + 1e-3
    steps = [server.step_s(1, tokens) for server in decodes]
    assert steps[pair.decode] <= min(steps) + 1e-3


@given(jobs, st.floats(1, 1e4), st.floats(-10, 100), st.floats(0, 50))
def test_more_work_or_a_later_deadline_never_helps(
    found: list[tuple[float, float]], tokens: float, deadline: float, later: float
) -> None:
    server = owing(*found)
    end = prefill_end_s(server, tokens, deadline)
    assert prefill_end_s(server, tokens, deadline + later) >= end - 0.1 - 1e-9
    assert prefill_end_s(owing(*found, (deadline, 1.0)), tokens, deadline) >= end
    assert prefill_end_s(server, tokens + 1, deadline) >= end
