"""The router's command line: upstream's names where upstream has the flag."""

from __future__ import annotations

import argparse

from sglang_kairos.router.policy_names import POLICIES
from sglang_kairos.router.upstream_flags import add_others

__all__ = ["POLICIES", "build_parser"]


def build_parser() -> argparse.ArgumentParser:
    """The flags, for parsing and for ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kairos.launch_router",
        description="The PD router. Flags of sglang_router keep their names.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _servers(parser.add_argument_group("servers"))
    _serving(parser.add_argument_group("serving"))
    _overload(parser.add_argument_group("overload"))
    _health(parser.add_argument_group("health"))
    _security(parser.add_argument_group("security"))
    _watching(parser.add_argument_group("logs and metrics"))
    _discovery(parser.add_argument_group("Kubernetes"))
    add_others(parser)
    return parser


def _servers(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--pd-disaggregation", action="store_true", help="serve prefill/decode pairs (required)")
    add(
        "--prefill",
        action="append",
        nargs="+",
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill server and its --disaggregation-bootstrap-port (asked from it if left out)",
    )
    add("--decode", action="append", metavar="URL", help="a decode server")
    add("--policy", type=_policy, default="kairos", help=f"of a pair: {', '.join(POLICIES)}")
    add("--prefill-policy", type=_policy, help="of the prefill server, if not --policy")
    add("--decode-policy", type=_policy, help="of the decode server, if not --policy")
    rule = "of cache_aware: "
    add(
        "--cache-threshold",
        type=float,
        default=0.3,
        help=rule + "a cached share of the prompt that decides, 0 to 1",
    )
    add(
        "--balance-abs-threshold",
        type=int,
        default=64,
        help=rule + "the least loaded one instead, when requests differ by more",
    )
    add(
        "--balance-rel-threshold",
        type=float,
        default=1.5,
        help=rule + "and by more than this factor",
    )
    add("--seed", type=int, default=None, help="fixes the router's random choices")


def _serving(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=30000, help="port to listen on")
    add("--request-timeout-secs", type=float, default=1800.0, help="whole request, retries too")
    add("--connect-timeout-secs", type=float, default=5.0, help="connecting to a server")
    add("--max-retries", "--retry-max-retries", type=int, default=3, help="other attempts made")
    add("--disable-retries", action="store_true", help="the first attempt is the only one")
    add(
        "--protect-last-server",
        choices=("on", "off"),
        default="on",
        help="a request under which a server has died is not sent to the last one of that role",
    )
    add(
        "--shutdown-grace-period-secs",
        type=float,
        default=180.0,
        help="after SIGTERM requests in flight have this long to end",
    )
    add(
        "--drain-delay-secs",
        type=float,
        default=0.0,
        help="after SIGTERM requests are still taken this long, while /health says 503",
    )
    add(
        "--cors-allowed-origins",
        nargs="*",
        default=["*"],
        metavar="ORIGIN",
        help="web pages that may call it, as SGLang's servers: all; without a value none",
    )
    add(
        "--request-id-headers",
        nargs="*",
        default=[],
        metavar="NAME",
        help="headers that a request's id is taken from when it has no x-request-id",
    )


def _overload(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--overload",
        action="append",
        metavar="[CLASS=]serve|relegate|shed",
        help="what to do with a request whose SLO no pair can keep; repeat it for SLO classes",
    )
    add(
        "--max-concurrent-requests",
        type=int,
        default=8192,
        help="requests in flight, above it 429; -1 or 0: no limit",
    )
    add("--max-payload-size", type=int, default=512 * 2**20, help="bytes of one body, else 413")
    add("--max-held-bytes", type=int, default=2**31, help="bytes of all bodies held, else 429")


def _health(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--poll-interval-secs", type=float, default=0.5, help="between looks at a server")
    add(
        "--health-check-interval-secs",
        type=float,
        default=2.0,
        help="least time between probes (/server_info) of a server that is there",
    )
    add("--health-success-threshold", type=int, default=1, help="answered probes until it is back")
    add("--disable-health-check", action="store_true", help="failed probes take nobody out")
    add("--disable-circuit-breaker", action="store_true", help="failed requests eject nobody")
    add("--health-check-timeout-secs", type=float, default=5.0, help="a probe unanswered so long")
    add("--health-failure-threshold", type=int, default=3, help="failed probes in a row: gone")
    add("--cb-failure-threshold", type=int, default=5, help="failed requests in a row: ejected")
    add(
        "--cb-timeout-duration-secs",
        type=float,
        default=5.0,
        help="how long it is ejected the first time; doubled each time in a row",
    )


def _security(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--api-key", default="", help="of the servers; sent with the router's own calls")
    add("--client-api-key", default="", help="clients must send it as a bearer token")
    add(
        "--admin-api-key",
        default="",
        help="bearer token of /admin/servers (or KAIROS_ROUTER_ADMIN_KEY); without it: disabled",
    )
    add("--tls-cert-path", default="", help="serve HTTPS with this certificate (PEM)")
    add("--tls-key-path", default="", help="and this key (PEM)")
    add(
        "--ca-cert-path",
        "--ca-cert-paths",
        nargs="*",
        default=[],
        metavar="PEM",
        help="certificates to verify https:// servers with",
    )
    add("--client-cert-path", default="", help="shown to https:// servers that ask (PEM)")
    add("--client-key-path", default="", help="its key (PEM)")


def _watching(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--log-level", type=str.lower, default="info", help="debug, info, warning or error")
    add("--log-dir", default="", help="the log goes there, too (router.log)")
    add("--prometheus-port", type=int, default=None, help="/metrics on this port as well")
    add("--prometheus-host", default="0.0.0.0", help="its address")
    add(
        "--prometheus-duration-buckets",
        nargs="+",
        type=float,
        default=None,
        metavar="SECONDS",
        help="of TTFT, in place of the built-in ones",
    )


def _discovery(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--service-discovery", action="store_true", help="the servers are pods, found by label")
    for role in ("prefill", "decode"):
        add(f"--{role}-selector", nargs="+", metavar="LABEL=VALUE", help=f"of {role} pods")
    add("--service-discovery-port", type=int, default=80, help="the pods' HTTP port")
    add(
        "--service-discovery-namespace",
        default="",
        help="their namespace; without it all, which takes a cluster-wide role",
    )


def _policy(text: str) -> str:
    return {"least_loaded": "least_load"}.get(name := text.replace("-", "_"), name)
