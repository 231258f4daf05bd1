"""Switches the CPU runtime on or off: ``kairos cpu install|uninstall|status``."""

from __future__ import annotations

import argparse
import sys

from sglang_kairos.commands import parser_of
from sglang_kairos.cpu import site


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos cpu``."""
    parser = parser_of("cpu")
    parser.add_argument("command", choices=("install", "uninstall", "status"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status."""
    command = build_parser().parse_args(argv).command
    if command == "install":
        site.install()
    elif command == "uninstall":
        site.uninstall()
    print(site.status())
    return 0


if __name__ == "__main__":
    sys.exit(main())
