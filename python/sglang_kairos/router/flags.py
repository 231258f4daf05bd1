"""The router's command line: upstream's names where upstream has the flag."""

from __future__ import annotations

import argparse

# As `choosers.CHOOSERS`; upstream's balancers call three of them by these very names.
POLICIES = ("kairos", "random", "round_robin", "least_load", "power_of_two", "cache_aware")


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
    return parser


def _servers(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--pd-disaggregation", action="store_true", help="serve prefill/decode pairs (required)")
    add("--mini-lb", action="store_true", help="accepted for upstream's command lines, no effect")
    add(
        "--prefill",
        action="append",
        nargs="+",
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill server and its --disaggregation-bootstrap-port (asked from it if left out)",
    )
    add("--decode", action="append", metavar="URL", help="a decode server")
    add("--policy", type=_policy, choices=POLICIES, default="kairos", help="how a pair is picked")
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
    add("--log-level", default="info", help="uvicorn log level")


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
    add("--ca-cert-path", default="", help="certificates to verify https:// servers with (PEM)")


def _policy(text: str) -> str:
    return {"least_loaded": "least_load"}.get(name := text.replace("-", "_"), name)
