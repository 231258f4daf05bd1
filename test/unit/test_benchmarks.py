"""Benchmarks go on working when what they measure changes."""

from __future__ import annotations

import pytest
from benchmark import decode_cost, demo

from helpers.trees import sglang_folder
from sglang_kairos.tools import patch


def test_the_cost_of_decode_decisions_can_be_measured() -> None:
    rows = decode_cost.measure(256, rounds=2)
    assert [row["what"] for row in rows] == ["select", "admit", "membership", "all fit"]
    assert all(row["median_us"] > 0 for row in rows)
    assert [row["bound_us"] for row in rows] == [100.0, None, None, None]


@pytest.mark.parametrize(
    ("version", "policies"), [("0.5.23", list(demo.POLICIES)), ("0.5.16", ["fcfs", "kairos"])]
)
def test_the_demo_compares_the_policies_that_the_version_has(
    version: str,
    policies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = sglang_folder(version)
    used: list[str] = []
    monkeypatch.setattr(demo, "use", used.append)
    monkeypatch.setattr(demo, "find_tree", lambda: patch.find_tree(folder))
    assert demo.parse(["--sglang", version]).policies == policies
    assert used == [version]
    with pytest.raises(SystemExit):
        demo.parse(["--policies", "lpm"])
    assert f"this SGLang has: {', '.join(policies)}" in capsys.readouterr().err
