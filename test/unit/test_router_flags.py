"""Command lines written for upstream's router."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from helpers.fake_pd import GENERATE, Fake, bench, free_port, until
from sglang_kairos.config import KairosConfig
from sglang_kairos.launch_router import main as launch
from sglang_kairos.policy.placement import PlacedRequest
from sglang_kairos.router.arguments import POLICIES, build_parser
from sglang_kairos.router.fleet.policies import CacheRule, policy_of
from sglang_kairos.router.fleet.prefix_index import Blocks
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.router.health_rules import HealthRules
from sglang_kairos.router.options import (
    OptionError,
    Pods,
    RouterOptions,
    parse_options,
)
from sglang_kairos.router.upstream_flags import NO_EFFECT, REFUSED, VALUES

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

PAIR = "--pd-disaggregation --prefill http://127.0.0.1:1 --decode http://127.0.0.1:2 "
PODS = "--pd-disaggregation --service-discovery --service-discovery-port 30000 "


def parse(words: str) -> RouterOptions:
    _, rest = KairosConfig.load(words.split())
    return parse_options(rest)


def upstream_actions() -> Iterator[argparse.Action]:
    """Of upstream's own parser."""
    found = importlib.util.find_spec("sglang_router")
    assert found is not None and found.origin is not None
    path = Path(found.origin).with_name("router_args.py")
    spec = importlib.util.spec_from_file_location("upstream_router_args", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = argparse.ArgumentParser()
    module.RouterArgs.add_cli_args(parser, use_router_prefix=False)
    yield from parser._actions


def test_every_flag_of_upstreams_router_is_taken_or_in_the_table() -> None:
    taken = {
        word
        for action in build_parser()._actions
        if action.help != argparse.SUPPRESS
        for word in action.option_strings
    }
    table = [*NO_EFFECT, *REFUSED, *VALUES]
    assert len(table) == len(set(table))
    theirs = {word for action in upstream_actions() for word in action.option_strings}
    assert len(theirs) > 90
    assert theirs - taken - {f"--{name}" for name in table} == set()
    assert {f"--{name}" for name in table} - theirs == set()
    assert taken.isdisjoint(f"--{name}" for name in table)


def test_every_flag_of_upstreams_router_parses_with_the_value_upstream_documents(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts: dict[Any, list[str]] = {int: ["3"], float: ["1.5"], str: ["x"], None: ["x"]}
    own = {"--cache-threshold": ["0.5"], "--log-level": ["warn"], "--max-payload-size": ["4096"]}
    own |= {"--prometheus-duration-buckets": ["0.1", "2"], "--policy": ["cache_aware"]}
    own |= {"--prefill-policy": ["random"], "--decode-policy": ["power_of_two"]}
    own |= {"--backend": ["sglang"], "--history-backend": ["none"]}
    skipped = {"--prefill", "--decode", "--help", "--service-discovery", "--prefill-selector"}
    skipped |= {"--decode-selector", "--pd-disaggregation"}  # see below
    needs_file = {"--tls-cert-path", "--tls-key-path", "--client-cert-path", "--client-key-path"}
    needs_file.add("--ca-cert-paths")
    for action in upstream_actions():
        flag = action.option_strings[-1]
        if flag in skipped:
            continue
        values = [] if action.nargs == 0 else own.get(flag) or texts[action.type]
        caplog.clear()
        words = [*PAIR.split(), flag, *values]
        if flag[2:] in REFUSED or flag in needs_file:
            with pytest.raises(OptionError, match=flag.removesuffix("s")):
                parse_options(words)
            continue
        parse_options(words)
        assert (flag in caplog.text) == (flag[2:] in NO_EFFECT), flag


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--prefill-policy cache_aware --decode-policy round_robin --host 0.0.0.0 --port 30000",
            {"prefill_policy": "cache_aware", "decode_policy": "round_robin", "host": "0.0.0.0"},
        ),
        (
            "--mini-lb --log-level debug --request-timeout-secs 600",
            {"log_level": "debug", "request_timeout_s": 600.0},
        ),
        (
            "--policy cache_aware --cache-threshold 0.5 --balance-abs-threshold 32"
            " --prometheus-port 29000",
            {"cache_threshold": 0.5, "balance_abs_threshold": 32, "metrics_port": 29000},
        ),
        (
            "--worker-startup-timeout-secs 1800 --disable-circuit-breaker"
            " --health-check-interval-secs 10 --cors-allowed-origins *",
            {"probe_s": 10.0, "cors_origins": ("*",)},
        ),
        ("--log-level warn", {"log_level": "warning"}),
        ("--cors-allowed-origins", {"cors_origins": ()}),
        ("--request-id-headers X-Trace-Id x-id", {"id_headers": ("x-trace-id", "x-id")}),
        ("--disable-health-check --health-success-threshold 2", {"probe_successes": 2}),
    ],
)
def test_command_lines_as_people_publish_them_mean_what_they_say(
    words: str, expected: dict[str, Any]
) -> None:
    options = parse(PAIR + words)
    assert {name: getattr(options, name) for name in expected} == expected
    if "--disable-circuit-breaker" in words:
        assert options.health.request_failures > 1_000_000
    assert options.probes is ("--disable-health-check" not in words)


