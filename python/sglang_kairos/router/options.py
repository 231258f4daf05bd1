"""The router's own settings, from its command line (same flags as upstream's routers)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

POLICIES = ("kairos", "random", "round_robin")


class OptionError(ValueError):
    """A router flag that cannot be used; the text names it."""


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """`prefills`: URL and bootstrap port (None: as that server reports it). Times in seconds."""

    prefills: tuple[tuple[str, int | None], ...]
    decodes: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 30000
    policy: str = "kairos"
    request_timeout_s: float = 1800.0
    connect_timeout_s: float = 5.0
    poll_s: float = 0.5
    max_retries: int = 3
    api_key: str = ""
    seed: int | None = None
    log_level: str = "info"


def parse_options(argv: Sequence[str]) -> RouterOptions:
    """Options of a command line without Kairos' own flags. OptionError names what is wrong."""
    given = build_parser().parse_args(list(argv))
    if not given.pd_disaggregation:
        raise OptionError("--pd-disaggregation: required, this router serves prefill/decode pairs")
    if not given.prefill or not given.decode:
        raise OptionError("--prefill and --decode: at least one server each is required")
    for flag, value, low, high in (
        ("--port", given.port, 0, 65535),
        ("--max-retries", given.max_retries, 0, 100),
        ("--poll-interval-secs", given.poll_interval_secs, 0.5, 3600),
        ("--request-timeout-secs", given.request_timeout_secs, 1, 1_000_000),
        ("--connect-timeout-secs", given.connect_timeout_secs, 0.05, 600),
    ):
        if not low <= value <= high:
            raise OptionError(f"{flag}: must be between {low} and {high}, got {value}")
    return RouterOptions(
        prefills=tuple(_prefill(words) for words in given.prefill),
        decodes=tuple(_url("--decode", url) for url in given.decode),
        host=given.host,
        port=given.port,
        policy=given.policy,
        request_timeout_s=given.request_timeout_secs,
        connect_timeout_s=given.connect_timeout_secs,
        poll_s=given.poll_interval_secs,
        max_retries=given.max_retries,
        api_key=given.api_key,
        seed=given.seed,
        log_level=given.log_level,
    )


def build_parser() -> argparse.ArgumentParser:
    """The flags, for parsing and for ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kairos.launch_router", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
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
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=int, default=30000, help="port to listen on (default: %(default)s)")
    add("--policy", choices=POLICIES, default="kairos", help="how a pair is picked")
    add("--request-timeout-secs", type=float, default=1800.0, help="whole request, seconds")
    add("--connect-timeout-secs", type=float, default=5.0, help="connecting to a server, seconds")
    add("--poll-interval-secs", type=float, default=0.5, help="between looks at a server, seconds")
    add("--max-retries", type=int, default=3, help="other pairs tried before the first byte")
    add("--api-key", default="", help="sent with the router's own calls to the servers")
    add("--seed", type=int, default=None, help="fixes the router's random choices")
    add("--log-level", default="info", help="uvicorn log level (default: %(default)s)")
    return parser


def _prefill(words: list[str]) -> tuple[str, int | None]:
    url = _url("--prefill", words[0])
    if len(words) > 2:
        raise OptionError(f"--prefill: takes a URL and a bootstrap port, got {' '.join(words)!r}")
    if len(words) == 1 or words[1].lower() == "none":
        return url, None
    try:
        port = int(words[1])
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise OptionError(f"--prefill: bootstrap port between 1 and 65535, got {words[1]!r}")
    return url, port


def _url(flag: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise OptionError(f"{flag}: must be http://host:port, got {text!r}")
    return text.rstrip("/")
