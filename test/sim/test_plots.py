"""Pictures of a comparison: which files there are, and what happens without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sglang_kairos.sim.__main__ import main
from sglang_kairos.sim.cli import options

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 1)


def test_each_slo_and_each_rate_has_its_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "plots"
    argv = "--generate 25 --rate 5,80 --seed 1,2 --policies fcfs,kairos --slo 200/900:30 --no-bound"
    assert main([*argv.split(), "--plots", str(folder)]) == 0
    slo = "ttft200-900_tpot30"
    names = {f"attainment_{slo}.png", f"goodput_{slo}.png"} | {
        f"{kind}_rate{rate}_{slo}.png" for kind in ("latency", "payers") for rate in (5, 80)
    }
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.read_bytes().startswith(PNG) for path in folder.iterdir())
    shown = capsys.readouterr().out
    assert all(f"drawn: {folder / name}" in shown for name in names)


def test_one_rate_at_which_all_arrive_at_once_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = tmp_path / "burst.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 90, "output_length": 2}\n' * 3)
    argv = ["--trace", str(trace), "--policies", "fcfs", "--no-bound", "--plots", str(tmp_path)]
    assert main(argv) == 0
    assert (tmp_path / "payers_own_rate_ttft2000_tpot100.png").exists()


def test_without_matplotlib_one_line_says_what_to_install_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--generate", "5", "--plots", str(tmp_path / "plots")])
    err = capsys.readouterr().err
    assert '--plots needs matplotlib: pip install "sglang-kairos[sim]"' in err
    assert "Traceback" not in err and not (tmp_path / "plots").exists()
