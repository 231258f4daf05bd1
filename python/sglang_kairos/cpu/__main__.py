"""Switches the CPU runtime on or off: ``python -m sglang_kairos.cpu install|uninstall|status``."""

from __future__ import annotations

import argparse
import sys

from sglang_kairos.cpu import site


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kairos.cpu",
        description="Let every Python process of this environment run SGLang without a GPU.",
    )
    parser.add_argument("command", choices=("install", "uninstall", "status"))
    command = parser.parse_args(argv).command
    if command == "install":
        site.install()
    elif command == "uninstall":
        site.uninstall()
    print(site.status())
    return 0


if __name__ == "__main__":
    sys.exit(main())
