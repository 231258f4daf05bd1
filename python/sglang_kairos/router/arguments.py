"""The router's flags: upstream's names where upstream has the flag.

Each is also an environment variable (``--port``: ``KAIROS_ROUTER_PORT``) and a key in the table
``router`` of the file that ``--kairos-config`` names (see `settings`). In a variable, several values
stand between commas: ``KAIROS_ROUTER_PREFILL="http://p0:30000 8998, http://p1:30000 8998"``.
"""

from __future__ import annotations

import argparse
from typing import Any

from sglang_kairos.commands import parser_of
from sglang_kairos.router.policy_names import POLICIES
from sglang_kairos.router.upstream_flags import add_others
from sglang_kairos.settings import ConfigError, Number, OneOf, SettingsParser, readable_file, switch

_LOG_LEVELS = OneOf(
    ("debug", "info", "warning", "error", "critical", "trace"), (("warn", "warning"),)
)
_POLICY = OneOf(tuple(POLICIES), (("least_loaded", "least_load"),))
_MIB = 2**20


class OptionError(ConfigError):
    """A setting of the router that cannot be used; the text names it."""


def build_parser() -> SettingsParser:
    """The flags, for parsing and for ``--help``. `dest` is the field of `RouterOptions`."""
    parser = parser_of(
        "router",
        SettingsParser,
        prefix="kairos-router-",
        refusal=OptionError,
        description="Route requests to prefill and decode servers. Flags of sglang_router keep their "
        "names.\nEach is also a variable (--port: KAIROS_ROUTER_PORT) and a key of the table `router` "
        "in the\nfile of --kairos-config.",
    )
    _servers(_Group(parser, "servers"))
    _serving(_Group(parser, "serving"))
    _overload(_Group(parser, "overload"))
    _health(_Group(parser, "health"))
    _security(_Group(parser, "security"))
    _watching(_Group(parser, "logs and metrics"))
    _discovery(_Group(parser, "Kubernetes"))
    add_others(parser)
    return parser


class _Group:
    """A group of flags in ``--help``. `field`: of `RouterOptions`, the flag's own name if empty."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def any(self, *flags: str, help: str, field: str = "", **settings: Any) -> None:
        """A flag of any kind, with `argparse`'s own settings. The help says the default."""
        name, default = field or flags[0][2:].replace("-", "_"), settings.get("default")
        if default and default is not True:
            help += f" (default: {' '.join(default) if isinstance(default, list) else default})"
        self._group.add_argument(*flags, dest=name, help=help, **settings)

    def text(self, flag: str, field: str, default: str, help: str, metavar: str = "TEXT") -> None:
        """A text."""
        self.any(flag, field=field, default=default, metavar=metavar, help=help)

    def file(self, flag: str, field: str, help: str) -> None:
        """A file that must be readable."""
        self.any(flag, field=field, type=readable_file, default="", metavar="PEM", help=help)

    def number(
        self, flags: str, field: str, default: float | None, low: float, high: float, help: str
    ) -> None:
        """A number in a range; whole where the default is, or where there is none."""
        whole = not isinstance(default, float)
        metavar = "SECONDS" if flags.endswith("-secs") else "N"
        kind = Number(low, high, whole)
        self.any(
            *flags.split("|"), field=field, type=kind, default=default, metavar=metavar, help=help
        )

    def on(self, flag: str, field: str, help: str, *, means: bool = True) -> None:
        """A flag without a value. `means`: what the field is with it."""
        action = "store_true" if means else "store_false"
        self.any(flag, field=field, action=action, help=help)

    def several(self, *flags: str, field: str, default: list[str], metavar: str, help: str) -> None:
        """Any number of values after one flag."""
        self.any(*flags, field=field, nargs="*", default=default, metavar=metavar, help=help)


