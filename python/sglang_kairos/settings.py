"""One scheme of settings for servers and router: flag, environment variable and file mean the same.

The nearest wins: flag, then environment, then the file of ``--kairos-config`` (JSON or TOML), then
the default. A flag is declared once, on a `SettingsParser`; its `type` is one of the kinds below.
The kinds take text (flag, environment) and the values of a file alike, and say limits alike:
``--port: must be a whole number between 0 and 65535, got 70000``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kairos import names

logger = logging.getLogger("sglang_kairos")

FILE_FLAG, FILE_ENV = "--kairos-config", "KAIROS_CONFIG"
TABLES = ("router",)
"""Tables of the file that are other programs' settings."""

_SWITCH = dict.fromkeys(("on", "true", "1", "yes"), True)
_SWITCH |= dict.fromkeys(("off", "false", "0", "no"), False)
# Kubernetes sets NAME_PORT=tcp://… for each service of a namespace.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the flag, what is accepted and the value."""


def switch(value: object) -> bool:
    """On or off. Raises ArgumentTypeError, as every kind does."""
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, bool):
        return word
    if isinstance(word, str) and word in _SWITCH:
        return _SWITCH[word]
    raise ArgumentTypeError(f"must be on or off, got {shown(value)}")


def text(value: object) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise ArgumentTypeError(f"must be text, got {shown(value)}")
    return value


def readable_file(value: object) -> str:
    """The path of a file that can be read; empty for none."""
    path = text(value)
    if path and not os.access(path, os.R_OK):
        raise ArgumentTypeError(f"cannot be read: {path}")
    return path


@dataclass(frozen=True)
class Number:
    """A number in a range, ends included."""

    low: float
    high: float
    whole: bool = False

    def __call__(self, value: object) -> float | int:
        what = "a whole number" if self.whole else "a number"
        if isinstance(value, str):
            try:
                value = int(value) if self.whole else float(value)
            except ValueError:
                raise ArgumentTypeError(f"must be {what}, got {shown(value)}") from None
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not self._holds(value):
            wanted = f"{what} between" if self.whole else "between"
            limits = f"{plain(self.low)} and {plain(self.high)}"
            raise ArgumentTypeError(f"must be {wanted} {limits}, got {shown(value)}")
        return value if self.whole else float(value)

    def _holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class OneOf:
    """One of some words, whatever their case. `others`: further spellings, each with its meaning."""

    words: tuple[str, ...]
    others: tuple[tuple[str, str], ...] = ()

    def __call__(self, value: object) -> str:
        word = ("on" if value else "off") if isinstance(value, bool) else value
        if isinstance(word, str):
            word = word.strip().lower()
            if "on" in self.words and word in _SWITCH:
                word = "on" if _SWITCH[word] else "off"
            word = dict(self.others).get(word, word)
        if word not in self.words:
            raise self.refuse(value)
        return str(word)

    def refuse(self, value: object) -> ArgumentTypeError:
        """What to raise for a value that is none of the words."""
        known = (
            " or ".join(self.words) if len(self.words) < 4 else f"one of {', '.join(self.words)}"
        )
        return ArgumentTypeError(f"must be {known}, got {shown(value)}")


