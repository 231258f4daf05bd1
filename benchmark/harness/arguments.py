"""Command lines of benchmarks: options that several have, and checks that name the flag."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

# Help, and the type of the value.
OPTIONS: dict[str, tuple[str, Any]] = {
    "policies": ("comma separated (default: %(default)s)", str),
    "loads": ("shares of the capacity, comma separated (default: %(default)s)", str),
    "repeat": ("rounds; the order of policies is reversed from one to the next", int),
    "load_s": ("seconds of arrivals per run (default: %(default)s)", float),
    "rate": ("requests/s (default: measured)", float),
    "utilisation": ("share of the measured prefill capacity (default: %(default)s)", float),
    "ttft_ms": ("TTFT target (default: %(default)s)", float),
    "tpot_ms": ("TPOT target (default: %(default)s)", float),
    "seed": ("seed of the trace", int),
    "requests": ("how many (default: --load-s worth of them)", int),
    "trace": ("instead of our own (docs/simulator.md)", Path),
    "model_path": ("default: a tiny random model (CPU only)", str),
    "json": ("also write the figures there", Path),
    "markdown": ("also write the tables there", Path),
    "out": ("folder of logs and requests (default: %(default)s)", Path),
}
# What the harness reads and not every experiment lets one choose.
UNASKED: dict[str, Any] = {
    **dict.fromkeys(("trace", "block_tokens", "time_unit", "requests", "rate", "json", "start")),
    "utilisation": 0.87,
    "tpot_ms": 75.0,
    "router": "kairos",
    "launcher": "sglang_kairos.launch_server",
    "model_path": "",
}


def parser_for(module: str, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser with the `OPTIONS` that are named, at these defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(**UNASKED)
    for name, value in defaults.items():
        text, kind = OPTIONS[name]
        text = text.partition(" (default: %")[0] if value is None else text
        parser.add_argument(flag(name), type=kind, default=value, help=text)
    return parser


def add_start(parser: argparse.ArgumentParser) -> None:
    """Adds ``--start``."""
    text = "fork servers from one process that has imported SGLang, or start each anew"
    parser.add_argument("--start", choices=("fork", "spawn"), help=text)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def chosen(
    parser: argparse.ArgumentParser,
    name: str,
    text: str,
    known: Collection[str],
    whose: str = "known",
) -> list[str]:
    """Returns the names of a list with commas; ends in `parser.error` for one that is not known."""
    names = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in names if word not in known]
    if unknown or not names:
        bad = ", ".join(map(repr, unknown)) or "none given"
        parser.error(f"{flag(name)}: {bad}; {whose}: {', '.join(known)}")
    return names


def numbers(parser: argparse.ArgumentParser, name: str, text: str) -> list[float]:
    """Returns the numbers of a list with commas; ends in `parser.error` if one is not positive."""
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        parser.error(f"{flag(name)}: must be numbers, got {text!r}")
    if not all(value > 0 for value in values):
        parser.error(f"{flag(name)}: must be positive, got {text!r}")
    return values


def positive(
    parser: argparse.ArgumentParser, given: argparse.Namespace, names: Sequence[str]
) -> None:
    """Ends in `parser.error` for the first of these options that is given and not positive."""
    for name in names:
        value = getattr(given, name)
        if value is not None and not value > 0:
            parser.error(f"{flag(name)}: must be positive, got {value}")
