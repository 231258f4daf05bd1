"""Benchmarks go on working when what they measure changes."""

from __future__ import annotations

from benchmark import decode_cost


def test_the_cost_of_decode_decisions_can_be_measured() -> None:
    rows = decode_cost.measure(256, rounds=2)
    assert [row["what"] for row in rows] == ["select", "admit", "membership", "all fit"]
    assert all(row["median_us"] > 0 for row in rows)
    assert [row["bound_us"] for row in rows] == [100.0, None, None, None]
