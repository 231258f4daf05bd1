"""The roster: one row per living request, the facts of each, rows of the dead used again."""

from __future__ import annotations

import gc
import random

import pytest

from helpers.fake_scheduler import Req, make_state
from sglang_kairos.engine.state.waiting_table import Roster


def test_rows_hold_what_was_promised_and_stay() -> None:
    state = make_state()
    reqs = [Req("a", 10, 1000, weight=3.0), Req("b", 20, 500, age_ms=200)]
    reqs[1].output_ids = [1, 2]
    roster = Roster(state.promise)
    rows = roster.rows(reqs)
    assert roster.tokens[rows].tolist() == [10, 22]
    assert roster.weight[rows].tolist() == [3.0, 1.0]
    for req, row in zip(reqs, rows, strict=True):
        promise = state.promise(req)
        assert roster.arrival_s[row] == promise.arrival_s
        assert roster.arrival_s[row] + roster.ttft_s[row] == pytest.approx(promise.ttft_due_s)
    assert roster.rows(reqs[::-1]).tolist() == rows[::-1].tolist()


def test_rows_of_the_dead_are_used_again_and_never_mistaken() -> None:
    state, rng = make_state(), random.Random(1)
    roster = Roster(state.promise, rows=4)
    alive: list[Req] = []
    for step in range(300):
        rng.shuffle(alive)
        del alive[: rng.randrange(0, 1 + len(alive) // 2)]
        gc.collect(0)
        alive += [Req(f"{step}.{i}", rng.randrange(1, 999), 1000) for i in range(rng.randrange(9))]
        rows = roster.rows(alive)
        assert len(set(rows.tolist())) == len(alive) == len(roster)
        assert roster.tokens[rows].tolist() == [len(req.origin_input_ids) for req in alive]
    assert len(roster.tokens) < 128


def test_growing_keeps_what_is_known() -> None:
    state = make_state()
    roster = Roster(state.promise, rows=2)
    first = [Req("a", 10, 1000), Req("b", 20, 1000)]
    roster.matched_tokens[roster.rows(first)] = [5, 6]
    more = [Req(f"m{i}", 1, 1000) for i in range(9)]
    roster.rows([*more, *first])
    assert roster.matched_tokens[roster.rows(first)].tolist() == [5, 6]
