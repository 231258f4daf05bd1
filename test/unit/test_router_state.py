"""What the router knows of a server: from its own books, and from what the server tells."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_pd import Fake, bench, until
from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.router.arguments import POLICIES
from sglang_kairos.router.fleet.estimators import Margin
from sglang_kairos.router.fleet.fleet import Fleet
from sglang_kairos.router.fleet.prefix_index import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    PrefixIndex,
    blocks_of,
)
from sglang_kairos.router.fleet.server_info import Load, decode_law, load_of, prefill_law, settled
from sglang_kairos.router.fleet.servers import FRESH_S, DecodeServer, PrefillServer
from sglang_kairos.router.options import RouterOptions
from sglang_kairos.router.request.body import prompt_blocks

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]


def fleet_of(policy: str = "kairos", prefills: int = 3, decodes: int = 2) -> Fleet:
    return Fleet(
        RouterOptions(
            prefills=tuple((f"http://p{index}", 8998) for index in range(prefills)),
            decodes=tuple(f"http://d{index}" for index in range(decodes)),
            policy=policy,
            seed=3,
        )
    )


REQUEST = PlacedRequest(1000, math.inf)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_picks_servers_that_are_up_and_not_excluded(policy: str) -> None:
    fleet = fleet_of(policy)
    fleet.prefills[0].health.request_refused()
    excluded = {fleet.decodes[0]}
    for _ in range(30):
        placement = fleet.reserve(REQUEST, excluded)
        assert placement is not None
        assert placement.prefill in fleet.prefills[1:]
        assert placement.decode is fleet.decodes[1]
    assert fleet.reserve(REQUEST, set(fleet.decodes)) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_when_nobody_is_up_somebody_is_tried_but_never_one_being_removed(policy: str) -> None:
    fleet = fleet_of(policy)
    for server in fleet.servers:
        server.health.request_refused()
    fleet.prefills[0].draining = fleet.prefills[1].draining = True
    placement = fleet.reserve(REQUEST)
    assert placement is not None
    assert placement.prefill is fleet.prefills[2]
    assert not fleet.ready


def test_round_robin_meets_every_pair_and_least_load_the_shortest_queue() -> None:
    fleet = fleet_of("round_robin")
    met = set()
    for _ in range(6):
        placement = fleet.reserve(REQUEST)
        assert placement is not None
        met.add((placement.prefill.url, placement.decode.url))
    assert len(met) == 6
    fleet = fleet_of("least_load")
    for server in fleet.prefills[:2]:
        server.enqueue(10, 1.0, 0.0)
    fleet.decodes[0].admit(1, 1.0)
    placement = fleet.reserve(REQUEST)
    assert placement is not None
    assert (placement.prefill, placement.decode) == (fleet.prefills[2], fleet.decodes[1])


def test_cache_aware_goes_where_the_prefix_is_unless_the_load_is_uneven() -> None:
    fleet = fleet_of("cache_aware")
    blocks, busy = blocks_of([7] * 1000, 4.0), fleet.prefills[1]
    busy.prefix.add(blocks)
    busy.enqueue(10, 1.0, 0.0)
    placement = fleet.reserve(REQUEST, (), blocks)
    assert placement is not None
    assert placement.prefill is busy
    assert placement.cached_tokens == 1000 // BLOCK_TOKENS * BLOCK_TOKENS
    for _ in range(70):
        busy.enqueue(10, 1.0, 0.0)
    placement = fleet.reserve(REQUEST, (), blocks)
    assert placement is not None
    assert placement.prefill is not busy


def test_kairos_weighs_a_cached_prefix_against_the_work_ahead() -> None:
    fleet = fleet_of(prefills=2)
    for server in fleet.prefills:
        server.learn({"internal_states": [{"kairos": {"prefill": LAW}}]})
    blocks = blocks_of([7] * 1024, 4.0)
    fleet.prefills[1].prefix.add(blocks)
    due = 1e12
    fleet.prefills[1].enqueue(500, due, fleet.clock.now_s())
    placement = fleet.reserve(PlacedRequest(1024, due), (), blocks)
    assert placement is not None
    assert placement.prefill is fleet.prefills[1]
    fleet.prefills[1].enqueue(900, due, fleet.clock.now_s())
    placement = fleet.reserve(PlacedRequest(1024, due), (), blocks)
    assert placement is not None
    assert placement.prefill is fleet.prefills[0]


def test_a_large_fleet_is_sampled_and_a_prefix_found_again() -> None:
    fleet = fleet_of(prefills=500, decodes=500)
    blocks = blocks_of("x" * 4000, 4.0)
    first = fleet.reserve(PlacedRequest(1000, math.inf), (), blocks)
    assert first is not None
    first.take().release()
    for _ in range(20):
        again = fleet.reserve(PlacedRequest(1000, math.inf), (), blocks)
        assert again is not None
        assert again.prefill is first.prefill
    for server in fleet.servers[:495]:
        server.health.request_refused()
    left = fleet.reserve(PlacedRequest(1000, math.inf), (), blocks)
    assert left is not None
    assert left.prefill in fleet.prefills[495:]


LAW = {"a_s": 0.0, "b_s": 1e-3, "c_s": 0.0, "d_s": 0.0}


@pytest.mark.parametrize(
    ("raw", "law"),
    [
        (LAW, PrefillLatency(0.0, 1e-3, 0.0)),
        ({"a_s": 1, "b_s": 2, "c_s": 3}, PrefillLatency(1, 2, 3)),
        ({**LAW, "d_s": 4e-9}, PrefillLatency(0.0, 1e-3, 0.0, 4e-9)),
        ({**LAW, "e_s": 4e-5}, PrefillLatency(0.0, 1e-3, 0.0, 0.0, 4e-5)),
        ({**LAW, "d_s": "x"}, None),
        ({**LAW, "e_s": None}, None),
        ({**LAW, "knee": 0}, None),
        ({**LAW, "b_s": -1}, None),
        ({"a_s": 0, "b_s": 0, "c_s": 1}, None),
        ([], None),
    ],
)
def test_a_prefill_law_is_taken_whole_or_not_at_all(raw: Any, law: Any) -> None:
    assert prefill_law({"prefill": raw}) == law


@pytest.mark.parametrize(
    ("report", "law"),
    [
        ({"decode": {"a_s": 1, "b_s": 2, "c_s": 3}}, DecodeLatency(1, 2, 3)),
        (
            {"decode": {"a_s": 1, "b_s": 2, "c_s": 3, "knees": [[8, 0.5]]}},
            DecodeLatency(1, 2, 3, ((8, 0.5),)),
        ),
        ({"decode": {"a_s": 1, "b_s": 2, "c_s": 3, "knees": [[8]]}}, None),
        ({"decode": {"a_s": 1, "b_s": 2}}, None),
        ({}, None),
    ],
)
def test_a_decode_law_too(report: Any, law: Any) -> None:
    assert decode_law(report) == law


def test_a_predictor_is_believed_once_it_has_seen_some_steps() -> None:
    assert settled({}, "prefill_error")
    assert not settled({"prefill_error": {"samples": 2}}, "prefill_error")
    assert settled({"prefill_error": {"samples": 20}}, "prefill_error")


def test_loads_of_all_ranks_add_up_and_odd_ones_say_nothing() -> None:
    row = {"num_running_reqs": 2, "num_waiting_reqs": 1, "num_total_tokens": 50}
    answer = {"loads": [row, {**row, "num_waiting_uncached_tokens": 7}, "x"]}
    assert load_of(answer) == Load(6, 100.0, 7.0)
    for odd in (None, [], {}, {"loads": 5}, {"loads": [1]}):
        assert load_of(odd) is None


def test_what_others_sent_a_server_counts_while_its_report_is_fresh() -> None:
    server = PrefillServer("http://p", 1)
    server.learn({"internal_states": [{"kairos": {"prefill": LAW}}]})
    server.enqueue(300, 5.0, 100.0)
    server.learn_load(Load(3, 0.0, 1000.0), 100.0)
    assert server.state(100.0).extra_s == pytest.approx(0.7)
    assert server.state(100.0 + 2 * FRESH_S).extra_s == 0.0
    server.learn_load(Load(1, 0.0, 200.0), 101.0)
    assert server.state(101.0).extra_s == 0.0
    server.learn_load(None, 102.0)
    assert server.state(102.0).extra_s == 0.0
    decode = DecodeServer("http://d")
    decode.admit(2, 100.0, 0.05)
    decode.learn_load(Load(5, 160.0, 0.0), 100.0)
    state = decode.state(100.0)
    assert (state.running, state.tokens, list(state.tpots_s)) == (5, 160.0, [0.05])
    assert decode.state(100.0 + 2 * FRESH_S).running == 2
    decode.release(2, 100.0, 0.05)
    assert decode.state(200.0) == DecodeServer("http://d").state()


def test_a_server_that_falls_behind_its_plan_gets_a_new_one() -> None:
    server = PrefillServer("http://p", 1)
    server.learn({"internal_states": [{"kairos": {"prefill": LAW}}]})
    server.enqueue(1000, 2.0, 0.0)
    server.enqueue(500, 3.0, 0.0)
    plan = server.state(0.5).backlog
    assert plan is server.state(0.99).backlog
    assert plan is not None
    assert plan.on_time_s == pytest.approx(1.5)
    late = server.state(9.0).backlog
    assert late is not None
    assert late.on_time_s == 0.0


@given(
    st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 100)), max_size=30), st.randoms(), st.data()
)
def test_dequeued_prompts_leave_no_trace(
    jobs: list[tuple[float, float]], rng: Any, data: st.DataObject
) -> None:
    server = PrefillServer("http://p", 1)
    prompts = [server.enqueue(tokens, due, 0.0) for tokens, due in jobs]
    rng.shuffle(prompts)
    for prompt in prompts:
        server.dequeue(prompt, 1.0, served=data.draw(st.booleans()))
        server.dequeue(prompt, 1.0, served=True)
    assert (server.owed, server.owed_s, server._owed_tokens) == (0, 0, 0.0)


def test_prefixes_match_by_block_from_the_front_only() -> None:
    index = PrefixIndex()
    base = list(range(10 * BLOCK_TOKENS))
    index.add(blocks_of(base, 4.0))
    assert index.cached_tokens(blocks_of(base[: 5 * BLOCK_TOKENS + 3], 4.0)) == 5 * BLOCK_TOKENS
    changed = [*base[:BLOCK_TOKENS], -1, *base[BLOCK_TOKENS + 1 :]]
    assert index.cached_tokens(blocks_of(changed, 4.0)) == BLOCK_TOKENS
    assert index.cached_tokens(blocks_of(base[1:], 4.0)) == 0
    index.clear()
    assert index.cached_tokens(blocks_of(base, 4.0)) == 0


def test_a_prefix_index_forgets_the_longest_unused_and_never_grows_beyond_its_limit() -> None:
    index = PrefixIndex(most=8)
    prompts = [blocks_of([n] * 4 * BLOCK_TOKENS, 4.0) for n in range(3)]
    index.add(prompts[0])
    index.add(prompts[1])
    index.add(prompts[0])
    index.add(prompts[2])
    assert len(index) == 8
    cached = [index.cached_tokens(prompt) for prompt in prompts]
    assert cached == [4 * BLOCK_TOKENS, 0, 4 * BLOCK_TOKENS]
    index.limit(0)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("path", "body", "same"),
    [
        ("/generate", {"text": "x" * 5 * BLOCK_BYTES}, 5),
        ("/generate", {"text": ["x" * 5 * BLOCK_BYTES, "y"]}, 5),
        ("/v1/completions", {"prompt": [1] * 5 * BLOCK_TOKENS}, 5),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, 7),
        ("/generate", {"text": 5}, 0),
        ("/generate", {"input_ids": [1, [2]] * BLOCK_TOKENS}, 0),
        ("/v1/chat/completions", {"messages": "odd"}, 0),
        ("/generate", {}, 0),
    ],
)
def test_every_kind_of_prompt_has_blocks(path: str, body: dict[str, Any], same: int) -> None:
    assert len(prompt_blocks(body, path, 4.0).hashes) == same


def test_the_margin_follows_how_far_predictions_fall_short() -> None:
    margin = Margin()
    for _ in range(2000):
        margin.observe(1.0, 1.3)
    assert margin.value_s == pytest.approx(0.3, abs=0.1)
    for _ in range(2000):
        margin.observe(1.0, 0.9)
    assert margin.value_s < 0.05


async def test_servers_are_asked_and_odd_answers_do_no_harm() -> None:
    prefill = Fake("prefill", info={"internal_states": [{"kairos": {"prefill": LAW}}]})
    prefill.loads = {"num_waiting_uncached_tokens": 2000}
    decode = Fake("decode", info={"internal_states": "odd", "max_total_num_tokens": 5})
    decode.loads = {"num_running_reqs": "many"}
    async with bench(prefill, decode) as b:
        fleet = b.router.fleet
        await until(lambda: fleet.prefills[0].describe()["foreign_tokens"] == 2000)
        assert fleet.prefills[0].describe()["speed"][1] == 1e-3
        await until(lambda: fleet.decodes[0].state().capacity_tokens == 5)
        async with b.client.get("/v1/loads") as response:
            loads = await response.json()
        assert loads["servers"][b.p.url]["loads"] == [prefill.loads]
