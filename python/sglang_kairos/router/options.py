"""The router's own settings, from its command line (flags of `arguments`)."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from sglang_kairos.policy.overload import Overload
from sglang_kairos.router.arguments import POLICIES, build_parser
from sglang_kairos.router.fleet.health import HealthRules
from sglang_kairos.router.upstream_flags import heed

logger = logging.getLogger(__name__)

ADMIN_KEY_ENV = "KAIROS_ROUTER_ADMIN_KEY"
MIB = 1024 * 1024
_LOG_LEVELS = ("debug", "info", "warn", "warning", "error", "critical", "trace")
_LABEL = re.compile(r"[A-Za-z0-9._/-]+=[A-Za-z0-9._-]*")


class OptionError(ValueError):
    """A router flag that cannot be used; the text names it."""


@dataclass(frozen=True, slots=True)
class Pods:
    """Which Kubernetes pods are servers: label selectors by role, HTTP port; no namespace is all."""

    prefill: str
    decode: str
    port: int
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """`prefills`: URL and bootstrap port (None: as that server reports it). Times in seconds,
    sizes in bytes; 0 for `max_in_flight` is no limit; an empty key, path or policy is none;
    `probes` False: what they fail takes nobody out."""

    prefills: tuple[tuple[str, int | None], ...]
    decodes: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 30000
    policy: str = "kairos"
    prefill_policy: str = ""
    decode_policy: str = ""
    cache_threshold: float = 0.3
    balance_abs_threshold: float = 64
    balance_rel_threshold: float = 1.5
    request_timeout_s: float = 1800.0
    connect_timeout_s: float = 5.0
    poll_s: float = 0.5
    probe_timeout_s: float = 5.0
    probe_s: float = 2.0
    probe_successes: int = 1
    probes: bool = True
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
    ca_certs: tuple[str, ...] = ()
    client_cert: str = ""
    client_key: str = ""
    cors_origins: tuple[str, ...] = ("*",)
    id_headers: tuple[str, ...] = ()
    seed: int | None = None
    log_level: str = "info"
    log_dir: str = ""
    metrics_host: str = "0.0.0.0"
    metrics_port: int | None = None
    ttft_buckets: tuple[float, ...] = ()
    pods: Pods | None = None

    def overload_of(self, slo_class: str) -> Overload:
        """What is done with that class when no pair can keep the SLO."""
        return dict(self.overload_classes).get(slo_class, self.overload)


def parse_options(argv: Sequence[str]) -> RouterOptions:
    """Options of a command line without Kairos' own flags. OptionError names what is wrong."""
    given = build_parser().parse_args(list(argv))
    warned, refused = heed(getattr(given, "others", ()))
    if refused:
        raise OptionError("; ".join(refused))
    for line in warned:
        logger.warning("%s", line)
    if not given.pd_disaggregation:
        raise OptionError("--pd-disaggregation: required, this router serves prefill/decode pairs")
    pods = _pods(given)
    if pods is None and (not given.prefill or not given.decode):
        raise OptionError("--prefill and --decode: at least one server each is required")
    _check_ranges(given)
    _check_policies(given)
    _check_files(given)
    ejects = 2**31 if given.disable_circuit_breaker else given.cb_failure_threshold
    overload, classes = _overload(given.overload or [])
    return RouterOptions(
        prefills=tuple(prefill_of(words) for words in given.prefill or ()),
        decodes=tuple(url_of("--decode", url) for url in given.decode or ()),
        host=given.host,
        port=given.port,
        policy=given.policy,
        prefill_policy=given.prefill_policy or "",
        decode_policy=given.decode_policy or "",
        cache_threshold=given.cache_threshold,
        balance_abs_threshold=given.balance_abs_threshold,
        balance_rel_threshold=given.balance_rel_threshold,
        request_timeout_s=given.request_timeout_secs,
        connect_timeout_s=given.connect_timeout_secs,
        poll_s=given.poll_interval_secs,
        probe_timeout_s=given.health_check_timeout_secs,
        probe_s=given.health_check_interval_secs,
        probe_successes=given.health_success_threshold,
        probes=not given.disable_health_check,
        health=HealthRules(
            probe_failures=given.health_failure_threshold,
            request_failures=ejects,
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
        ca_certs=tuple(given.ca_cert_path),
        client_cert=given.client_cert_path,
        client_key=given.client_key_path,
        cors_origins=tuple(given.cors_allowed_origins),
        id_headers=tuple(name.lower() for name in given.request_id_headers),
        seed=given.seed,
        log_level={"warn": "warning"}.get(given.log_level, given.log_level),
        log_dir=given.log_dir,
        metrics_host=given.prometheus_host,
        metrics_port=given.prometheus_port,
        ttft_buckets=tuple(sorted(set(given.prometheus_duration_buckets or ()))),
        pods=pods,
    )


def _check_policies(given: argparse.Namespace) -> None:
    for flag in ("policy", "prefill_policy", "decode_policy"):
        name = getattr(given, flag)
        if name and name not in POLICIES:
            known = ", ".join(POLICIES)
            raise OptionError(f"--{flag.replace('_', '-')}: must be one of {known}, got {name!r}")


def _check_files(given: argparse.Namespace) -> None:
    if given.log_level not in _LOG_LEVELS:
        known = ", ".join(_LOG_LEVELS)
        raise OptionError(f"--log-level: must be one of {known}, got {given.log_level!r}")
    if bool(given.tls_cert_path) != bool(given.tls_key_path):
        raise OptionError("--tls-cert-path and --tls-key-path: one needs the other")
    if given.client_key_path and not given.client_cert_path:
        raise OptionError("--client-key-path: needs --client-cert-path")
    for flag in (
        "tls_cert_path",
        "tls_key_path",
        "ca_cert_path",
        "client_cert_path",
        "client_key_path",
    ):
        paths = getattr(given, flag)
        for path in [paths] if isinstance(paths, str) else paths:
            if path and not os.access(path, os.R_OK):
                raise OptionError(f"--{flag.replace('_', '-')}: cannot be read: {path}")


def _pods(given: argparse.Namespace) -> Pods | None:
    flags = {role: f"--{role}-selector" for role in ("prefill", "decode")}
    selectors = {
        role: _selector(flag, getattr(given, f"{role}_selector") or [])
        for role, flag in flags.items()
    }
    if not given.service_discovery:
        for role, selector in selectors.items():
            if selector:
                raise OptionError(f"{flags[role]}: needs --service-discovery")
        return None
    for role, selector in selectors.items():
        if not selector:
            raise OptionError(f"--service-discovery: needs {flags[role]} LABEL=VALUE …")
    if selectors["prefill"] == selectors["decode"]:
        raise OptionError("--prefill-selector and --decode-selector: must not be the same")
    port, namespace = given.service_discovery_port, given.service_discovery_namespace
    return Pods(selectors["prefill"], selectors["decode"], port, namespace)


def _selector(flag: str, words: Sequence[str]) -> str:
    """``a=b c=d`` or ``a=b,c=d``, as Kubernetes takes it."""
    labels = [label for word in words for label in word.split(",")]
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise OptionError(f"{flag}: must be LABEL=VALUE, got {label!r}")
    return ",".join(labels)


def _check_ranges(given: argparse.Namespace) -> None:
    for name, low, high in (
        ("port", 0, 65535),
        ("prometheus_port", 0, 65535),
        ("service_discovery_port", 1, 65535),
        ("cache_threshold", 0, 1),
        ("balance_abs_threshold", 0, 1_000_000),
        ("balance_rel_threshold", 1, 1_000_000),
        ("health_check_interval_secs", 0.5, 3600),
        ("health_success_threshold", 1, 1000),
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
        if value is None:
            continue
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