def test_looking_for_pods_outside_a_cluster_ends_at_once_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    words = PODS + "--prefill-selector role=prefill --decode-selector role=decode"
    assert launch(words.split()) == 2
    assert "--service-discovery: only inside a cluster" in capsys.readouterr().err


def test_pods_are_chosen_by_a_selector_per_role() -> None:
    options = parse(
        PODS + "--prefill-selector role=prefill app=x --decode-selector=role=decode,app=x"
    )
    assert options.pods == Pods("role=prefill,app=x", "role=decode,app=x", 30000)
    assert (options.prefills, options.decodes) == ((), ())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (PAIR + "--policy manual", "--policy"),
        (PAIR + "--prefill-policy bucket", "--prefill-policy"),
        (PAIR + "--cache-threshold 1.5", "--cache-threshold"),
        (PAIR + "--log-level loud", "--log-level"),
        (PAIR + "--worker-urls http://a http://b", "--prefill URL PORT"),
        (PAIR + "--history-backend redis", "--history-backend"),
        (PAIR + "--prometheus-port 99999", "--prometheus-port"),
        (PAIR + "--client-key-path /x", "--client-cert-path"),
        (PAIR + "--prefill-selector a=b", "--service-discovery"),
        (PODS, "--prefill-selector"),
        (PODS + "--prefill-selector a=b", "--decode-selector"),
        (PODS + "--prefill-selector a=b --decode-selector a=b", "must not be the same"),
        (PODS + "--prefill-selector a --decode-selector a=b", "LABEL=VALUE"),
    ],
)
def test_what_is_not_taken_is_named_with_what_to_use(
    words: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(words.split()) == 2
    assert named in capsys.readouterr().err


def servers(count: int) -> tuple[list[PrefillServer], list[DecodeServer]]:
    return (
        [PrefillServer(f"http://p{i}", 1, HealthRules()) for i in range(count)],
        [DecodeServer(f"http://d{i}", HealthRules()) for i in range(count)],
    )


@pytest.mark.parametrize("prefill", POLICIES)
@pytest.mark.parametrize("decode", POLICIES)
def test_each_role_is_picked_by_its_own_policy(prefill: str, decode: str) -> None:
    both = servers(3)
    both[0][0].enqueue(1000, 10.0, 0.0)
    both[1][0].admit(5, 1000.0)
    policy = policy_of(prefill, decode, Random(3))
    request = PlacedRequest(tokens=100.0, deadline_s=10.0, now_s=0.0)
    got = [policy.pick(both, request, Blocks()) for _ in range(6)]
    if decode == "round_robin" and prefill != decode:
        assert [server.url for _, server, _ in got] == [f"http://d{i}" for i in (0, 1, 2) * 2]
    if prefill == "round_robin":
        assert [server.url for server, _, _ in got] == [f"http://p{i}" for i in (0, 1, 2) * 2]
    if prefill in ("least_load", "cache_aware", "kairos"):
        assert all(server is not both[0][0] for server, _, _ in got)
    if decode in ("least_load", "cache_aware"):
        assert all(server is not both[1][0] for _, server, _ in got)


def test_the_thresholds_of_cache_aware_are_the_command_lines() -> None:
    request = PlacedRequest(tokens=1000.0, deadline_s=10.0, now_s=0.0)
    for rule, picked in (
        (CacheRule(), "http://p0"),
        (CacheRule(threshold=0.9), "http://p1"),
        (CacheRule(balance_abs=1), "http://p1"),
        (CacheRule(balance_abs=1, balance_rel=10.0), "http://p1"),
    ):
        both = servers(2)
        both[0][0].prefix.cached_tokens = lambda _: 600.0  # type: ignore[method-assign]
        for _ in range(3):
            both[0][0].enqueue(10, 10.0, 0.0)
        found = policy_of("cache_aware", "cache_aware", Random(0), rule)
        assert found.pick(both, request, Blocks())[0].url == picked, rule


async def test_metrics_are_served_on_a_port_of_their_own() -> None:
    async with bench(metrics_port=0, metrics_host="127.0.0.1", ttft_buckets=(0.25, 4.0)) as b:
        await b.post(GENERATE, {"text": "x", "stream": True})
        for base in (b.router.metrics_address, b.client._base_url):
            async with aiohttp.ClientSession(base) as client, client.get("/metrics") as found:
                text = await found.text()
            assert "kairos_router_requests_total" in text
            assert 'le="0.25"' in text and 'le="0.05"' not in text.split("tpot")[0]


async def test_an_id_is_taken_from_the_headers_named() -> None:
    async with bench(id_headers=("x-trace-id", "x-other")) as b:
        for headers, expected in (
            ({"x-trace-id": "t", "x-other": "o"}, "t"),
            ({"x-other": "o"}, "o"),
            ({"x-request-id": "r", "x-trace-id": "t"}, "r"),
        ):
            async with b.client.post(GENERATE, json={"text": "x"}, headers=headers) as response:
                assert response.headers["x-request-id"] == expected
            assert b.d.headers[-1]["x-request-id"] == expected


async def test_probes_that_are_switched_off_take_nobody_out() -> None:
    for probes, gone in ((True, True), (False, False)):
        async with bench(probes=probes) as b:
            server = b.router.fleet.decodes[0]
            await until(lambda server=server: server.looked_at)
            server.url = f"http://127.0.0.1:{free_port()}"
            counts = b.router._poller._answered
            await until(lambda counts=counts, server=server: counts[server] == 0)
            assert server.health.gone is gone


async def test_a_server_is_back_after_as_many_probes_as_asked_for() -> None:
    answered = 0

    async def tell(request: Any) -> Any:
        nonlocal answered
        answered += server.health.gone
        return await decode.tell(request)

    decode = Fake("decode", routes={"/server_info": tell})
    async with bench(decode=decode, probe_successes=3) as b:
        server = b.router.fleet.decodes[0]
        await until(lambda: server.looked_at)
        url, server.url = server.url, f"http://127.0.0.1:{free_port()}"
        await until(lambda: server.health.gone)
        answered, server.url = 0, url
        await until(lambda: not server.health.gone)
        assert answered == 3


def test_the_log_goes_to_a_file_too(tmp_path: Path) -> None:
    from sglang_kairos.router.serve import _log_to

    own, theirs = logging.getLogger("sglang_kairos"), logging.getLogger("uvicorn")
    before = list(own.handlers), list(theirs.handlers)
    try:
        _log_to(str(tmp_path / "logs"))
        logging.getLogger("sglang_kairos.router.fleet.poller").warning("a server is down")
        assert "a server is down" in (tmp_path / "logs" / "router.log").read_text()
    finally:
        own.handlers, theirs.handlers = before
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="--log-dir"):
        _log_to(str(tmp_path / "file" / "logs"))
