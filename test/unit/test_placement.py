"""Placement: the pair with the earliest first token, as a table and as properties."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.policy.backlog import Backlog
from sglang_kairos.policy.placement import (
    DRAWN,
    LOOK_AT_ALL,
    UNTOLD_DECODE,
    DecodeState,
    PlacedRequest,
    PrefillState,
    choose_pair,
    decode_outlook,
    drawn,
    prefill_outlook,
)
from sglang_kairos.policy.urgency import moore_hodgson
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency

FAST, SLOW, CHUNK = PrefillLatency(0.0, 1e-3, 0.0), PrefillLatency(0.0, 2e-3, 0.0), 100
IDLE = DecodeState()


def prefill_end_s(server: PrefillState, tokens: float, deadline_s: float) -> float:
    """Seconds from now until `server` has prefilled `tokens` more for a request due then."""
    return prefill_outlook(server, PlacedRequest(tokens, deadline_s)).end_s


def owing(*jobs: tuple[float, float], law: PrefillLatency = FAST, **rest: object) -> PrefillState:
    """A server owing (deadline, work) seconds each."""
    ordered = sorted(jobs)
    due, works = [d for d, _ in ordered], [w for _, w in ordered]
    return PrefillState(law, CHUNK, due, works, **rest)  # type: ignore[arg-type]


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
        ("the faster of two idle servers", [owing(law=SLOW), owing()], [IDLE], None, (1, 0)),
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


@pytest.mark.parametrize(
    ("jobs", "end"), [([], 1.0), ([(9.0, 2.0)], 3.0), ([(9.0, 2.0), (9.5, 3.0)], 4.0)]
)
def test_without_chunks_a_prompt_of_those_due_later_is_in_the_way(
    jobs: list[tuple[float, float]], end: float
) -> None:
    server = owing(*jobs)._replace(chunk_tokens=0)
    assert prefill_end_s(server, 1000, 5.0) == pytest.approx(end)


def test_no_server_left_on_a_side_is_no_pair() -> None:
    request = PlacedRequest(10, 1.0)
    assert choose_pair([], [IDLE], request) is None
    assert choose_pair([owing()], [], request) is None
    skipping = PlacedRequest(10, 1.0, skip_prefills=frozenset({0}))
    assert choose_pair([owing()], [IDLE], skipping) is None


def test_predicted_ttft_adds_prefill_hand_off_and_one_decode_step() -> None:
    decode = DecodeState(DecodeLatency(a_s=0.01, b_s=0.001, c_s=0.0))
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
    st.tuples(st.integers(0, 500), st.floats(0, 1e6)).map(
        lambda held: DecodeState(UNTOLD_DECODE, *held)
    ),
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


def planned(*jobs: tuple[float, float], began: float = 0.0, **rest: object) -> PrefillState:
    """As `owing`, but with a plan that counts lateness from `began`."""
    ordered = sorted(jobs)
    due, works = [d for d, _ in ordered], [w for _, w in ordered]
    return PrefillState(FAST, CHUNK, due, works, backlog=Backlog.of(due, works, began), **rest)  # type: ignore[arg-type]


def at_zero(tokens: float, deadline: float, **rest: object) -> PlacedRequest:
    return PlacedRequest(tokens, deadline, now_s=0.0, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "server", "request_", "end", "kept", "harmless"),
    [
        ("alone and in time", planned(), at_zero(1000, 2.0), 1.0, 1.0, True),
        ("alone and too long", planned(), at_zero(3000, 2.0), 3.0, 0.0, False),
        ("a hand-off makes it late", planned(), at_zero(1900, 2.0, handoff_s=0.2), 1.9, 0, False),
        ("so does a margin", planned(), at_zero(1900, 2.0, margin_s=0.2), 1.9, 0.0, False),
        ("behind work that leaves room", planned((1.0, 1.0)), at_zero(900, 2.0), 1.9, 1.0, True),
        ("late itself", planned((1.0, 1.0)), at_zero(1100, 2.0), 2.1, 0.0, False),
        ("ahead of one with room", planned((9.0, 3.0)), at_zero(500, 1.0), 0.6, 1.0, True),
        ("ahead of one without", planned((3.0, 3.0)), at_zero(500, 1.0), 0.6, 0.0, False),
        ("a shorter one stays instead", planned((1.5, 1.2)), at_zero(700, 1.6), 0.7, 0, False),
        (
            "a heavier one pushes a lighter out",
            planned((1.0, 1.0)),
            at_zero(1100, 2.0, weight=9.0),
            1.1,
            8.0,
            False,
        ),
        ("late ones are no hindrance", planned((1.0, 4.0)), at_zero(500, 2.0), 0.6, 1.0, True),
        (
            "a late one waits for all on time and the late that are shorter",
            planned((1.0, 0.9), (1.1, 0.8), (5.0, 1.0)),
            at_zero(4500, 4.0),
            0.8 + 1.0 + 0.9 + 4.5,
            0.0,
            False,
        ),
        (
            "work of unknown deadline goes first",
            planned(extra_s=1.5),
            at_zero(1000, 2.0),
            2.5,
            0.0,
            False,
        ),
        ("a server behind its plan has less room", planned((3.0, 2.0), began=-0.8), at_zero(1100, 2.0), 1.2, 0.0, False),  # noqa: E501
        ("what is cached need not be done", planned(cached_tokens=900.0), at_zero(1000, 0.5), 0.1, 1.0, True),  # noqa: E501
        ("at least one token is done", planned(cached_tokens=5e3), at_zero(100, 1.0), 1e-3, 1, True),
    ],
)  # fmt: skip
def test_prefill_outlook(
    name: str,
    server: PrefillState,
    request_: PlacedRequest,
    end: float,
    kept: float,
    harmless: bool,
) -> None:
    found = prefill_outlook(server, request_)
    assert found.end_s == pytest.approx(end), name
    assert (found.gain, found.harmless) == (kept, harmless), name


on_one_server = st.lists(st.tuples(st.floats(0.05, 10), st.floats(0.01, 3)), max_size=7)


@given(on_one_server, st.floats(0.05, 10), st.integers(10, 3000))
def test_a_request_is_harmless_exactly_if_the_best_schedule_gains_one(
    found: list[tuple[float, float]], deadline: float, tokens: int
) -> None:
    due, works = [d for d, _ in sorted(found)], [w for _, w in sorted(found)]
    # Chunks of one token do not block.
    server = PrefillState(FAST, 1, due, works, backlog=Backlog.of(due, works, 0.0))
    outlook = prefill_outlook(server, at_zero(tokens, deadline))
    before = int(moore_hodgson(works, due).sum())
    after = int(moore_hodgson([*works, tokens / 1e3], [*due, deadline]).sum())
    if outlook.harmless:
        assert after == before + 1
    elif after == before + 1:
        # The two may differ by the chunk that blocks and by which of the late were dropped.
        reordered = prefill_outlook(server, at_zero(max(1, tokens - 2), deadline))
        late = len(works) - before
        assert late > 0 or reordered.harmless


def test_a_late_everywhere_request_goes_where_it_pushes_nobody_out() -> None:
    tight, loose = planned((3.0, 3.0)), planned((9.0, 5.0))
    pair = choose_pair([tight, loose], [IDLE], at_zero(2000, 1.0))
    assert pair is not None
    assert (pair.prefill, pair.keeps_ttft) == (0, False)
    pair = choose_pair([tight, loose], [IDLE], at_zero(800, 1.0))
    assert pair is not None
    assert (pair.prefill, pair.keeps_ttft) == (1, True)


@pytest.mark.parametrize(
    ("name", "server", "tpot", "kept"),
    [
        ("a step that its own target allows", DecodeState(DecodeLatency(0.01, 0.01, 0)), 0.02, 1.0),
        ("one that it does not", DecodeState(DecodeLatency(0.01, 0.01, 0)), 0.015, 0.0),
        (
            "residents that would miss count against it",
            DecodeState(DecodeLatency(0.0, 0.01, 0), running=2, tpots_s=(0.025, 0.029, 0.5)),
            1.0,
            -1.0,
        ),
        (
            "residents that miss already do not",
            DecodeState(DecodeLatency(0.0, 0.01, 0), running=2, tpots_s=(0.001, 0.001)),
            1.0,
            1.0,
        ),
    ],
)
def test_decode_outlook(name: str, server: DecodeState, tpot: float, kept: float) -> None:
    assert decode_outlook(server, PlacedRequest(1, 1.0, tpot_s=tpot)).gain == kept, name


def test_knees_flatten_the_step_cost() -> None:
    cost = DecodeLatency(a_s=0.0, b_s=0.001, c_s=0.0, knees=((8.0, 0.01),))
    assert cost.step_s(4, 0) == pytest.approx(0.044)
    assert cost.step_s(16, 0) == pytest.approx(0.096)


def test_of_a_large_fleet_a_few_are_drawn_and_the_best_of_them_taken() -> None:
    servers = [owing((1.0, float(index % 7))) for index in range(1000)]
    request = PlacedRequest(100, 5.0)
    picked = [choose_pair(servers, [IDLE], request, Random(seed)) for seed in range(200)]
    works = [servers[pair.prefill].works_s[0] for pair in picked if pair]
    assert sum(works) / len(works) < 0.5  # of eight drawn, the least of seven values
    assert len({pair.prefill for pair in picked if pair}) > 100
    assert len(drawn(LOOK_AT_ALL, None)) == LOOK_AT_ALL
    assert len(set(drawn(LOOK_AT_ALL + 1, Random(0)))) == DRAWN
