"""Kairos' settings: one dataclass, the same as flag, environment variable and file.

Precedence: flag, then ``KAIROS_*`` environment, then the file named by ``--kairos-config`` (JSON or
TOML), then the default. The launcher writes the result back into the environment (`to_env`), which
is how scheduler children, started with ``spawn``, receive it under any launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kairos.slo.age import AGE_HEADERS, START_HEADERS, AgeRule
from sglang_kairos.slo.targets import (
    LIMITS_MS,
    Slo,
    SloError,
    SloTable,
    parse_classes,
    parse_priorities,
)

FILE_FLAG, FILE_ENV = "--kairos-config", "KAIROS_CONFIG"


class ConfigError(ValueError):
    """A setting out of range; the text names the flag, the accepted range and the value."""


def _setting(
    default: Any,
    help_text: str,
    *,
    flag: str = "",
    low: float = -math.inf,
    high: float = math.inf,
    words: Mapping[str, str] | None = None,
) -> Any:
    return dataclasses.field(
        default=default,
        metadata={"help": help_text, "flag": flag, "low": low, "high": high, "words": words},
    )


@dataclass(frozen=True)
class KairosConfig:
    """All settings. Times in milliseconds. Immutable; `dataclasses.replace` makes a variant."""

    enabled: bool = _setting(
        True, "install Kairos; off is stock SGLang, byte for byte", flag="--kairos"
    )
    ttft_ms: float = _setting(
        2000.0,
        "default TTFT target of a request that names none (ms)",
        low=LIMITS_MS["ttft_ms"][0],
        high=LIMITS_MS["ttft_ms"][1],
    )
    tpot_ms: float = _setting(
        100.0,
        "default TPOT target of a request that names none (ms)",
        low=LIMITS_MS["tpot_ms"][0],
        high=LIMITS_MS["tpot_ms"][1],
    )
    slo_classes: str = _setting(
        "", "JSON or TOML file of SLO classes: name -> ttft_ms, tpot_ms, weight"
    )
    priority_classes: str = _setting(
        "",
        "SLO class of a request that names none, by its priority: 0=batch,10=chat is batch from 0 to 9 "
        "and chat from 10 on; or a JSON or TOML file of priority -> class",
    )
    age_headers: str = _setting(
        ",".join(START_HEADERS),
        "headers in which a gateway says when it got a request, of "
        f"{', '.join(AGE_HEADERS)}; off: none",
    )
    max_age_ms: float = _setting(
        30_000.0,
        "a header that makes a request older than this is not believed (ms)",
        low=0.0,
        high=LIMITS_MS["age_ms"][1],
    )
    strict: str = _setting(
        "on",
        "when a touched SGLang function is missing or unknown: on refuses to start, seam runs without "
        "exactly what it gives, and says so (off: the same, its old name)",
        words={"on": "on", "seam": "seam", "off": "seam"},
    )
    dynamo: bool = _setting(
        True,
        "in a worker of NVIDIA Dynamo: take the SLOs of its requests and show metrics on its port",
    )
    order: bool = _setting(True, "order waiting prefills by urgency")
    pause: bool = _setting(
        True, "pause a chunked prefill at a chunk boundary for a more urgent request"
    )
    park: bool = _setting(True, "let running decodes with slack sit a step out for ones without")
    max_wait: float = _setting(
        10.0,
        "starvation bound: older than this multiple of its TTFT SLO, a request gets the late share",
        low=1.0,
        high=1e6,
    )
    late_share: float = _setting(
        0.1,
        "share of prefill tokens that requests past the starvation bound may claim",
        low=0.0,
        high=1.0,
    )
    max_paused: int = _setting(8, "most chunked prefills paused at once", low=0, high=1024)
    max_pause_ms: float = _setting(
        60_000.0,
        "a prefill paused this long runs next, whatever its urgency (ms)",
        low=1.0,
        high=3_600_000.0,
    )
    max_itl_ms: float = _setting(
        2000.0, "a parked request is never silent longer than this (ms)", low=1.0, high=3_600_000.0
    )
    min_throughput: float = _setting(
        0.0,
        "each decode step makes at least this share of the tokens/s that one of everybody running would, "
        "and as many are let in as that takes, whatever TPOT targets it costs",
        low=0.0,
        high=1.0,
    )
    max_step_error: float = _setting(
        0.2,
        "circuit breaker: no parking while decode steps are predicted worse than this (mean error) "
        "and do not even follow the predictions",
        low=0.0,
        high=100.0,
    )
    margin: float = _setting(
        0.05, "safety margin added to predicted times, as a fraction", low=0.0, high=10.0
    )
    handoff_ms: float = _setting(
        30.0,
        "first guess of the hand-off from prefill's end to the first token (ms)",
        low=0.0,
        high=60_000.0,
    )
    chaos_seed: int = _setting(
        -1,
        "testing: replace decisions by random legal ones from this seed; -1 is off",
        low=-1,
        high=2**31,
    )
    profile: str = _setting("", "file that keeps what was learnt about step times across restarts")
    decision_log: str = _setting(
        "",
        "append every scheduling decision to a JSONL file of this name, one per process "
        "(log.jsonl: log.ROLE-PORT-RANK.jsonl)",
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, flag = getattr(self, item.name), flag_of(item)
            if isinstance(item.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{flag}: must be on or off, got {value!r}")
            elif isinstance(item.default, int | float):
                low, high = item.metadata["low"], item.metadata["high"]
                whole = isinstance(item.default, int)
                wrong_kind = isinstance(value, bool) or not isinstance(value, int | float)
                if wrong_kind or (whole and not isinstance(value, int)) or not low <= value <= high:
                    kind = "a whole number " if whole else ""
                    wanted = f"must be {kind}between {low:g} and {high:g}"
                    raise ConfigError(f"{flag}: {wanted}, got {_shown(value)}")
            elif not isinstance(value, str):
                raise ConfigError(f"{flag}: must be text, got {value!r}")
            elif (words := item.metadata["words"]) and value not in words.values():
                raise ConfigError(f"{flag}: must be {_any_of(words)}, got {value!r}")

    def slo_table(self) -> SloTable:
        """Default SLO, classes and the rest of `SloTable`; reads the files. ConfigError if unusable."""
        default = Slo(self.ttft_ms, self.tpot_ms)
        table = SloTable(default, age_rule=self._age_rule())
        flag, named = "--kairos-slo-classes", self.slo_classes
        try:
            if named:
                classes = parse_classes(_read_mapping(named), default)
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
        env.pop(FILE_ENV, None)

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
        parser = _Parser(add_help=False, allow_abbrev=False)
        add_flags(parser)
        given, rest = parser.parse_known_args(list(argv))
        unknown = [word for word in rest if word.startswith("--kairos")]
        if unknown:
            known = ", ".join(flag_of(item) for item in dataclasses.fields(cls))
            raise ConfigError(f"{unknown[0]}: no such flag; known: {known}")
        path = given.kairos_config or env.get(FILE_ENV, "")
        from_file = _read_settings(path) if path else {}
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            text = getattr(given, item.name)
            if text is None:
                text = env.get(env_of(item))
            if text is not None:
                values[item.name] = _from_text(item, text)
            elif item.name in from_file:
                values[item.name] = from_file[item.name]
        return cls(**values), rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def flag_of(item: dataclasses.Field[Any]) -> str:
    """``--kairos-max-wait`` for `max_wait`; the switch itself is just ``--kairos``."""
    return item.metadata["flag"] or "--kairos-" + item.name.replace("_", "-")


def env_of(item: dataclasses.Field[Any]) -> str:
    """``KAIROS_MAX_WAIT`` for `max_wait`; ``KAIROS`` for the switch."""
    return flag_of(item)[2:].replace("-", "_").upper()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add Kairos' flag group to a parser (values stay text: `KairosConfig.load` checks them)."""
    group = parser.add_argument_group(
        "Kairos", "SLO-aware scheduling; every flag also as KAIROS_… variable"
    )
    group.add_argument(
        FILE_FLAG, default=None, metavar="FILE", help="JSON or TOML file of these settings"
    )
    for item in dataclasses.fields(KairosConfig):
        shown = "" if item.default == "" else f" (default: {_to_text(item.default)})"
        group.add_argument(
            flag_of(item),
            dest=item.name,
            default=None,
            metavar=_metavar(item),
            help=item.metadata["help"].replace("%", "%%") + shown,
        )


