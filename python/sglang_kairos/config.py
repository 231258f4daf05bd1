"""Kairos' settings: one dataclass, the same as flag, environment variable and file.

Precedence: flag, then ``KAIROS_*`` environment, then the file named by ``--kairos-config`` (JSON or
TOML), then the default. The launcher writes the result back into the environment (`to_env`), which
is how scheduler children, started with ``spawn``, receive it under any launcher.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_kairos.names import new_names
from sglang_kairos.settings import (
    FILE_ENV,
    ConfigError,
    Number,
    OneOf,
    SettingsParser,
    add_file_flag,
    file_named,
    plain,
    read_mapping,
    settings_in,
    shown,
    switch,
    text,
    variable,
)
from sglang_kairos.slo.age import AGE_HEADERS, START_HEADERS, AgeRule
from sglang_kairos.slo.targets import (
    LIMITS_MS,
    Slo,
    SloError,
    SloTable,
    parse_classes,
    parse_priorities,
)

__all__ = ["ConfigError", "KairosConfig", "add_flags", "env_of", "flag_of"]


def _setting(
    default: Any,
    help_text: str,
    *,
    flag: str = "",
    low: float = -math.inf,
    high: float = math.inf,
    words: OneOf | None = None,
) -> Any:
    kind: Any = words or text
    if isinstance(default, bool):
        kind = switch
    elif isinstance(default, int | float):
        kind = Number(low, high, whole=isinstance(default, int))
    return dataclasses.field(
        default=default,
        metadata={"help": help_text, "flag": flag, "low": low, "high": high, "kind": kind},
    )


@dataclass(frozen=True)
class KairosConfig:
    """All settings. Times in milliseconds. Immutable; `dataclasses.replace` makes a variant."""

    enabled: bool = _setting(
        True, "Install Kairos. Off is stock SGLang, byte for byte.", flag="--kairos"
    )
    ttft_ms: float = _setting(
        2000.0,
        "TTFT target of a request that names none, in ms.",
        low=LIMITS_MS["ttft_ms"][0],
        high=LIMITS_MS["ttft_ms"][1],
    )
    tpot_ms: float = _setting(
        100.0,
        "TPOT target of a request that names none, in ms.",
        low=LIMITS_MS["tpot_ms"][0],
        high=LIMITS_MS["tpot_ms"][1],
    )
    slo_classes: str = _setting(
        "", "JSON or TOML file of SLO classes: name -> ttft_ms, tpot_ms, weight."
    )
    priority_classes: str = _setting(
        "",
        "SLO class of a request that names none, by its priority. 0=batch,10=chat: batch from 0 to 9, "
        "chat from 10 on. Or a JSON or TOML file of priority -> class.",
    )
    age_headers: str = _setting(
        ",".join(START_HEADERS),
        "Headers in which a gateway says when it got a request, of "
        f"{', '.join(AGE_HEADERS)}. Off: none.",
    )
    max_age_ms: float = _setting(
        30_000.0,
        "Oldest age of a request, in ms, that such a header is believed to say.",
        low=0.0,
        high=LIMITS_MS["age_ms"][1],
    )
    strict: str = _setting(
        "on",
        "What to do when a wrapped SGLang function is missing or unknown. On refuses to start. Seam "
        "runs without what that function gives, and says so. (Off is the old name of seam.)",
        words=OneOf(("on", "seam"), (("off", "seam"),)),
    )
    dynamo: bool = _setting(
        True,
        "In a worker of NVIDIA Dynamo: take the SLOs of its requests, and show metrics on its port.",
    )
    order: bool = _setting(True, "Order waiting prefills by urgency.")
    pause: bool = _setting(
        True, "Pause a chunked prefill at a chunk boundary for a more urgent request."
    )
    park: bool = _setting(
        True, "Let running requests with slack sit a decode step out for ones without."
    )
    max_wait: float = _setting(
        10.0,
        "Starvation bound. A request older than this many TTFT targets goes first, within "
        "--kairos-late-share.",
        low=1.0,
        high=1e6,
    )
    late_share: float = _setting(
        0.1,
        "Largest share of the prefill tokens for requests past the starvation bound.",
        low=0.0,
        high=1.0,
    )
    max_paused: int = _setting(8, "Most chunked prefills paused at once.", low=0, high=1024)
    max_pause_ms: float = _setting(
        60_000.0,
        "Longest pause in ms. A prefill paused for so long runs next, whatever its urgency.",
        low=1.0,
        high=3_600_000.0,
    )
    max_itl_ms: float = _setting(
        2000.0,
        "Longest time, in ms, between two tokens of a request that is parked.",
        low=1.0,
        high=3_600_000.0,
    )
    min_throughput: float = _setting(
        0.0,
        "Minimum decode throughput, as a fraction of what the full batch would produce. Enforced even "
        "at the expense of TPOT targets.",
        low=0.0,
        high=1.0,
    )
    max_step_error: float = _setting(
        0.2,
        "Circuit breaker. Nobody is parked while the mean error of predicted steps is larger, and "
        "steps do not follow the predictions.",
        low=0.0,
        high=100.0,
    )
    margin: float = _setting(
        0.05, "Safety margin added to predicted times, as a fraction.", low=0.0, high=10.0
    )
    handoff_ms: float = _setting(
        30.0,
        "First guess of the time from the end of prefill to the first token, in ms.",
        low=0.0,
        high=60_000.0,
    )
    chaos_seed: int = _setting(
        -1,
        "For tests: make random legal decisions from this seed. -1: off.",
        low=-1,
        high=2**31,
    )
    latency_model: str = _setting(
        "",
        "File of step times, as `kairos calibrate` writes it. It keeps what is learnt across restarts.",
    )
    decision_log: str = _setting(
        "",
        "Append every scheduling decision to a JSONL file of this name, one for each process "
        "(log.jsonl: log.ROLE-PORT-RANK.jsonl).",
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, kind = getattr(self, item.name), item.metadata["kind"]
            try:
                kind(value)
                if isinstance(kind, OneOf) and value not in kind.words:
                    raise kind.refuse(value)
                if isinstance(value, str) and not isinstance(item.default, str):
                    raise ArgumentTypeError(f"must not be text, got {shown(value)}")
            except ArgumentTypeError as error:
                raise ConfigError(f"{flag_of(item)}: {error}") from None

    def slo_table(self) -> SloTable:
        """Default SLO, classes and the rest of `SloTable`; reads the files. ConfigError if unusable."""
        default = Slo(self.ttft_ms, self.tpot_ms)
        table = SloTable(default, age_rule=self._age_rule())
        flag, named = "--kairos-slo-classes", self.slo_classes
        try:
            if named:
                classes = parse_classes(read_mapping(named), default)
                table = dataclasses.replace(table, classes=classes)
            flag, named = "--kairos-priority-classes", self.priority_classes
            if named:
                priorities = parse_priorities(_priorities(named), table)
                table = dataclasses.replace(table, priorities=priorities)
        except SloError as error:
            raise ConfigError(f"{flag} {named}: {error}") from None
        return table

    def _age_rule(self) -> AgeRule:
        words = [word.strip().lower() for word in self.age_headers.split(",")]
        names = tuple(word for word in words if word and word != "off")
        for name in names:
            if name not in AGE_HEADERS:
                known = ", ".join(AGE_HEADERS)
                raise ConfigError(f"--kairos-age-headers: must be off or of {known}, got {name!r}")
        return AgeRule(names, self.max_age_ms)

    def to_env(self, env: MutableMapping[str, str]) -> None:
        """Write every setting into `env`, so that child processes read the same configuration."""
        for item in dataclasses.fields(self):
            env[env_of(item)] = _to_text(getattr(self, item.name))
        for name in (FILE_ENV, *new_names("environment")):
            if not name.startswith("KAIROS_ROUTER_"):
                env.pop(name, None)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> KairosConfig:
        """The configuration that environment (and the file it names) describe."""
        return cls.load([], env)[0]

    @classmethod
    def load(
        cls, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> tuple[KairosConfig, list[str]]:
        """Configuration of a command line, and the arguments that are not Kairos' own, in order.

        Raises ConfigError for a bad value, an unreadable file or an unknown ``--kairos…`` flag.
        """
        env = os.environ if env is None else env
        parser = SettingsParser(add_help=False)
        add_flags(parser)
        path = file_named(argv, env)
        given, rest = parser.load(argv, env, settings_in(path), path)
        unknown = [word for word in rest if word.startswith("--kairos")]
        if unknown:
            known = ", ".join(flag_of(item) for item in dataclasses.fields(cls))
            raise ConfigError(f"{unknown[0]}: no such flag; known: {known}")
        return cls(
            **{item.name: getattr(given, item.name) for item in dataclasses.fields(cls)}
        ), rest


def flag_of(item: dataclasses.Field[Any]) -> str:
    """``--kairos-max-wait`` for `max_wait`; the switch itself is just ``--kairos``."""
    return item.metadata["flag"] or "--kairos-" + item.name.replace("_", "-")


def env_of(item: dataclasses.Field[Any]) -> str:
    """``KAIROS_MAX_WAIT`` for `max_wait`; ``KAIROS`` for the switch."""
    return variable("kairos-", flag_of(item))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add Kairos' flag group to a parser."""
    group = parser.add_argument_group(
        "Kairos", "SLO-aware scheduling; every flag also as KAIROS_… variable"
    )
    add_file_flag(group)
    for item in dataclasses.fields(KairosConfig):
        default: Any = item.default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        said = plain(default) if number else _to_text(default)
        shown_default = f" (default: {said})" if said else ""
        group.add_argument(
            flag_of(item),
            dest=item.name,
            default=item.default,
            type=item.metadata["kind"],
            metavar=_metavar(item),
            help=item.metadata["help"].replace("%", "%%") + shown_default,
        )


def _metavar(item: dataclasses.Field[Any]) -> str:
    if isinstance(kind := item.metadata["kind"], OneOf):
        return "|".join(kind.words)
    return "on|off" if isinstance(item.default, bool) else item.name.upper()


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.17g}" if isinstance(value, float) else str(value)


def _priorities(text: str) -> Any:
    """What ``--kairos-priority-classes`` says: a file's content, or ``0=batch,10=chat`` itself."""
    if text.endswith((".json", ".toml")):
        return read_mapping(text)
    pairs = [word.partition("=") for word in text.split(",")]
    if any(not priority.strip() or not name.strip() for priority, _, name in pairs):
        raise ConfigError(
            "--kairos-priority-classes: must be PRIORITY=CLASS,… or a .json or .toml file, "
            f"got {shown(text)}"
        )
    names = [priority.strip() for priority, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ConfigError(f"--kairos-priority-classes: a priority is there twice in {shown(text)}")
    return {priority.strip(): name.strip() for priority, _, name in pairs}