def _servers(group: _Group) -> None:
    group.on("--pd-disaggregation", "", "serve prefill/decode pairs (required)")
    group.any(
        "--prefill",
        action="append",
        nargs="+",
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill server and its --disaggregation-bootstrap-port (without it: the server is "
        "asked)",
    )
    group.any("--decode", action="append", metavar="URL", help="a decode server")
    known = ", ".join(POLICIES)
    for flag, default, text in (
        ("--policy", "kairos", f"how a pair is picked: {known}"),
        ("--prefill-policy", None, "how the prefill server is picked, if not by --policy"),
        ("--decode-policy", None, "how the decode server is picked, if not by --policy"),
    ):
        group.any(flag, type=_policy, default=default, metavar="POLICY", help=text)
    number, rule = group.number, "of cache_aware: "
    number("--cache-threshold", "", 0.3, 0, 1, rule + "the cached share of a prompt that decides")
    number(
        "--balance-abs-threshold",
        "",
        64,
        0,
        1_000_000,
        rule + "the least loaded server instead, when requests differ by more",
    )
    number("--balance-rel-threshold", "", 1.5, 1, 1_000_000, rule + "and by more than this factor")
    number("--seed", "", None, -(2**63), 2**63, "fixes the router's random choices")


def _serving(group: _Group) -> None:
    number = group.number
    group.text("--host", "", "127.0.0.1", "address to listen on", "ADDRESS")
    number("--port", "", 30000, 0, 65535, "port to listen on")
    number(
        "--request-timeout-secs",
        "request_timeout_s",
        1800.0,
        0.1,
        1_000_000,
        "longest time of a request, with its retries",
    )
    number(
        "--connect-timeout-secs",
        "connect_timeout_s",
        5.0,
        0.05,
        600,
        "longest time to connect to a server",
    )
    number("--max-retries|--retry-max-retries", "", 3, 0, 100, "attempts after the first")
    group.on("--disable-retries", "", "make one attempt only")
    group.any(
        "--protect-last-server",
        type=switch,
        default=True,
        metavar="on|off",
        help="keep a request that took a server down from the last one of that role (default: on)",
    )
    number(
        "--shutdown-grace-period-secs",
        "drain_s",
        180.0,
        0,
        86_400,
        "after SIGTERM: time for requests in flight to end",
    )
    number(
        "--drain-delay-secs",
        "drain_delay_s",
        0.0,
        0,
        3600,
        "after SIGTERM: time in which requests are still taken, while /health says 503",
    )
    group.several(
        "--cors-allowed-origins",
        field="cors_origins",
        default=["*"],
        metavar="ORIGIN",
        help="web pages that may call the router; without a value: none",
    )
    group.several(
        "--request-id-headers",
        field="id_headers",
        default=[],
        metavar="NAME",
        help="headers that give a request its id when it has no x-request-id",
    )


def _overload(group: _Group) -> None:
    group.any(
        "--overload",
        action="append",
        metavar="[CLASS=]serve|relegate|shed",
        help="what to do with a request whose SLO no pair can keep; repeat it for SLO classes",
    )
    group.number(
        "--max-concurrent-requests",
        "max_in_flight",
        8192,
        -1,
        1_000_000,
        "most requests in flight, the next gets 429; -1 or 0: no limit",
    )
    group.number(
        "--max-payload-size",
        "max_body_bytes",
        512 * _MIB,
        1024,
        2**40,
        "most bytes of one body, else 413",
    )
    group.number(
        "--max-held-bytes", "", 2048 * _MIB, 1024, 2**50, "most bytes of all bodies held, else 429"
    )


def _health(group: _Group) -> None:
    number = group.number
    number("--poll-interval-secs", "poll_s", 0.5, 0.5, 3600, "time between two polls of a server")
    number(
        "--health-check-interval-secs",
        "probe_s",
        2.0,
        0.5,
        3600,
        "least time between two probes (/server_info) of a server that is up",
    )
    number(
        "--health-success-threshold",
        "probe_successes",
        1,
        1,
        1000,
        "answered probes after which a server is up again",
    )
    group.on("--disable-health-check", "probes", "failed probes take no server out", means=False)
    group.on("--disable-circuit-breaker", "", "failed requests eject no server")
    number(
        "--health-check-timeout-secs",
        "probe_timeout_s",
        5.0,
        0.1,
        600,
        "time after which a probe has failed",
    )
    number(
        "--health-failure-threshold",
        "",
        3,
        1,
        1000,
        "failed probes in a row after which a server is down",
    )
    number(
        "--cb-failure-threshold",
        "",
        5,
        1,
        1_000_000,
        "failed requests in a row after which a server is ejected",
    )
    number(
        "--cb-timeout-duration-secs",
        "",
        5.0,
        0.1,
        3600,
        "length of the first ejection; doubled for each one in a row",
    )


def _security(group: _Group) -> None:
    group.text("--api-key", "", "", "key of the servers, for the router's own calls", "KEY")
    group.text("--client-api-key", "", "", "key that clients must send as bearer token", "KEY")
    group.text(
        "--admin-api-key", "", "", "bearer token of /admin/servers; without it: disabled", "KEY"
    )
    group.file("--tls-cert-path", "tls_cert", "certificate to serve HTTPS with (PEM)")
    group.file("--tls-key-path", "tls_key", "its key (PEM)")
    group.any(
        "--ca-cert-path",
        "--ca-cert-paths",
        field="ca_certs",
        nargs="*",
        type=readable_file,
        default=[],
        metavar="PEM",
        help="certificates to verify https:// servers with",
    )
    group.file("--client-cert-path", "client_cert", "certificate shown to https:// servers (PEM)")
    # Read with its certificate alone: see `options`.
    group.text("--client-key-path", "client_key", "", "its key (PEM)", "PEM")


def _watching(group: _Group) -> None:
    known = ", ".join(_LOG_LEVELS.words[:4])
    group.any("--log-level", type=_LOG_LEVELS, default="info", metavar="LEVEL", help=known)
    group.text("--log-dir", "", "", "folder for the log as well (router.log)", "FOLDER")
    group.number("--prometheus-port", "metrics_port", None, 0, 65535, "port for /metrics as well")
    group.text("--prometheus-host", "metrics_host", "0.0.0.0", "its address", "ADDRESS")
    group.any(
        "--prometheus-duration-buckets",
        field="ttft_buckets",
        nargs="+",
        type=Number(0.0, float("inf")),
        default=[],
        metavar="SECONDS",
        help="buckets of the TTFT histogram, in place of the built-in ones",
    )


def _discovery(group: _Group) -> None:
    group.on("--service-discovery", "", "find the servers as pods, by their labels")
    for role in ("prefill", "decode"):
        group.any(
            f"--{role}-selector", nargs="+", metavar="LABEL=VALUE", help=f"labels of {role} pods"
        )
    group.number("--service-discovery-port", "", 80, 1, 65535, "the pods' HTTP port")
    group.text(
        "--service-discovery-namespace",
        "",
        "",
        "their namespace; without it all, which takes a cluster-wide role",
        "NAME",
    )


def _policy(value: object) -> str:
    """A policy's name, with dashes or underscores."""
    return _POLICY(value.replace("-", "_") if isinstance(value, str) else value)