def _metavar(item: dataclasses.Field[Any]) -> str:
    if words := item.metadata["words"]:
        return "|".join(dict.fromkeys(words.values()))
    return "on|off" if isinstance(item.default, bool) else item.name.upper()


def _any_of(words: Mapping[str, str]) -> str:
    return " or ".join(dict.fromkeys(words.values()))


def _shown(value: Any) -> str:
    """A refused value for an error text, cut short."""
    if isinstance(value, int) and abs(value) > 10**18:
        return "a number too large"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.17g}" if isinstance(value, float) else str(value)


_SWITCH = dict.fromkeys(("on", "true", "1", "yes"), True)
_SWITCH |= dict.fromkeys(("off", "false", "0", "no"), False)


def _from_text(item: dataclasses.Field[Any], text: str) -> Any:
    word = text.strip().lower()
    if isinstance(item.default, bool):
        if word in _SWITCH:
            return _SWITCH[word]
        raise ConfigError(f"{flag_of(item)}: must be on or off, got {text!r}")
    if words := item.metadata["words"]:
        if word in _SWITCH:
            word = _to_text(_SWITCH[word])
        if word in words:
            return words[word]
        raise ConfigError(f"{flag_of(item)}: must be {_any_of(words)}, got {text!r}")
    if isinstance(item.default, int | float):
        kind = type(item.default)
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{flag_of(item)}: must be {what}, got {text!r}") from None
    return text


