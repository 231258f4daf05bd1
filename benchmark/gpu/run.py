"""Stock SGLang and Kairos in alternation on one GPU: decode alone, prefill alone, a pair, identity.

    python -m benchmark.gpu.run --parts decode,prefill,pd        # on a GPU machine, under ten minutes
    python -m benchmark.gpu.run --dry-run                        # the same scripts, CPU, tiny model

The model is an 8B shape with made-up weights. In each part both systems stay up side by side, and
only one of them is loaded at a time. They take turns, the order reversed from round to round. Decode
alone takes made-up KV; prefill alone sends its KV nowhere (bootstrap host 2.2.2.2). Writes
``report.json`` (runs as in the demo's) and ``report.md`` under ``--out`` after every step, so a run
that is cut off leaves what it had. Without a GPU and without --dry-run it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark.gpu import parts
from benchmark.gpu.report_gpu import markdown
from benchmark.gpu.session import GpuSession
from benchmark.gpu.shape import SHAPES
from benchmark.harness import arguments
from benchmark.harness.servers import narrator
from sglang_kairos.cluster.run import ClusterError, quiet_zygote
from sglang_kairos.cpu import runtime as cpu_runtime
from sglang_kairos.reports import report

PARTS = ("decode", "prefill", "pd", "identity")
# The least that a part needs to be worth starting: its servers come up and each runs once.
LEAST_S = {"decode": 150.0, "prefill": 120.0, "pd": 120.0, "identity": 120.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all that was started was measured, or nothing could be (no GPU)."""
    given = parse(argv)
    on_cpu = cpu_runtime.decide().active
    if on_cpu and not given.dry_run:
        print("skipped: this machine has no GPU; --dry-run checks the scripts on the CPU")
        return 0
    if given.dry_run and not on_cpu:
        print("skipped: --dry-run is for machines without a GPU; leave it out here")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    with ExitStack() as stack:
        zygote = None
        if given.dry_run:
            zygote = stack.enter_context(quiet_zygote(given.out / "zygote.log"))
        session = GpuSession(given, zygote, save)
        for name in given.parts:
            session.say = narrator(f"[{name}]")
            if not given.dry_run and session.left_s() < LEAST_S[name]:
                session.skipped[name] = f"{session.left_s():.0f} s of the budget left"
                session.say(f"skipped: {session.skipped[name]}")
                continue
            begun = time.monotonic()
            try:
                parts.RUN[name](session)
            except (ClusterError, OSError) as error:
                failures.append(name)
                session.skipped[name] = str(error).partition("\n")[0]
                print(f"error: {name}: {error}", file=sys.stderr)
            session.took_s[name] = round(time.monotonic() - begun, 1)
            save(session)
    print("\n" + (given.out / "report.md").read_text(encoding="utf-8"))
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.gpu.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", default="decode,prefill,pd", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--identity", action="store_true", help="add the part identity")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, some seconds")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--budget-s", type=float, default=540.0, help="of the whole command")
    parser.add_argument("--load-s", type=float, default=0.0, help="seconds of arrivals per run")
    parser.add_argument("--load", type=float, default=1.2, help="share of the capacity found")
    parser.add_argument("--rounds", type=int, help="turns of each system (2; dry run: 1)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--tpot-ms", type=float, default=0.0, help="default: from the step time")
    parser.add_argument("--kv-tokens", type=int, default=100_000, help="KV of each server")
    parser.add_argument("--pd-layers", type=int, default=8, help="layers of the pair's model")
    parser.add_argument("--transfer", default="nixl", help="KV transfer between prefill and decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    given = parser.parse_args(argv)
    given.parts = arguments.chosen(parser, "parts", given.parts, PARTS)
    given.parts += ["identity"] if given.identity else []
    if given.rounds is None:
        given.rounds = 1 if given.dry_run else 2
    if given.dry_run:
        given.load_s, given.kv_tokens = given.load_s or 2.0, min(given.kv_tokens, 30_000)
    given.load_s = given.load_s or 20.0
    names = ("budget_s", "load_s", "load", "rounds", "ttft_ms", "kv_tokens", "pd_layers")
    arguments.positive(parser, given, names)
    return given


def save(session: GpuSession) -> None:
    """Writes report.json and report.md of what there is."""
    given = session.given
    asked = ("parts", "rounds", "load", "kv_tokens", "ttft_ms", "seed")
    setup = {
        "platform": session.platform(),
        "shape": "tiny" if given.dry_run else given.shape,
        **{name: getattr(given, name) for name in asked},
        "skipped": session.skipped,
        "took_s": session.took_s,
        "steady": session.steady,
        "identity": session.identity,
    }
    report.write_json(given.out / "report.json", session.runs, setup)
    data: dict[str, Any] = json.loads((given.out / "report.json").read_text(encoding="utf-8"))
    (given.out / "report.md").write_text(markdown(data), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
