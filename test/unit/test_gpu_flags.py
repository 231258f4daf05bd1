"""Kairos' preferences on a GPU: FlashInfer unless somebody chose, and nothing switched off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos import launch_server
from sglang_kairos.cpu import runtime
from sglang_kairos.engine.state.graph_sizes import captured_sizes
from sglang_kairos.gpu_flags import with_gpu_flags

FLASHINFER = ["--attention-backend", "flashinfer"]


@pytest.mark.parametrize(
    ("argv", "added"),
    [
        ([], FLASHINFER),
        (["--model-path", "m", "--tp", "2"], FLASHINFER),
        (["--device", "cuda"], FLASHINFER),
        (["--disaggregation-mode", "decode"], FLASHINFER),
        (["--attention-backend", "fa3"], []),
        (["--attention-backend=triton"], []),
        (["--attention-back", "fa3"], []),
        (["--prefill-attention-backend", "fa3"], []),
        (["--decode-attention-backend=trtllm_mha"], []),
        (["--config", "server.yaml"], []),
        (["--device", "cpu"], []),
        (["--device=xpu"], []),
        (["--disable-cuda-graph", "--attention-backend", "flashinfer"], []),
    ],
)
def test_flashinfer_is_chosen_unless_the_user_chose(argv: list[str], added: list[str]) -> None:
    assert with_gpu_flags(argv, flashinfer=True) == [*argv, *added]


def test_without_flashinfer_sglang_chooses() -> None:
    assert with_gpu_flags(["--tp", "2"], flashinfer=False) == ["--tp", "2"]


def test_cuda_graphs_and_overlap_are_never_touched() -> None:
    added = with_gpu_flags([], flashinfer=True)
    assert not [word for word in added if "disable" in word or "graph" in word or "overlap" in word]


@pytest.mark.parametrize(("kairos", "added"), [("on", FLASHINFER), ("off", [])])
def test_the_launcher_prefers_it_on_a_gpu_and_off_is_stock(
    kairos: str, added: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KAIROS", "KAIROS_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch_server.os, "environ", dict(launch_server.os.environ))
    monkeypatch.setattr(runtime, "is_active", lambda: False)
    monkeypatch.setattr(runtime, "cuda_present", lambda: True)
    monkeypatch.setattr(launch_server, "find_spec", lambda name: object())
    monkeypatch.setattr(launch_server, "check_loadable", lambda: None)
    words = ["--model-path", "m"]
    assert launch_server.prepare([*words, "--kairos", kairos]) == [*words, *added]


def scheduler(graphs: Any) -> Any:
    runner = SimpleNamespace(decode_cuda_graph_runner=graphs)
    return SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))


@pytest.mark.parametrize(
    ("graphs", "sizes"),
    [
        (SimpleNamespace(capture_bs=[8, 1, 2, 4], disable_padding=False), [1, 2, 4, 8]),
        (SimpleNamespace(capture_bs=[1, 2, 2]), [1, 2]),
        (SimpleNamespace(capture_bs=[1, 2, 4], disable_padding=True), None),
        (SimpleNamespace(capture_bs=[]), None),
        (SimpleNamespace(), None),
        (None, None),
    ],
)
def test_batch_sizes_are_those_the_graph_runner_captured(
    graphs: Any, sizes: list[int] | None
) -> None:
    assert captured_sizes(scheduler(graphs)) == sizes


def test_a_worker_without_a_model_runner_has_no_sizes() -> None:
    assert captured_sizes(SimpleNamespace(tp_worker=SimpleNamespace())) is None


def test_the_runner_has_these_names_in_the_installed_sglang() -> None:
    """Read off its source: importing it needs a GPU."""
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations))) / "srt" / "model_executor"
    assert "self.decode_cuda_graph_runner = " in (folder / "model_runner.py").read_text()
    graphs = (folder / "runner" / "decode_cuda_graph_runner.py").read_text()
    assert "self.capture_bs" in graphs and "self.disable_padding" in graphs
