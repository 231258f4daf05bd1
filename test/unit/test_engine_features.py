"""The table of features that Kairos leaves to stock scheduling: found where it should be, told once."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import compat, features, plugin
from sglang_kairos.engine.features import FEATURES, Action, reasons, why_not
from sglang_kairos.engine.hooks import http, lifecycle, slo_middleware
from sglang_kairos.engine.state import scheduler_state

# What a scheduler with each feature shows, for those found at its start.
SHOWN: dict[str, dict[str, Any]] = {
    "speculative decoding": {"spec_algorithm": SimpleNamespace(is_none=lambda: False)},
    "hisparse": {"enable_hisparse": True},
    "Mamba models": {"req_to_token_pool": SimpleNamespace(mamba_allocator=object())},
    "DP attention": {"require_mlp_sync": True},
    "sliding-window models": {"is_hybrid_swa": True},
    "hybrid models": {"is_hybrid_ssm": True},
    "LoRA": {"enable_lora": True},
    "hierarchical cache": {"enable_hierarchical_cache": True},
    "LMCache": {"enable_lmcache": True},
    "staged KV transfer": {"enable_staging": True},
    "diffusion LLMs": {"dllm_config": object()},
}
REFUSED = ("start", "serve")


def of_scheduler() -> list[features.Feature]:
    """Rows found on a running scheduler."""
    return [row for row in FEATURES if row.server and row.forbids[0] not in REFUSED]


def bare(**shown: Any) -> Any:
    """A scheduler that shows nothing else."""
    none = SimpleNamespace(is_none=lambda: True)
    return SimpleNamespace(server_args=SimpleNamespace(), **{"spec_algorithm": none, **shown})


def test_every_feature_of_a_scheduler_stands_in_this_file() -> None:
    assert [row.name for row in of_scheduler()] == list(SHOWN)


@pytest.mark.parametrize("row", of_scheduler(), ids=lambda row: row.name)
def test_a_feature_forbids_what_its_row_says_and_nothing_else(row: features.Feature) -> None:
    switches = {name: shown for name, shown in SHOWN[row.name].items() if name != "spec_algorithm"}
    hosts = [bare(**SHOWN[row.name])]
    if all(value is True for value in switches.values()) and switches:
        hosts.append(bare())  # v0.5.16 has some of them as a server argument only
        vars(hosts[1].server_args).update(switches)
    for host in hosts:
        actions: tuple[Action, ...] = ("pause", "park", "reserve")
        for action in actions:
            expected = [row.reason] if action in row.forbids else []
            assert list(reasons(action, host)) == expected, action


def test_a_plain_server_may_do_everything() -> None:
    assert [why_not(action, bare()) for action in ("pause", "park", "reserve")] == [""] * 3
    assert features.lost("prefill", bare(), ["pause"]) == []


def test_rows_are_told_apart_and_each_forbids_something() -> None:
    assert len({row.name for row in FEATURES}) == len({row.reason for row in FEATURES})
    assert len({row.name for row in FEATURES}) == len(FEATURES)
    for row in FEATURES:
        assert row.forbids and (row.server or row.batch), row.name


@pytest.mark.parametrize(
    ("mode", "lines"),
    [
        ("prefill", ["chunked prefills are not paused: hisparse is on, LoRA is on"]),
        ("decode", ["decode packing is off: hisparse is on"]),
        ("null", []),
    ],
)
def test_the_start_up_lines_say_what_is_lost_in_this_mode(mode: str, lines: list[str]) -> None:
    server = bare(enable_lora=True, enable_hisparse=True)
    assert features.lost(mode, server, ["pause", "park", "reserve"]) == lines
    assert features.lost(mode, server, []) == []


def test_a_decode_server_says_at_its_start_what_it_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = bare(**SHOWN["speculative decoding"])
    made = SimpleNamespace(mode="decode", cannot_pause="")
    monkeypatch.setattr(features, "refuse_unsupported", lambda scheduler: None)
    monkeypatch.setattr(lifecycle, "active_config", lambda: KairosConfig())
    monkeypatch.setattr(scheduler_state, "KairosState", lambda scheduler, config: made)
    monkeypatch.setattr(scheduler_state, "CURRENT", None)
    with caplog.at_level(logging.WARNING):
        lifecycle.run_event_loop(lambda scheduler: None, server)
    said = [record.message for record in caplog.records]
    assert "Kairos: decode packing is off: speculative decoding is on" in said
    assert any("limit admission: speculative decoding is on" in line for line in said)


@pytest.mark.parametrize("workers", [1, 2])
def test_several_tokenizer_processes_are_refused_where_the_http_server_starts(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    server_args = SimpleNamespace(tokenizer_worker_num=workers)
    monkeypatch.setattr(http, "facts_of", lambda *args: slo_middleware.UNKNOWN)
    monkeypatch.setattr(compat, "finalizes_input_logprobs", lambda: True)
    monkeypatch.setattr(http, "active_config", lambda: KairosConfig())
    app = SimpleNamespace(user_middleware=[])
    module: Any = SimpleNamespace(app=app)
    monkeypatch.setitem(__import__("sys").modules, plugin.HTTP_MODULE, module)

    def serve() -> Any:
        return http.run_http_server(
            lambda *args: "served", server_args, None, None, None, [{"kairos": {}}]
        )

    if workers == 1:
        assert serve() == "served" and app.user_middleware
        return
    with pytest.raises(SystemExit, match=r"--tokenizer-worker-num > 1.*--kairos off"):
        serve()


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_what_is_looked_for_is_there_in_sglang(version: str) -> None:
    """A switch that SGLang renames would be off for ever, and its feature scheduled around."""
    folder = sglang_folder(version) / "sglang" / "srt"
    files = [folder / "managers/scheduler.py", folder / "server_args.py"]
    files += sorted((folder / "arg_groups" / "fields").glob("*.py"))  # since v0.5.20
    text = "".join(path.read_text("utf-8") for path in files)
    names = [name for shown in SHOWN.values() for name in shown]
    missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert missing == []
