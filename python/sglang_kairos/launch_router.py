"""``python -m sglang_kairos.launch_router``: the PD router. Upstream's flags, and Kairos' own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang_kairos.config import ConfigError, KairosConfig, add_flags
from sglang_kairos.router.app import create_app
from sglang_kairos.router.arguments import build_parser
from sglang_kairos.router.options import OptionError, parse_options
from sglang_kairos.router.serve import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; 2 when the command line cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        parser = build_parser()
        add_flags(parser)
        parser.print_help()
        return 0
    try:
        config, rest = KairosConfig.load(words)
        options = parse_options(rest)
        return serve(create_app(options, config))
    except (ConfigError, OptionError) as error:
        print(f"sglang_kairos.launch_router: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
