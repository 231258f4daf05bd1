"""The table of ``kairos``' commands, and the argument parser that they share.

`cli` runs them. Here is what each command's own ``--help`` needs, so this imports none of them.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple, TypeVar, overload


class Command(NamedTuple):
    """What runs: ``main(argv)`` of `module`, with the words `first` before the user's.

    `as_main`: as ``python -m`` runs it. `as_module`: its help says that form as well.
    """

    module: str
    help: str
    example: str
    first: tuple[str, ...] = ()
    as_main: bool = False
    as_module: bool = False


# The spawned children of a server import its main module again: they need the launcher to be that.
COMMANDS = {
    "serve": Command(
        "sglang_kairos.launch_server",
        "serve a model: SGLang's server with Kairos on",
        "--model-path Qwen/Qwen3-8B --disaggregation-mode prefill --kairos-ttft-ms 500",
        as_main=True,
        as_module=True,
    ),
    "router": Command(
        "sglang_kairos.launch_router",
        "route requests to prefill and decode servers",
        "--pd-disaggregation --prefill http://P:30000 8998 --decode http://D:30000 --port 8000",
        as_module=True,
    ),
    "pd": Command(
        "sglang_kairos.launch_pd",
        "start prefill servers, decode servers and a router on this machine",
        '--prefill 2 --decode 1 --port 8000 --tp 2 --decode-args "--max-running-requests 256"',
        as_module=True,
    ),
    "doctor": Command(
        "sglang_kairos.versions.doctor", "check whether Kairos starts with this SGLang", ""
    ),
    "calibrate": Command(
        "sglang_kairos.calibrate.cli",
        "measure a server's step times for --kairos-latency-model",
        "--url http://127.0.0.1:30000 --out step_times.json",
    ),
    "replay": Command(
        "sglang_kairos.loads.replay",
        "send a trace to a server or router, and measure",
        "--url http://127.0.0.1:8000 --requests 200 --rate 4 --out kairos.jsonl",
    ),
    "report": Command(
        "sglang_kairos.reports.report",
        "compare runs, from the files of a load generator",
        "fcfs.jsonl kairos.jsonl --png runs.png",
    ),
    "traces": Command(
        "sglang_kairos.loads.describe",
        "say what is in a trace: format, rate, lengths",
        "mooncake_conversation.jsonl",
    ),
    "sim": Command(
        "sglang_kairos.sim.__main__",
        "simulate scheduling policies on a cluster",
        "--generate 1000 --rate 2,3 --slo 2000:100 --policies kairos,fcfs",
    ),
    "plan": Command(
        "sglang_kairos.sim.__main__",
        "find how many servers a load needs",
        "--generate 1000 --rate 10 --slo 1000:50 --attain 0.9",
        first=("plan",),
    ),
    "patch": Command(
        "sglang_kairos.versions.patch",
        "apply the hooks to an SGLang tree as patches, or take them back",
        "apply --tree ~/src/sglang",
    ),
    "port": Command(
        "sglang_kairos.versions.port",
        "add an SGLang version to those that Kairos knows",
        "0.5.24 --dry-run",
    ),
    "sglang": Command(
        "sglang_kairos.other_sglang",
        "install another SGLang version beside the present one",
        "0.5.19",
    ),
    "cpu": Command(
        "sglang_kairos.cpu.__main__", "let SGLang run without a GPU in this environment", "install"
    ),
    "tiny-model": Command(
        "sglang_kairos.cpu.tiny_model", "make a tiny random model to serve without a GPU", "TINY"
    ),
    "completion": Command(
        "sglang_kairos.completion",
        "print a script that completes these commands in a shell",
        "bash > ~/.local/share/bash-completion/completions/kairos",
    ),
}


class ExampleFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves description and example as they are written."""


P = TypeVar("P", bound=argparse.ArgumentParser)


@overload
def parser_of(name: str, **settings: Any) -> argparse.ArgumentParser: ...
@overload
def parser_of(name: str, kind: type[P], **settings: Any) -> P: ...
def parser_of(
    name: str, kind: type[argparse.ArgumentParser] = argparse.ArgumentParser, **settings: Any
) -> argparse.ArgumentParser:
    """A parser for ``kairos NAME``. Its help is `Command.help` and ends with an example.

    `kind`: the parser's class. `settings`: those of that class.
    """
    command = COMMANDS[name]
    same = f"\n\nThe same: python -m {command.module} …" if command.as_module else ""
    ours: dict[str, Any] = {
        "prog": f"kairos {name}",
        "description": command.help[:1].upper() + command.help[1:] + ".",
        "epilog": f"example:\n  {command_line(name)}{same}",
        "formatter_class": ExampleFormatter,
    }
    if command.as_module:  # of some hundred flags the list below says more
        ours["usage"] = f"kairos {name} [FLAG …]"
    return kind(**{**ours, **settings})


def command_line(name: str) -> str:
    """A command line of ``kairos NAME`` that works."""
    return f"kairos {name} {COMMANDS[name].example}".rstrip()
