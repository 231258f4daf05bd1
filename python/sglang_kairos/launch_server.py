"""``kairos serve``, also ``python -m sglang_kairos.launch_server``: SGLang's server with Kairos on.

Takes every flag of ``sglang.launch_server`` unchanged, and Kairos' own (``--help`` shows both).
On a machine without a GPU it adds the flags that SGLang needs there, with one it prefers FlashInfer
(see `gpu_flags`), unless they were given.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from sglang_kairos.commands import parser_of
from sglang_kairos.config import ConfigError, KairosConfig, add_flags
from sglang_kairos.cpu import runtime
from sglang_kairos.cpu.flags import with_server_flags
from sglang_kairos.engine.installed import check_loadable
from sglang_kairos.gpu_flags import with_gpu_flags
from sglang_kairos.other_sglang import NoSuchSglang, importable_version

DESCRIPTION = """\
Start SGLang's server with Kairos on. It takes every flag of sglang.launch_server unchanged.
Without a GPU it adds the flags that SGLang needs there; with one it prefers FlashInfer.
"""

# Children started with ``spawn`` re-import this module before SGLang: they need the runtime first.
runtime.activate_if_wanted()


def prepare(argv: Sequence[str]) -> list[str]:
    """Set this process up for Kairos and return SGLang's own arguments.

    Writes the configuration into the environment, where SGLang's child processes find it.
    Raises ConfigError for a bad Kairos setting or when SGLang could not load the plugin.
    """
    config, rest = KairosConfig.load(argv)
    config.slo_table()
    if config.enabled:
        check_loadable()
    config.to_env(os.environ)
    if runtime.is_active():
        # A source tree may not say its version: the newest version's flags then.
        try:
            found = importable_version()
        except NoSuchSglang as error:
            raise ConfigError(str(error)) from None
        return with_server_flags(rest, version=found) if found else with_server_flags(rest)
    if not config.enabled or not runtime.cuda_present():
        return rest
    return with_gpu_flags(rest, flashinfer=find_spec("flashinfer") is not None)


def build_parser() -> argparse.ArgumentParser:
    """Kairos' flags, then SGLang's, for ``--help``. Imports SGLang."""
    parser = parser_of("serve", description=DESCRIPTION, add_help=False)
    add_flags(parser)
    from sglang.srt.server_args import ServerArgs

    ServerArgs.add_cli_args(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Start one server; returns the process' exit status."""
    if "--help" in argv or "-h" in argv:
        build_parser().print_help()
        return 0
    try:
        arguments = prepare(argv)
    except ConfigError as error:
        print(f"kairos serve: {error}", file=sys.stderr)
        return 2
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(arguments)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
