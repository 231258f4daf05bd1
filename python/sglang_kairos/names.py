"""Public names that have changed: the one table of them. Each old name works for one more release."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

logger = logging.getLogger("sglang_kairos")

V = TypeVar("V")
Kind = Literal["flag", "environment", "file key", "server_info", "metric", "command"]


class Renamed(NamedTuple):
    """A public name of that kind, as it was and as it is."""

    kind: Kind
    old: str
    new: str


RENAMED = (
    Renamed("flag", "--kairos-profile", "--kairos-latency-model"),
    Renamed("environment", "KAIROS_PROFILE", "KAIROS_LATENCY_MODEL"),
    Renamed("environment", "KAIROS_ROUTER_ADMIN_KEY", "KAIROS_ROUTER_ADMIN_API_KEY"),
    Renamed("file key", "profile", "latency_model"),
    Renamed("server_info", "profile", "latency_model"),
    Renamed("server_info", "profile_key", "latency_model_key"),
    Renamed("server_info", "longest_silence_s", "max_itl_s"),
    Renamed("metric", "kairos_silence_seconds", "kairos_request_max_itl_seconds"),
    Renamed("metric", "kairos_silence_max_seconds", "kairos_max_itl_seconds"),
    Renamed("command", "python -m sglang_kairos.tools.doctor", "kairos doctor"),
    Renamed("command", "python -m sglang_kairos.tools.patch", "kairos patch"),
    Renamed("command", "python -m sglang_kairos.tools.profile", "kairos calibrate"),
    Renamed("command", "python -m sglang_kairos.tools.replay", "kairos replay"),
    Renamed("command", "python -m sglang_kairos.tools.report", "kairos report"),
)


def new_names(kind: Kind) -> dict[str, str]:
    """Old name -> new name."""
    return {row.old: row.new for row in RENAMED if row.kind == kind}


def old_name(kind: Kind, new: str) -> str:
    """The old name of that; empty where it has kept its name."""
    return next((row.old for row in RENAMED if row.kind == kind and row.new == new), "")


@cache
def say_renamed(old: str, new: str) -> None:
    """One log line a process: the user shall write the new name."""
    logger.warning("%s is now %s; the old name goes with the next release", old, new)


def with_new_words(words: list[str]) -> list[str]:
    """A command line with the new flags in place of old ones."""
    flags, written = new_names("flag"), []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in flags:
            say_renamed(flag, flags[flag])
            word = flags[flag] + equals + value
        written.append(word)
    return written


def with_new_keys(kind: Kind, values: Mapping[str, V], where: str = "") -> dict[str, V]:
    """`values` under new names; what is given by both names counts by the new one."""
    names, renamed = new_names(kind), dict(values)
    for old, new in names.items():
        if old in values:
            say_renamed(f"{where}{old}", new)
            renamed.setdefault(new, renamed.pop(old))
            renamed.pop(old, None)
    return renamed


def with_old_keys(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and under each old name the same once more."""
    names = new_names(kind)
    return {**values, **{old: values[new] for old, new in names.items() if new in values}}
