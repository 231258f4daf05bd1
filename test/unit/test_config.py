"""Settings: flag before environment before file before default, and refusals that name the flag."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_kairos.config import ConfigError, KairosConfig, add_flags, env_of, flag_of
from sglang_kairos.slo.targets import Slo

FIELDS = {item.name: item for item in dataclasses.fields(KairosConfig)}
OTHER: dict[str, Any] = {
    "ttft_ms": 123.5,
    "tpot_ms": 7.25,
    "slo_classes": "x.json",
    "priority_classes": "0=chat",
    "age_headers": "traceparent",
    "max_wait": 3.5,
    "late_share": 0.25,
    "max_paused": 3,
    "max_pause_ms": 99.0,
    "max_itl_ms": 98.0,
    "margin": 0.5,
    "handoff_ms": 12.0,
    "chaos_seed": 11,
    "decision_log": "log.jsonl",
    "strict": "seam",
}


def other(name: str) -> Any:
    """A legal value that is not the default."""
    default = FIELDS[name].default
    if isinstance(default, bool):
        return not default
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, str):
        return "other"
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    return type(default)(min(max(default + 1, low), high))


def text(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", FIELDS)
def test_flag_environment_and_file_mean_the_same(name: str, tmp_path: Path) -> None:
    value, item = other(name), FIELDS[name]
    path = tmp_path / "kairos.json"
    path.write_text(json.dumps({name: value}))
    by_flag = KairosConfig.load([flag_of(item), text(value)], {})[0]
    by_env = KairosConfig.load([], {env_of(item): text(value)})[0]
    by_file = KairosConfig.load(["--kairos-config", str(path)], {})[0]
    by_env_file = KairosConfig.load([], {"KAIROS_CONFIG": str(path)})[0]
    assert by_flag == by_env == by_file == by_env_file
    assert getattr(by_flag, name) == value != item.default


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "kairos.toml"
    path.write_text('ttft_ms = 1\ntpot-ms = 1\nkairos-margin = 0.5\nkairos = "on"\n')
    flags = ["--kairos-config", str(path), "--kairos-ttft-ms", "3"]
    config, _ = KairosConfig.load(flags, {"KAIROS_TTFT_MS": "2", "KAIROS_TPOT_MS": "2"})
    assert (config.ttft_ms, config.tpot_ms, config.margin) == (3.0, 2.0, 0.5)
    assert config.max_paused == FIELDS["max_paused"].default


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--kairos-ttft-ms", "-1"], ["--kairos-ttft-ms", "between 1 and", "-1"]),
        (["--kairos-ttft-ms", "nan"], ["--kairos-ttft-ms", "between"]),
        (["--kairos-ttft-ms", "soon"], ["--kairos-ttft-ms", "a number", "soon"]),
        (["--kairos-max-paused", "1.5"], ["--kairos-max-paused", "whole number", "1.5"]),
        (["--kairos-max-paused", "-1"], ["--kairos-max-paused", "between 0 and 1024"]),
        (["--kairos-park", "maybe"], ["--kairos-park", "on or off", "maybe"]),
        (["--kairos", "perhaps"], ["--kairos:", "on or off"]),
        (["--kairos-ttft"], ["--kairos-ttft", "known:", "--kairos-ttft-ms"]),
        (["--kairos-config", "/nonexistent.json"], ["/nonexistent.json", "cannot be read"]),
        (["--kairos-ttft-ms"], ["--kairos-ttft-ms", "expected one argument"]),
    ],
)
def test_a_bad_value_names_the_flag_and_the_range(words: list[str], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        KairosConfig.load(words, {})
    for part in texts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"ttft": 5}, "unknown setting 'ttft'"),
        ({"ttft_ms": True}, "--kairos-ttft-ms"),
        ({"ttft_ms": None}, "--kairos-ttft-ms"),
        ({"park": 1}, "--kairos-park"),
        ({"max_paused": 1.5}, "--kairos-max-paused"),
        ({"ttft_ms": 10**400}, "--kairos-ttft-ms.*too large"),
        ({"max_paused": 10**400}, "--kairos-max-paused.*too large"),
        ({"slo_classes": 5}, "--kairos-slo-classes"),
        ([], "must be an object"),
    ],
)
def test_a_bad_file_is_refused(content: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "kairos.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=named):
        KairosConfig.load(["--kairos-config", str(path)], {})


def test_other_arguments_come_back_in_order() -> None:
    words = ["--port", "1", "--kairos-margin", "0.1", "-x", "y", "--kairos=off", "z"]
    config, rest = KairosConfig.load(words, {})
    assert rest == ["--port", "1", "-x", "y", "z"]
    assert (config.margin, config.enabled) == (0.1, False)


def test_children_read_the_same_configuration() -> None:
    config = KairosConfig(**{name: other(name) for name in FIELDS})
    env = {"KAIROS_CONFIG": "gone.json"}
    config.to_env(env)
    assert KairosConfig.from_env(env) == config
    assert "KAIROS_CONFIG" not in env


def test_slo_classes_are_read_and_errors_name_file_and_class(tmp_path: Path) -> None:
    path = tmp_path / "classes.toml"
    path.write_text("[chat]\nttft_ms = 500\n")
    table = KairosConfig(slo_classes=str(path)).slo_table()
    assert table.classes == {"chat": Slo(500, 100, "chat")}
    path.write_text("[chat]\nttft_ms = 0\n")
    with pytest.raises(ConfigError, match=r"classes\.toml.*chat\.ttft_ms.*between 1"):
        KairosConfig(slo_classes=str(path)).slo_table()


def test_help_shows_every_flag() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    shown = parser.format_help()
    assert all(flag_of(item) in shown for item in FIELDS.values())


@pytest.mark.parametrize(
    ("word", "strict"),
    [
        ("on", "on"),
        ("true", "on"),
        ("seam", "seam"),
        ("SEAM", "seam"),
        ("off", "seam"),
        ("0", "seam"),
    ],
)
def test_strictness_is_on_or_seam_and_off_is_the_old_name_of_seam(
    word: str, strict: str, tmp_path: Path
) -> None:
    assert KairosConfig.load(["--kairos-strict", word], {})[0].strict == strict
    path = tmp_path / "kairos.json"
    path.write_text(json.dumps({"strict": word == "on"}))
    assert KairosConfig.load(["--kairos-config", str(path)], {})[0].strict == (
        "on" if word == "on" else "seam"
    )


def test_another_strictness_is_refused() -> None:
    with pytest.raises(ConfigError, match="--kairos-strict: must be on or seam, got 'maybe'"):
        KairosConfig.load(["--kairos-strict", "maybe"], {})
    with pytest.raises(ConfigError, match="--kairos-strict: must be on or seam, got 'off'"):
        KairosConfig(strict="off")


def test_priorities_get_their_classes_from_text_or_a_file(tmp_path: Path) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"chat": {"ttft_ms": 500}, "batch": {"ttft_ms": 60_000}}))
    steps = tmp_path / "priorities.toml"
    steps.write_text('"10" = "chat"\n"-5" = "batch"\n')
    for text_or_file in ("10=chat, -5=batch", str(steps)):
        config = KairosConfig(slo_classes=str(classes), priority_classes=text_or_file)
        assert config.slo_table().priorities == ((-5, "batch"), (10, "chat"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"priority_classes": "0=gold"},
            "--kairos-priority-classes 0=gold: .*unknown class 'gold'",
        ),
        ({"priority_classes": "default"}, "must be PRIORITY=CLASS"),
        ({"priority_classes": "0=default,"}, "must be PRIORITY=CLASS"),
        ({"priority_classes": "0=default,0=default"}, "twice"),
        ({"priority_classes": "x=default"}, "priority 'x' must be a whole number"),
        ({"priority_classes": "none.json"}, "cannot be read"),
        ({"age_headers": "x-forwarded-for"}, "--kairos-age-headers: must be off or of x-request"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(settings: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        KairosConfig(**settings).slo_table()


@pytest.mark.parametrize(
    ("words", "headers"),
    [
        ("off", ()),
        ("", ()),
        ("X-Request-Start, traceparent", ("x-request-start", "traceparent")),
    ],
)
def test_the_headers_that_say_an_age_are_chosen(words: str, headers: tuple[str, ...]) -> None:
    rule = KairosConfig(age_headers=words, max_age_ms=500.0).slo_table().age_rule
    assert (rule.headers, rule.most_ms) == (headers, 500.0)
