"""One law: the server, the router and the simulator predict the same, and JSON carries it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.loads.traces import Request
from sglang_kairos.policy.placement import PlacedRequest, decode_outlook, prefill_outlook
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.predict.shipped_models import seed_for
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.core.predictions import PredictionError, Predictor
from sglang_kairos.sim.core.request import SimRequest
from sglang_kairos.sim.core.router import SimRouter
from sglang_kairos.sim.hardware.times import MINIMAX_M25_H200_TP4, LawTimes

none = st.just(0.0)
prefill_laws = st.builds(
    PrefillLatency,
    a_s=st.floats(1e-4, 0.1),
    b_s=st.floats(1e-7, 1e-3),
    c_s=none | st.floats(1e-12, 1e-6),
    d_s=none | st.floats(1e-12, 1e-7),
    e_s=none | st.floats(1e-9, 1e-3),
    knee=st.sampled_from([1.0, 192.0, 256.0, 512.0]),
)
knees = st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 1e-2)), max_size=3).map(tuple)
decode_laws = st.builds(
    DecodeLatency, st.floats(1e-4, 0.1), st.floats(0, 1e-2), st.floats(0, 1e-6), knees
)
# Not chunked, tiny chunks, and the usual ones.
chunk_sizes = st.sampled_from([-1, 0, 1, 64, 512, 8192]) | st.integers(1, 20_000)
prompts = st.integers(1, 100_000)


def sent(report: dict[str, Any], **info: Any) -> dict[str, Any]:
    """What ``/server_info`` is after its way over the wire."""
    told: dict[str, Any] = json.loads(
        json.dumps({**info, "internal_states": [{"kairos": report}]}, allow_nan=False)
    )
    return told


@given(prefill_laws, decode_laws)
def test_a_law_is_read_back_from_json_as_it_was(
    prefill: PrefillLatency, decode: DecodeLatency
) -> None:
    assert PrefillLatency.from_json(json.loads(json.dumps(prefill.to_json()))) == prefill
    assert DecodeLatency.from_json(json.loads(json.dumps(decode.to_json()))) == decode


@given(prefill_laws, prompts, st.integers(0, 100_000), chunk_sizes)
def test_the_router_predicts_a_prompt_as_the_server_itself_does(
    law: PrefillLatency, tokens: int, prefix: int, chunk: int
) -> None:
    model = PrefillTimeModel(*law)
    router = PrefillServer("http://p", 1)
    router.learn(sent({"prefill": model.law.to_json()}, chunked_prefill_size=chunk))
    own = float(model.remaining_s(tokens, prefix, chunk))
    state = router.state(0.0)._replace(cached_tokens=float(prefix))
    placed = prefill_outlook(state, PlacedRequest(tokens + prefix, math.inf))
    assert placed.end_s == pytest.approx(own, rel=1e-12)
    prompt = router.enqueue(tokens + prefix, math.inf, 0.0, cached=prefix)
    assert prompt.work_s == pytest.approx(own, rel=1e-12)


@given(prefill_laws, prompts, chunk_sizes)
def test_the_simulated_router_predicts_a_prompt_as_the_server_itself_does(
    law: PrefillLatency, tokens: int, chunk: int
) -> None:
    times = LawTimes(law, DecodeLatency(1e-3, 1e-4, 0.0), None)
    system = replace(MINIMAX_M25_H200_TP4, times=times, chunk_tokens=chunk)
    servers = [Predictor(times, PredictionError(), str(seed)) for seed in range(2)]
    router = SimRouter(system, POLICIES["kairos"], servers, servers, 0, 64)
    request = SimRequest(0, Request(0.0, tokens, 8), 1e3, 1e2)
    router.place(request, 0.0)
    (reservation,) = router._reserved.values()
    assert reservation.prefill.owed_s == float(times.prefill_model().remaining_s(tokens, 0, chunk))


@given(decode_laws, st.integers(0, 4000), st.integers(0, 10_000_000))
def test_the_router_predicts_a_decode_step_as_the_server_itself_does(
    law: DecodeLatency, running: int, tokens: int
) -> None:
    model = StepTimeModel.of(law)
    router = DecodeServer("http://d")
    router.learn(sent({"decode": model.law.to_json()}))
    router.admit(running, tokens)
    outlook = decode_outlook(router.state(), PlacedRequest(100, math.inf))
    own = model.step_s(running + 1, tokens + 100.0)
    assert outlook.step_s == own
    assert model.step_s(np.array([running + 1]), np.array([tokens + 100.0])) == [own]
    assert LawTimes(PrefillLatency(1.0, 0.0, 0.0), law, None).decode_s(
        running + 1, tokens + 100
    ) == (pytest.approx(own, rel=1e-12))


@given(prefill_laws, st.lists(st.tuples(prompts, st.integers(0, 100_000)), min_size=1), chunk_sizes)
def test_many_prompts_at_once_are_each_of_them_alone(
    law: PrefillLatency, rows: list[tuple[int, int]], chunk: int
) -> None:
    tokens, prefix = np.array(rows, float).T
    alone = [law.work_s(float(n), float(before), chunk) for n, before in rows]
    assert law.work_s(tokens, prefix, chunk).tolist() == alone


@given(prefill_laws, st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 600))
def test_work_is_the_sum_of_the_steps_that_it_takes(
    law: PrefillLatency, tokens: int, prefix: int, chunk: int
) -> None:
    starts = range(0, tokens, chunk)
    steps = [law.step_s(min(chunk, tokens - at), prefix + at) for at in starts]
    assert law.work_s(tokens, prefix, chunk) == pytest.approx(sum(steps))
    assert law.work_s(tokens, prefix) == pytest.approx(law.step_s(tokens, prefix))
    assert law.work_s(0, prefix, chunk) == law.work_s(0, prefix) == 0.0


def test_the_term_of_the_shipped_law_that_routers_used_to_drop_arrives() -> None:
    shipped = seed_for("MiniMax-M2.5", "H200", 4)
    assert shipped is not None and shipped.prefill is not None
    router = PrefillServer("http://p", 1)
    router.learn(sent({"prefill": shipped.prefill.to_json()}, chunked_prefill_size=8192))
    assert router.state(0.0).law == shipped.prefill
    short = router.state(0.0).law._replace(e_s=0.0).work_s(256, 0, 8192)
    assert short / shipped.prefill.work_s(256, 0, 8192) == pytest.approx(1 - 0.118, abs=1e-3)


@pytest.mark.parametrize(
    ("raw", "law"),
    [
        ({"a_s": 1, "b_s": 2, "c_s": 3}, PrefillLatency(1, 2, 3)),
        ({"a_s": 1, "b_s": 2, "c_s": 3, "d_s": 4}, PrefillLatency(1, 2, 3, 4)),
        ({"a_s": 1, "b_s": 2, "c_s": 3, "d_s": 4, "e_s": 5}, PrefillLatency(1, 2, 3, 4, 5)),
    ],
)
def test_prefill_laws_of_older_servers_are_read(raw: dict[str, Any], law: PrefillLatency) -> None:
    assert PrefillLatency.from_json(raw) == law


@pytest.mark.parametrize(
    ("raw", "law"),
    [
        ({"a_s": 1, "b_s": 2, "c_s": 3}, DecodeLatency(1, 2, 3)),
        ({"a_s": 1, "b_s": 2, "c_s": 3, "knee_s": [4, 5]}, DecodeLatency.of((1, 2, 4, 5, 3))),
        ({"a_s": 1, "b_s": 2, "c_s": 3, "knees": [[16, 4]]}, DecodeLatency(1, 2, 3, ((16, 4),))),
        ({"a_s": 1, "b_s": 2, "c_s": 3, "knees": []}, DecodeLatency(1, 2, 3, ())),
    ],
)
def test_decode_laws_of_older_servers_and_files_are_read(
    raw: dict[str, Any], law: DecodeLatency
) -> None:
    assert DecodeLatency.from_json(raw) == law


@pytest.mark.parametrize("field", ["a_s", "b_s", "c_s", "d_s", "e_s", "knee"])
@pytest.mark.parametrize("value", [-1, 1e30, math.nan, math.inf, "1", True, None])
def test_a_wrong_prefill_law_is_refused_by_field(field: str, value: Any) -> None:
    raw = {**PrefillLatency(1, 2, 3).to_json(), field: value}
    with pytest.raises(ValueError, match=f"^{field}: "):
        PrefillLatency.from_json(raw)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"a_s": -1}, "a_s"),
        ({"c_s": None}, "c_s"),
        ({"knees": 5}, "knees"),
        ({"knees": [[8]]}, "knees"),
        ({"knees": [[0, 1]]}, "knees"),
        ({"knees": [[8, "x"]]}, "knees"),
        ({"knees": None, "knee_s": [1]}, "knee_s"),
    ],
)
def test_a_wrong_decode_law_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        DecodeLatency.from_json({**DecodeLatency(1, 2, 3).to_json(), **changes})


@given(prefill_laws, st.floats(0.5, 3.0), prompts)
def test_a_slower_machine_takes_as_much_longer(law: PrefillLatency, factor: float, n: int) -> None:
    assert law.scaled(factor).work_s(n, 5, 512) == pytest.approx(factor * law.work_s(n, 5, 512))
