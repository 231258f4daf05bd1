"""The router's own settings, from its command line (flags of `flags`)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sglang_kairos.policy.overload import Overload
from sglang_kairos.router.flags import build_parser
from sglang_kairos.router.health import HealthRules

ADMIN_KEY_ENV = "KAIROS_ROUTER_ADMIN_KEY"
MIB = 1024 * 1024


class OptionError(ValueError):
    """A router flag that cannot be used; the text names it."""


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """`prefills`: URL and bootstrap port (None: as that server reports it). Times in seconds,
    sizes in bytes; 0 for `max_in_flight` is no limit; an empty key or path is none."""

    prefills: tuple[tuple[str, int | None], ...]
    decodes: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 30000
    policy: str = "kairos"
    request_timeout_s: float = 1800.0
    connect_timeout_s: float = 5.0
    poll_s: float = 0.5
    probe_timeout_s: float = 5.0
    health: HealthRules = field(default_factory=HealthRules)
    max_retries: int = 3
    overload: Overload = Overload.SERVE
    overload_classes: tuple[tuple[str, Overload], ...] = ()
    max_in_flight: int = 8192
    protect_last_server: bool = True
    max_body_bytes: int = 512 * MIB
    max_held_bytes: int = 2048 * MIB
    drain_s: float = 180.0
    drain_delay_s: float = 0.0
    api_key: str = ""
    client_api_key: str = ""
    admin_api_key: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    ca_cert: str = ""
    seed: int | None = None
    log_level: str = "info"

    def overload_of(self, slo_class: str) -> Overload:
        """What is done with that class when no pair can keep the SLO."""
        return dict(self.overload_classes).get(slo_class, self.overload)


def parse_options(argv: Sequence[str]) -> RouterOptions:
    """Options of a command line without Kairos' own flags. OptionError names what is wrong."""
    given = build_parser().parse_args(list(argv))
    if not given.pd_disaggregation:
        raise OptionError("--pd-disaggregation: required, this router serves prefill/decode pairs")
    if not given.prefill or not given.decode:
        raise OptionError("--prefill and --decode: at least one server each is required")
    _check_ranges(given)
    if bool(given.tls_cert_path) != bool(given.tls_key_path):
        raise OptionError("--tls-cert-path and --tls-key-path: one needs the other")
    for flag in ("tls_cert_path", "tls_key_path", "ca_cert_path"):
        path = getattr(given, flag)
        if path and not os.access(path, os.R_OK):
            raise OptionError(f"--{flag.replace('_', '-')}: cannot be read: {path}")
    overload, classes = _overload(given.overload or [])
    return RouterOptions(
        prefills=tuple(prefill_of(words) for words in given.prefill),
        decodes=tuple(url_of("--decode", url) for url in given.decode),
        host=given.host,
        port=given.port,
        policy=given.policy,
        request_timeout_s=given.request_timeout_secs,
        connect_timeout_s=given.connect_timeout_secs,
        poll_s=given.poll_interval_secs,
        probe_timeout_s=given.health_check_timeout_secs,
        health=HealthRules(
            probe_failures=given.health_failure_threshold,
            request_failures=given.cb_failure_threshold,
            eject_s=given.cb_timeout_duration_secs,
            longest_eject_s=max(60.0, given.cb_timeout_duration_secs),
        ),
        max_retries=0 if given.disable_retries else given.max_retries,
        overload=overload,
        overload_classes=classes,
        max_in_flight=max(0, given.max_concurrent_requests),
        protect_last_server=given.protect_last_server == "on",
        max_body_bytes=given.max_payload_size,
        max_held_bytes=given.max_held_bytes,
        drain_s=given.shutdown_grace_period_secs,
        drain_delay_s=given.drain_delay_secs,
        api_key=given.api_key,
        client_api_key=given.client_api_key,
        admin_api_key=given.admin_api_key or os.environ.get(ADMIN_KEY_ENV, ""),
        tls_cert=given.tls_cert_path,
        tls_key=given.tls_key_path,
        ca_cert=given.ca_cert_path,
        seed=given.seed,
        log_level=given.log_level,
    )


def _check_ranges(given: argparse.Namespace) -> None:
    for name, low, high in (
        ("port", 0, 65535),
        ("max_retries", 0, 100),
        ("poll_interval_secs", 0.5, 3600),
        ("request_timeout_secs", 0.1, 1_000_000),
        ("connect_timeout_secs", 0.05, 600),
        ("health_check_timeout_secs", 0.1, 600),
        ("health_failure_threshold", 1, 1000),
        ("cb_failure_threshold", 1, 1_000_000),
        ("cb_timeout_duration_secs", 0.1, 3600),
        ("max_concurrent_requests", -1, 1_000_000),
        ("max_payload_size", 1024, 2**40),
        ("max_held_bytes", 1024, 2**50),
        ("shutdown_grace_period_secs", 0, 86_400),
        ("drain_delay_secs", 0, 3600),
    ):
        value = getattr(given, name)
        if not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag}: must be between {low} and {high}, got {value}")


def _overload(words: Sequence[str]) -> tuple[Overload, tuple[tuple[str, Overload], ...]]:
    """From ``shed`` (for all) and ``batch=relegate`` (for one class), in any order."""
    default, classes = Overload.SERVE, {}
    for word in words:
        name, equals, action = word.rpartition("=")
        if action not in list(Overload) or (equals and not name):
            known = ", ".join(Overload)
            raise OptionError(f"--overload: must be [CLASS=] one of {known}, got {word!r}")
        if name:
            classes[name] = Overload(action)
        else:
            default = Overload(action)
    return default, tuple(classes.items())


def prefill_of(words: Sequence[str]) -> tuple[str, int | None]:
    """URL and bootstrap port from the words after ``--prefill``. OptionError."""
    url = url_of("--prefill", words[0])
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


def url_of(flag: str, text: str) -> str:
    """A server's URL without a slash at its end. OptionError names `flag`."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise OptionError(f"{flag}: must be http://host:port, got {text!r}")
    return text.rstrip("/")
