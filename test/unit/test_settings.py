"""One scheme of settings: the router's flags, variables and file keys; old names; refusals."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from helpers.fake_scheduler import make_state
from sglang_kairos import launch_router, names, settings
from sglang_kairos.config import ConfigError, KairosConfig, add_flags
from sglang_kairos.engine.state.metrics import both
from sglang_kairos.names import RENAMED
from sglang_kairos.router.arguments import build_parser
from sglang_kairos.router.options import OptionError, RouterOptions, parse_options

PAIR = ["--pd-disaggregation", "--prefill", "http://p:1", "9000", "--decode", "http://d:1"]
PAIR_IN_FILE = {"pd-disaggregation": True, "prefill": ["http://p:1 9000"], "decode": ["http://d:1"]}
ACTIONS = {action.option_strings[0]: action for action in build_parser().settings()}
# Flags that need others, or whose values are not made from their kind: words, text, value in a file.
OTHER: dict[str, tuple[list[str], str, Any]] = {
    "--overload": (["batch=shed"], "batch=shed", ["batch=shed"]),
    "--host": (["::1"], "::1", "::1"),
    "--policy": (["round-robin"], "round_robin", "round_robin"),
    "--prefill-policy": (["random"], "random", "random"),
    "--decode-policy": (["random"], "random", "random"),
    "--log-level": (["debug"], "DEBUG", "debug"),
    "--protect-last-server": (["off"], "off", False),
    "--cors-allowed-origins": (
        ["http://a", "http://b"],
        "http://a,http://b",
        ["http://a", "http://b"],
    ),
    "--request-id-headers": (["x-a", "x-b"], "x-a x-b", ["x-a", "x-b"]),
    "--prometheus-duration-buckets": (["0.5", "2"], "0.5,2", [0.5, 2]),
}
TOGETHER = ("--tls-", "--client-cert", "--client-key", "--service-discovery", "--prefill-selector")
TOGETHER += ("--decode-selector", "--pd-disaggregation", "--prefill", "--decode", "--ca-cert")


def forms(flag: str) -> tuple[list[str], str, Any]:
    """Words of a command line, text of a variable and value in a file that mean the same."""
    action = ACTIONS[flag]
    if flag in OTHER:
        words, text, value = OTHER[flag]
        return ([f"{flag}={words[0]}"] if len(words) == 1 else [flag, *words]), text, value
    if action.nargs == 0:
        return [flag], "on", True
    if isinstance(kind := action.type, settings.Number):
        value = kind.low + 1 if kind.whole else (kind.low + min(kind.high, 3600)) / 2
        return [f"{flag}={value}"], str(value), value
    return [flag, "other"], "other", "other"


def options_in_file(more: dict[str, Any], folder: Path) -> RouterOptions:
    path = folder / "kairos.json"
    path.write_text(json.dumps({"ttft_ms": 5, "router": {**PAIR_IN_FILE, **more}}))
    return parse_options([], {}, settings.settings_in(str(path), "router"), str(path))


@pytest.mark.parametrize("flag", [flag for flag in ACTIONS if not flag.startswith(TOGETHER)])
def test_a_router_flag_its_variable_and_its_file_key_mean_the_same(
    flag: str, tmp_path: Path
) -> None:
    words, text, value = forms(flag)
    by_flag = parse_options([*PAIR, *words], {})
    by_env = parse_options(PAIR, {build_parser().env_of(ACTIONS[flag]): text})
    by_file = options_in_file({flag[2:]: value}, tmp_path)
    by_key_with_underscores = options_in_file({flag[2:].replace("-", "_"): value}, tmp_path)
    assert by_flag == by_env == by_file == by_key_with_underscores
    assert by_flag != parse_options(PAIR, {})


def test_servers_come_from_variables_and_file_as_from_flags(tmp_path: Path) -> None:
    env = {"KAIROS_ROUTER_PD_DISAGGREGATION": "on"}
    env |= {"KAIROS_ROUTER_PREFILL": "http://p:1 9000, http://q:1"}
    env |= {"KAIROS_ROUTER_DECODE": "http://d:1,http://e:1"}
    words = [*PAIR, "--prefill", "http://q:1", "--decode", "http://e:1"]
    file = {"prefill": [["http://p:1", 9000], "http://q:1"], "decode": ["http://d:1", "http://e:1"]}
    assert parse_options(words, {}) == parse_options([], env) == options_in_file(file, tmp_path)


def test_pods_and_certificates_come_from_variables_too(tmp_path: Path) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("")
    env = {"KAIROS_ROUTER_SERVICE_DISCOVERY": "on", "KAIROS_ROUTER_PD_DISAGGREGATION": "true"}
    env |= {
        "KAIROS_ROUTER_PREFILL_SELECTOR": "role=p,app=x",
        "KAIROS_ROUTER_DECODE_SELECTOR": "a=b",
    }
    env |= {"KAIROS_ROUTER_TLS_CERT_PATH": str(pem), "KAIROS_ROUTER_TLS_KEY_PATH": str(pem)}
    env |= {"KAIROS_ROUTER_CA_CERT_PATH": str(pem)}
    options = parse_options([], env)
    assert options.pods is not None and options.pods.prefill == "role=p,app=x"
    assert (options.tls_cert, options.ca_certs) == (str(pem), (str(pem),))


def test_the_routers_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "kairos.toml"
    path.write_text("ttft_ms = 7\n[router]\nport = 1\nmax_retries = 1\nhost = '::3'\n")
    env = {"KAIROS_ROUTER_PORT": "2", "KAIROS_ROUTER_MAX_RETRIES": "2"}
    file = settings.settings_in(str(path), "router")
    options = parse_options([*PAIR, "--port", "3"], env, file, str(path))
    assert (options.port, options.max_retries, options.host, options.log_level) == (
        3,
        2,
        "::3",
        "info",
    )
    assert KairosConfig.load(["--kairos-config", str(path)], {})[0].ttft_ms == 7.0


@pytest.mark.parametrize(
    ("words", "env", "file", "texts"),
    [
        (
            ["--port", "70000"],
            {},
            {},
            ["--port: must be a whole number between 0 and 65535, got 70000"],
        ),
        (["--port", "x"], {}, {}, ["--port: must be a whole number, got 'x'"]),
        (
            [],
            {"KAIROS_ROUTER_PORT": "x"},
            {},
            ["--port (KAIROS_ROUTER_PORT): must be a whole number"],
        ),
        ([], {}, {"port": 1.5}, ["--port (f.json: router): must be a whole number between", "1.5"]),
        ([], {}, {"port": True}, ["--port (f.json: router)", "True"]),
        ([], {}, {"prot": 1}, ["f.json: router: unknown setting 'prot'", "port"]),
        ([], {}, {"disable_retries": "maybe"}, ["--disable-retries", "on or off", "maybe"]),
        ([], {}, {"host": 5}, ["--host", "must be text"]),
        ([], {"KAIROS_ROUTER_DECODE": "d:1"}, {}, []),
        (["--prot", "1"], {}, {}, ["--prot: no such flag"]),
        (["--port"], {}, {}, ["--port: expected one argument"]),
        (["--max-payload-size", "3"], {}, {}, ["between 1024 and 1099511627776, got 3"]),
    ],
)
def test_what_cannot_be_used_names_flag_place_and_limits(
    words: list[str], env: dict[str, str], file: dict[str, Any], texts: list[str]
) -> None:
    if not texts:  # a flag that is given hides what the environment says
        assert parse_options(PAIR, env).decodes == ("http://d:1",)
        return
    with pytest.raises(OptionError) as caught:
        parse_options([*PAIR, *words], env, file, "f.json: router")
    assert all(text in str(caught.value) for text in texts), caught.value


def test_kubernetes_name_for_a_service_of_the_routers_name_is_no_port() -> None:
    env = {"KAIROS_ROUTER_PORT": "tcp://10.0.0.1:80", "KAIROS_ROUTER_SERVICE_HOST": "10.0.0.1"}
    assert parse_options(PAIR, env).port == 30000


def test_the_launcher_reads_the_routers_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kairos.json"
    path.write_text(json.dumps({"ttft_ms": 5, "router": {**PAIR_IN_FILE, "port": 4321}}))
    made: list[Any] = []
    monkeypatch.setattr(launch_router, "create_app", lambda *both: made.extend(both))
    monkeypatch.setattr(launch_router, "serve", lambda app: 0)
    assert launch_router.main(["--kairos-config", str(path)]) == 0
    assert (made[0].port, made[1].ttft_ms) == (4321, 5.0)


@pytest.mark.parametrize("content", [{"router": 5}, []])
def test_a_table_that_is_none_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "kairos.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="must be an object"):
        settings.settings_in(str(path), "router")


def test_help_shows_every_router_flag_once_with_its_default() -> None:
    parser = launch_router.build_parser()
    shown = " ".join(parser.format_help().split())
    assert all(flag in shown for flag in ACTIONS)
    assert "port to listen on (default: 30000)" in shown
    assert "(default: None)" not in shown
    assert "(default: 0.1)" in shown and "(default: 2000)" in shown
    assert "(default: 2000) (default" not in shown


# ---- old names


@pytest.fixture(autouse=True)
def _said_nothing_yet() -> None:
    names.say_renamed.cache_clear()


def test_an_old_flag_its_variable_and_its_key_work_and_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "kairos.json"
    path.write_text(json.dumps({"profile": "x"}))
    env: dict[str, str] = {}
    KairosConfig(latency_model="x").to_env(env)
    for words, env in (
        (["--kairos-profile", "x"], {}),
        (["--kairos-profile=x"], {}),
        ([], {"KAIROS_PROFILE": "x"}),
        (["--kairos-config", str(path)], {}),
    ):
        names.say_renamed.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert KairosConfig.load(words, env)[0].latency_model == "x"
        (line,) = caplog.messages
        assert "latency" in line.lower() and "next release" in line


def test_the_new_name_counts_where_both_are_given() -> None:
    env = {"KAIROS_PROFILE": "old", "KAIROS_LATENCY_MODEL": "new"}
    assert KairosConfig.load([], env)[0].latency_model == "new"


def test_children_get_the_new_names_alone() -> None:
    env = {"KAIROS_PROFILE": "old", "KAIROS_ROUTER_ADMIN_KEY": "k"}
    KairosConfig(latency_model="new").to_env(env)
    assert env["KAIROS_LATENCY_MODEL"] == "new" and "KAIROS_PROFILE" not in env
    assert env["KAIROS_ROUTER_ADMIN_KEY"] == "k", "the router's own"


def test_the_admin_keys_old_variable_works(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("KAIROS_ROUTER_ADMIN_API_KEY", "KAIROS_ROUTER_ADMIN_KEY"):
        assert parse_options(PAIR, {name: "k"}).admin_api_key == "k"
    assert len(caplog.messages) == 1


def test_every_old_setting_is_one_that_is_gone_and_its_new_name_is_there() -> None:
    parser = settings.SettingsParser(add_help=False)
    add_flags(parser)
    known: dict[str, set[str]] = {"flag": set(), "environment": set(), "file key": set()}
    for each in (parser, build_parser()):
        for action in each.settings():
            known["flag"].update(action.option_strings)
            known["environment"].add(each.env_of(action))
            known["file key"].add(settings.key_of(each.prefix, action.option_strings[0]))
    for row in RENAMED:
        if row.kind in known:
            assert row.new in known[row.kind] and row.old not in known[row.kind], row


def test_reports_have_both_names() -> None:
    report = names.with_old_keys("server_info", {"latency_model": "file", "mode": "decode"})
    assert report == {"latency_model": "file", "profile": "file", "mode": "decode"}


@pytest.mark.parametrize("row", [row for row in RENAMED if row.kind == "server_info"], ids=str)
def test_a_scheduler_reports_old_and_new_name(row: names.Renamed) -> None:
    report = make_state().report()
    (holder,) = (part for part in (report, report["attainment"]) if row.new in part)
    assert holder[row.old] == holder[row.new]


@pytest.mark.parametrize("row", [row for row in RENAMED if row.kind == "metric"], ids=str)
def test_a_metric_is_exported_under_old_and_new_name(row: names.Renamed) -> None:
    name = row.new.removeprefix("kairos_").removesuffix("_seconds")
    assert [f"kairos_{each}_seconds" for each in both(name)] == [row.new, row.old]


@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        (settings.switch, "YES", True),
        (settings.Number(0, 1), "0.5", 0.5),
        (settings.Number(0, 1), 1, 1.0),
        (settings.OneOf(("on", "off")), True, "on"),
    ],
)
def test_kinds_take_text_and_values_of_files(kind: Any, value: object, taken: object) -> None:
    assert kind(value) == taken


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), "2", 10**400, None, [], "1e999"])
def test_a_number_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be"):
        settings.Number(0, 1)(value)


def test_nothing_is_logged_for_new_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    KairosConfig.load(["--kairos-latency-model", "x"], {"KAIROS_TTFT_MS": "5"})
    assert caplog.messages == []
