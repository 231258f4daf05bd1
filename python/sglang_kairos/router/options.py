"""The router's own settings, from its flags, the environment and a file (see `arguments`)."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from sglang_kairos.policy.overload import Overload
from sglang_kairos.router.arguments import OptionError, build_parser
from sglang_kairos.router.health_rules import HealthRules
from sglang_kairos.router.upstream_flags import heed
from sglang_kairos.settings import readable_file

__all__ = [
    "HealthRules",
    "OptionError",
    "Pods",
    "RouterOptions",
    "parse_options",
    "prefill_of",
    "url_of",
]

logger = logging.getLogger(__name__)

MIB = 1024 * 1024
_LABEL = re.compile(r"[A-Za-z0-9._/-]+=[A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Pods:
    """Which Kubernetes pods are servers: label selectors by role, HTTP port; no namespace is all."""

    prefill: str
    decode: str
    port: int
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """Times in seconds, sizes in bytes. An empty key, path or policy is none.

    `prefills`: URL and bootstrap port (None: as that server reports it). `max_in_flight`: 0 is no
    limit. `probes`: without them a server that fails probes is not taken out.
    """

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


def parse_options(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    file: Mapping[str, Any] | None = None,
    where: str = "",
) -> RouterOptions:
    """Options of a command line without Kairos' own flags. OptionError names what is wrong.

    `env`: the environment (default: this process'), `file`: the settings of a file, `where`: its name.
    """
    env = os.environ if env is None else env
    given, rest = build_parser().load(argv, env, file, where)
    if rest:
        raise OptionError(f"{rest[0]}: no such flag (kairos router --help shows all)")
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
    _check_certificates(given)
    overload, classes = _overload(given.overload or [])
    made = {
        "prefills": tuple(prefill_of(words) for words in given.prefill or ()),
        "decodes": tuple(url_of("--decode", url) for url in given.decode or ()),
        "health": _health(given),
        "prefill_policy": given.prefill_policy or "",
        "decode_policy": given.decode_policy or "",
        "max_retries": 0 if given.disable_retries else given.max_retries,
        "overload": overload,
        "overload_classes": classes,
        "max_in_flight": max(0, given.max_in_flight),
        "ca_certs": tuple(given.ca_certs),
        "cors_origins": tuple(given.cors_origins),
        "id_headers": tuple(name.lower() for name in given.id_headers),
        "ttft_buckets": tuple(sorted(set(given.ttft_buckets))),
        "pods": pods,
    }
    as_given = {item.name for item in dataclasses.fields(RouterOptions)} - made.keys()
    return RouterOptions(**made, **{name: getattr(given, name) for name in as_given})


def _health(given: argparse.Namespace) -> HealthRules:
    never = 2**31
    return HealthRules(
        probe_failures=given.health_failure_threshold,
        request_failures=never if given.disable_circuit_breaker else given.cb_failure_threshold,
        eject_s=given.cb_timeout_duration_secs,
        longest_eject_s=max(60.0, given.cb_timeout_duration_secs),
    )


def _check_certificates(given: argparse.Namespace) -> None:
    if bool(given.tls_cert) != bool(given.tls_key):
        raise OptionError("--tls-cert-path and --tls-key-path: one needs the other")
    if given.client_key and not given.client_cert:
        raise OptionError("--client-key-path: needs --client-cert-path")
    try:
        readable_file(given.client_key)
    except argparse.ArgumentTypeError as error:
        raise OptionError(f"--client-key-path: {error}") from None


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
