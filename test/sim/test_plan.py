"""How many servers: the search over shapes, and `python -m sglang_kairos.sim plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.sim.__main__ import main
from sglang_kairos.sim.cli import options
from sglang_kairos.sim.cli.sizing import Search, Shape, search_together


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 1)


def found(
    attainment: Callable[[Shape], float], attain: float = 0.9, most: int = 16
) -> tuple[Shape | None, Search]:
    search = Search(attain, most)
    answers = search_together({0: search}, lambda pairs: [attainment(s) for _, s in pairs])
    return answers[0], search


def needs(prefill: int, decode: int) -> Callable[[Shape], float]:
    return lambda shape: min(1.0, shape.prefill / prefill) * min(1.0, shape.decode / decode)


@pytest.mark.parametrize("prefill", [1, 2, 5, 9, 15])
@pytest.mark.parametrize("decode", [1, 3, 4, 11, 15])
def test_each_side_gets_what_it_needs_if_that_is_within_the_limit(
    prefill: int, decode: int
) -> None:
    answer, search = found(needs(prefill, decode), attain=1.0)
    assert answer == (Shape(prefill, decode) if prefill + decode <= 16 else None)
    assert len(search.known) <= 20


@given(
    steps=st.lists(st.integers(0, 15), min_size=15, max_size=15),
    most=st.integers(2, 16),
)
def test_the_answer_is_the_smallest_wherever_a_server_more_never_hurts(
    steps: list[int], most: int
) -> None:
    # With p prefill servers at least least[p] decode servers are needed, fewer with more of p.
    least = sorted((step + 1 for step in steps), reverse=True)

    def attainment(shape: Shape) -> float:
        return float(shape.decode >= least[min(shape.prefill, 15) - 1])

    every = [Shape(p, n - p) for n in range(2, most + 1) for p in range(1, n)]
    enough = [shape for shape in every if attainment(shape) == 1]
    answer, _ = found(attainment, most=most)
    assert answer == min(enough, key=lambda shape: shape.cost, default=None)


@given(st.dictionaries(st.tuples(st.integers(1, 15), st.integers(1, 15)), st.floats(0, 1)))
def test_whatever_the_attainments_the_answer_is_enough_and_its_neighbours_are_not(
    table: dict[tuple[int, int], float],
) -> None:
    answer, search = found(lambda shape: table.get(tuple(shape), 0.95))
    known = search.known
    assert all(shape.prefill >= 1 and shape.decode >= 1 for shape in known)
    if answer is None:
        assert not any(value >= 0.9 and s.servers <= 16 for s, value in known.items())
        return
    assert known[answer] >= 0.9 and answer.servers <= 16
    p, d = answer
    for other in (Shape(p - 1, d), Shape(p, d - 1), Shape(p - 1, d + 1)):
        assert min(other) < 1 or known[other] < 0.9


def test_a_smaller_shape_that_is_enough_after_all_is_taken() -> None:
    # 7P2D is not, so the search leaves 4P2D out until it is next to the answer.
    good = {Shape(4, 4), Shape(2, 7), Shape(7, 3), Shape(4, 3), Shape(4, 2)}
    answer, _ = found(lambda shape: float(shape in good))
    assert answer == Shape(4, 2)


def test_several_searches_ask_together_and_get_their_own_answers() -> None:
    wanted = {"a": Shape(1, 2), "b": Shape(6, 3), "c": None}
    calls: list[set[str]] = []

    def probe(pairs: Any) -> list[float]:
        calls.append({key for key, _ in pairs})
        return [needs(*(wanted[key] or (99, 99)))(shape) for key, shape in pairs]

    searches = {key: Search(1.0, 16) for key in wanted}
    assert search_together(searches, probe) == wanted
    assert calls[0] == {"a", "b", "c"}


def test_the_command_prints_and_writes_the_answer_and_its_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    argv = "plan --generate 60 --rate 80 --slo 300:20 --attain 0.95 --seed 1,2 --times law"
    assert main([*argv.split(), "--policies", "fcfs", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    (plan,) = report["plans"]
    tried = {(row["prefill"], row["decode"]): row for row in plan["tried"]}
    answer = plan["answer"]
    p, d = answer["prefill"], answer["decode"]
    assert p + d == answer["servers"] > 2
    assert 0.95 <= answer["e2e"] <= min(answer["ttft"], answer["tpot"]) <= 1
    for shape in ((p - 1, d), (p, d - 1)):
        assert min(shape) < 1 or tried[shape]["e2e"] < 0.95
    assert plan["policy"] == "fcfs" and plan["slo"] == {"ttft_ms": [300.0], "tpot_ms": 20.0}
    assert report["setup"]["simulated"] is True and report["setup"]["seeds"] == [1, 2]
    shown = capsys.readouterr().out
    assert "at least 95 % must meet both targets, lowest of 2 seeds" in shown
    assert f"fcfs: {p}P{d}D, {p + d} servers: TTFT" in shown and "next to it: " in shown


def test_no_answer_within_the_limit_says_what_came_closest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    argv = "plan --generate 20 --rate 50 --ttft-ms 1 --metric ttft --max-servers 3 --times law"
    assert main([*argv.split(), "--json", str(out)]) == 0
    assert "kairos: not with 3 servers; of those tried 1P1D came closest with 0.0 %" in (
        capsys.readouterr().out
    )
    assert [plan["answer"] for plan in json.loads(out.read_text())["plans"]] == [None, None]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--attain 90", "--attain must be a number between 0.01 and 1, got '90'"),
        ("--max-servers 1", "--max-servers must be a whole number between 2 and 256, got '1'"),
        ("--metric goodput", "invalid choice: 'goodput'"),
        ("--prefill 2", "unrecognized arguments: --prefill"),
    ],
)
def test_bad_arguments_are_named(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *argv.split()])
    assert says in capsys.readouterr().err