def _priorities(text: str) -> Any:
    """What ``--kairos-priority-classes`` says: a file's content, or ``0=batch,10=chat`` itself."""
    if text.endswith((".json", ".toml")):
        return _read_mapping(text)
    pairs = [word.partition("=") for word in text.split(",")]
    if any(not priority.strip() or not name.strip() for priority, _, name in pairs):
        raise ConfigError(
            "--kairos-priority-classes: must be PRIORITY=CLASS,… or a .json or .toml file, "
            f"got {_shown(text)}"
        )
    names = [priority.strip() for priority, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ConfigError(f"--kairos-priority-classes: a priority is there twice in {_shown(text)}")
    return {priority.strip(): name.strip() for priority, _, name in pairs}


def _read_mapping(path: str) -> Any:
    try:
        data = Path(path).read_bytes()
        return tomllib.loads(data.decode()) if path.endswith(".toml") else json.loads(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON or TOML: {error}") from None


def _read_settings(path: str) -> dict[str, Any]:
    raw = _read_mapping(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be an object of setting -> value")
    items = {item.name: item for item in dataclasses.fields(KairosConfig)}
    settings: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("-", "_").removeprefix("kairos_")
        name = "enabled" if name == "kairos" else name
        if name not in items:
            raise ConfigError(f"{path}: unknown setting {key!r}; known: {', '.join(items)}")
        if isinstance(value, bool) and items[name].metadata["words"]:
            value = _to_text(value)
        settings[name] = _from_text(items[name], value) if isinstance(value, str) else value
        if isinstance(items[name].default, float) and type(settings[name]) is int:
            with contextlib.suppress(OverflowError):  # out of any range: refused as it stands
                settings[name] = float(settings[name])
    return settings