class SettingsParser(argparse.ArgumentParser):
    """A parser whose flags are environment variables and keys of a file as well.

    ``--port`` is ``KAIROS_ROUTER_PORT`` for the prefix ``kairos-router-``. A flag that begins with the
    prefix already keeps its name. Raises `refusal` where `argparse` would end the process.
    """

    def __init__(
        self,
        *args: Any,
        prefix: str = "kairos-",
        refusal: type[ConfigError] = ConfigError,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})
        self.prefix, self.refusal = prefix, refusal

    def error(self, message: str) -> Any:
        """The same text as for the environment and the file."""
        raise self.refusal(re.sub(r"^argument ([^/:]+)(?:/[^:]+)?: ", r"\1: ", message))

    def settings(self) -> Iterator[argparse.Action]:
        """Every flag that is a setting: those that ``--help`` shows."""
        for action in self._actions:
            hidden = action.help == argparse.SUPPRESS or action.dest == "help"
            if action.option_strings and not hidden and FILE_FLAG not in action.option_strings:
                yield action

    def env_of(self, action: argparse.Action) -> str:
        """The environment variable of a flag."""
        return variable(self.prefix, action.option_strings[0])

    def load(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        file: Mapping[str, Any] | None = None,
        where: str = "",
    ) -> tuple[argparse.Namespace, list[str]]:
        """Every setting, from the nearest of the four places, and the words that are no flags of this.

        `file`: what the file holds for this program, `where`: its path and table, for errors.
        Raises `refusal`.
        """
        unset = argparse.Namespace(**dict.fromkeys(action.dest for action in self._actions))
        given, rest = self.parse_known_args(names.with_new_words(list(argv)), unset)
        env = names.with_new_keys("environment", env)
        by_key = self._by_key(names.with_new_keys("file key", file or {}, f"{where}: "), where)
        for action in self.settings():
            if getattr(given, action.dest) is not None:
                continue
            variable_name = self.env_of(action)
            if variable_name in env and not _of_kubernetes(variable_name, env[variable_name]):
                value = self._read(action, env[variable_name], variable_name)
            elif action.dest in by_key:
                value = self._read(action, by_key[action.dest], where)
            else:
                value = action.default
            setattr(given, action.dest, value)
        return given, rest

    def _by_key(self, file: Mapping[str, Any], where: str) -> dict[str, Any]:
        known = {}
        for action in self.settings():
            for name in (*action.option_strings, action.dest):
                known[key_of(self.prefix, name)] = action.dest
        found = {}
        for key, value in file.items():
            if (name := key_of(self.prefix, key)) not in known:
                raise self.refusal(f"{where}: unknown setting {key!r}; known: {self._keys()}")
            found[known[name]] = value
        return found

    def _keys(self) -> str:
        return ", ".join(key_of(self.prefix, each.option_strings[0]) for each in self.settings())

    def _read(self, action: argparse.Action, value: object, where: str) -> Any:
        """The value of a flag from the environment or a file."""
        kind: Any = action.type or text
        several = action.nargs in ("*", "+")
        try:
            if action.nargs == 0:
                return action.const if switch(value) else action.default
            if not isinstance(action, argparse._AppendAction):
                return [kind(_text(word)) for word in _words(value)] if several else kind(value)
            rows = value.split(",") if isinstance(value, str) else _words(value)
            return [[kind(_text(w)) for w in _words(row)] if several else kind(row) for row in rows]
        except ArgumentTypeError as error:
            raise self.refusal(f"{action.option_strings[0]} ({where}): {error}") from None


def variable(prefix: str, flag: str) -> str:
    """``KAIROS_ROUTER_PORT`` for the prefix ``kairos-router-`` and the flag ``--port``."""
    name = flag.lstrip("-")
    name = name if f"{name}-".startswith(prefix) else prefix + name
    return name.replace("-", "_").upper()


def key_of(prefix: str, name: str) -> str:
    """One spelling for ``--kairos-ttft-ms``, ``kairos_ttft_ms`` and ``ttft-ms``."""
    return name.lstrip("-").replace("-", "_").removeprefix(prefix.replace("-", "_"))


def file_named(argv: Sequence[str], env: Mapping[str, str]) -> str:
    """The path that ``--kairos-config`` or its variable names; empty for none. Raises ConfigError."""
    parser = SettingsParser(add_help=False)
    add_file_flag(parser)
    given, _ = parser.parse_known_args(list(argv))
    return str(given.kairos_config or env.get(FILE_ENV, ""))


def add_file_flag(parser: argparse._ActionsContainer) -> None:
    """Add ``--kairos-config``."""
    parser.add_argument(FILE_FLAG, metavar="FILE", help="JSON or TOML file of these settings")


def settings_in(path: str, table: str = "") -> dict[str, Any]:
    """What a file holds for servers, or in one of `TABLES`; {} for no path. Raises ConfigError."""
    if not path:
        return {}
    found = read_mapping(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be an object of setting -> value")
    if not table:
        return {key: value for key, value in found.items() if key not in TABLES}
    inner = found.get(table, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"{path}: {table}: must be an object of setting -> value")
    return inner


def read_mapping(path: str) -> Any:
    """Content of a JSON or TOML file. Raises ConfigError."""
    try:
        data = Path(path).read_bytes()
        return tomllib.loads(data.decode()) if path.endswith(".toml") else json.loads(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON or TOML: {error}") from None


def shown(value: object) -> str:
    """A refused value for an error text, cut short."""
    if isinstance(value, int) and abs(value) > 10**18:
        return "a number too large"
    written = repr(value)
    return written if len(written) <= 80 else written[:77] + "..."


def plain(number: float) -> str:
    """A limit for an error text: without an exponent where it is whole."""
    return str(int(number)) if float(number).is_integer() else f"{number:g}"


def _words(value: object) -> list[Any]:
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(word: object) -> object:
    """Ports in a file are numbers; among the words of a flag they are text."""
    return str(word) if isinstance(word, int | float) and not isinstance(word, bool) else word


def _of_kubernetes(name: str, value: str) -> bool:
    if not name.endswith("_PORT") or not _SERVICE_LINK.match(value):
        return False
    logger.info("%s=%s is Kubernetes' name for a service, no setting", name, value)
    return True
