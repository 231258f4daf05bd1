"""Measure the step times of a running server, or of kernels alone.

    kairos calibrate --url http://HOST:PORT --out step_times.json        a server: under a minute
    kairos calibrate --kernels --heads 32 --kv-heads 8 --head-dim 128    FlashInfer's paged kernels

The first form writes the file that ``--kairos-latency-model`` reads; give it to the server at its
next start. For a pair, measure the prefill and the decode server into the same file: each adds its
part. The decode server must accept made-up KV, as it does for bootstrap host 2.2.2.2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_kairos.calibrate import kernels
from sglang_kairos.calibrate.fit import Fit, entry, fit_decode, fit_prefill
from sglang_kairos.calibrate.server import MeasuredServer, Measurement, ProfileFailed, key_of
from sglang_kairos.commands import parser_of
from sglang_kairos.predict.learnt_file import load_profile
from sglang_kairos.predict.shipped_models import ProfileError, Seed, dump, parse


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos calibrate``."""
    parser = parser_of("calibrate", description=__doc__)
    parser.add_argument("--url", help="a running server: prefill, decode or unified")
    parser.add_argument("--out", type=Path, help="file to write (JSON); an old one is completed")
    parser.add_argument("--budget-s", type=float, default=50.0, help="seconds to measure (50)")
    parser.add_argument("--api-key", default="", help="sent as bearer token")
    parser.add_argument("--gpu", default="", help="GPU name, for a server without Kairos")
    parser.add_argument("--rows", type=Path, help="also write the measured rows here (JSON)")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 1000, help="seed of the prompts"
    )
    kernels.add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures. Returns 0, 1 when nothing could be measured, 2 for a bad command line."""
    parser = build_parser()
    given = parser.parse_args(argv)
    if given.kernels:
        return kernels.main(given)
    if not given.url or given.out is None:
        parser.error("--url and --out are needed (or --kernels)")
    if not given.budget_s >= 5:
        parser.error(f"--budget-s: must be at least 5, got {given.budget_s:g}")
    try:
        return profile_url(given, lambda line: print(line, flush=True))
    except (ProfileFailed, ProfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def profile_url(given: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Measures a server, fits a latency model, writes it and reports. Returns the exit status."""
    headers = {"Authorization": f"Bearer {given.api_key}"} if given.api_key else {}
    server = MeasuredServer(given.url.rstrip("/"), headers)
    report = server.refresh()
    key = key_of(server, report, given.gpu)
    old = load_profile(given.out, key)  # before measuring, so that an unusable file is reported now
    captured = report.get("captured_sizes") or None
    say(f"{server.mode if server.mode != 'null' else 'unified'} server of {key.model} on {key.gpu}")
    measuring = Measurement(server, given.budget_s, say, given.seed)
    both = server.mode == "null"
    prefill_rows = (
        [] if server.mode == "decode" else measuring.prefill(0.5 * given.budget_s if both else 0.0)
    )
    decode_rows = [] if server.mode == "prefill" else measuring.decode()
    prefill, decode = fit_prefill(prefill_rows), fit_decode(decode_rows, captured)
    if prefill is None and decode is None:
        found = f"{len(prefill_rows)} prefill and {len(decode_rows)} decode cells"
        raise ProfileFailed(f"only {found} in {given.budget_s:g} s: too few; raise --budget-s")
    if server.mode != "decode":
        _tell("prefill", prefill, len(prefill_rows), say)
    if server.mode != "prefill":
        _tell("decode", decode, len(decode_rows), say)
    if given.rows:
        rows = {"prefill": prefill_rows, "decode": decode_rows, "source": measuring.source}
        given.rows.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    provenance = (
        f"kairos calibrate, {measuring.source}, {len(prefill_rows)} prefill and "
        f"{len(decode_rows)} decode cells, SGLang {server.info.get('version', '?')}"
    )
    fresh = entry(key, prefill, decode, provenance=provenance, old=old)
    others = _others(given.out, fresh)
    partial = given.out.with_name(f".{given.out.name}.{os.getpid()}")
    partial.write_text(dump([*others, fresh]), encoding="utf-8")
    partial.replace(given.out)
    say(f"wrote {given.out}; start the server with --kairos-latency-model {given.out}")
    return 0


def _others(path: Path, mine: Seed) -> list[Seed]:
    if not path.exists():
        return []

    def named(seed: Seed) -> tuple[str, str, int, str]:
        return seed.model, seed.gpu, seed.tp, seed.backends

    return [seed for seed in parse(path.read_bytes(), str(path)) if named(seed) != named(mine)]


def _tell(what: str, fit: Fit | None, rows: int, say: Callable[[str], None]) -> None:
    if fit is None:
        say(f"{what}: only {rows} cells, too few, left out; raise --budget-s")
        return
    error = fit.held_out_error
    off = "no cells held out" if error is None else f"{100 * error:.1f} % off on held-out cells"
    say(f"{what}: {fit.rows} cells, {off}")


if __name__ == "__main__":
    sys.exit(main())
