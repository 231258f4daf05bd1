"""``kairos router``, also ``python -m sglang_kairos.launch_router``: the PD router."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sglang_kairos.config import ConfigError, KairosConfig, add_flags
from sglang_kairos.router import arguments
from sglang_kairos.router.app import create_app
from sglang_kairos.router.options import parse_options
from sglang_kairos.router.serve import serve
from sglang_kairos.settings import SettingsParser, file_named, settings_in


def build_parser() -> SettingsParser:
    """The router's flags and Kairos' own, for ``--help``."""
    parser = arguments.build_parser()
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped. Returns 2 when a setting cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        build_parser().print_help()
        return 0
    try:
        config, rest = KairosConfig.load(words)
        path = file_named(words, os.environ)
        options = parse_options(rest, os.environ, settings_in(path, "router"), f"{path}: router")
        return serve(create_app(options, config))
    except ConfigError as error:
        print(f"kairos router: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
