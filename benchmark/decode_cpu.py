"""Decode under load: stock SGLang and Kairos in turn, real servers, no GPU needed.

    python -m benchmark.decode_cpu                      # prefill and decode server
    python -m benchmark.decode_cpu --mode decode        # decode server alone, KV not transferred

The first cluster, stock's, is measured: with 8, 16, 32 … requests kept abreast, at how many does the
TPOT that clients see reach the target? Hence the capacity in requests per second, as far as step
times limit it; with ``--kv-tokens`` the decode server's memory is the limit instead. Each load of the
grid is a share of it; every policy is warmed up alike and sent the same long-tailed trace, open
loop. Policies: stock (fcfs prefill, every running request in every step), kairos, kairos-no-park (the
same prefill, stock decode) and kairos-no-breaker (parks however badly steps are predicted).
Writes one row per run (`tools.report.Run.row()` with mode, load, repeat and targets) to
``rows.json`` and one JSON line per request under ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import demo
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.cpu.tiny_model import TinyModel, make_tiny_model
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result, failures, make_jobs, replay, run
from sglang_kairos.reports import report

POLICIES: dict[str, tuple[bool | Mapping[str, Any], str]] = {
    "stock": (False, "fcfs"),
    "kairos": (True, ""),
    "kairos-no-park": ({"park": False}, ""),
    "kairos-no-breaker": ({"max_step_error": 100.0}, ""),
}
# With the pair, contexts are short and outputs long enough for a CPU's prefill to keep up with what
# makes its decode miss; where nothing is prefilled, contexts make most of a step.
BY_MODE: dict[str, dict[str, Any]] = {
    "pd": {"median_input": 100.0, "max_input": 3000, "median_output": 120.0, "tpots_ms": "50"},
    "decode": {"median_input": 500.0, "max_input": 8000, "median_output": 48.0, "tpots_ms": "100"},
}
MAX_OUTPUT = 300
# Deep enough for steps, not the streaming of tokens by the HTTP server beside it, to be the limit.
LAYERS = 6
ABREAST = (8, 16, 32, 64, 128)
REHEARSED, WARM_ABREAST = 60, 24
# A request with this bootstrap host gets made-up KV at once (SGLang's fake transfer).
FAKE_TRANSFER = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
TIMEOUT_S = 180.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the grid; returns the exit status."""
    given = parse(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        if not given.model_path:
            model = make_tiny_model(given.out / "model", TinyModel(layers=LAYERS))
            given.model_path = str(model)
        with demo.start_method(given) as zygote:
            runs = run_grid(given, zygote)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = markdown(runs)
    print(f"\n{demo.platform()}, {given.mode}\n\n{text}")
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\nwrote {given.out / 'rows.json'} and table.md")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with lists as lists."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.decode_cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--policies", default="stock,kairos", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--mode", choices=("pd", "decode"), default="pd")
    parser.add_argument("--loads", default="0.5,1,1.3,1.5,2", help="shares of the capacity")
    parser.add_argument("--tpots-ms", help="TPOT targets, comma separated (default: by mode)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--capacity", type=float, help="requests/s (default: measured, per TPOT)")
    parser.add_argument("--load-s", type=float, default=45.0, help="seconds of arrivals per run")
    parser.add_argument("--median-input", type=float, help="tokens (default: by mode)")
    parser.add_argument("--max-input", type=int, help="tokens (default: by mode)")
    parser.add_argument("--median-output", type=float, help="tokens (default: by mode)")
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=demo.KV_TOKENS,
        help="of the decode server (default: %(default)s)",
    )
    parser.add_argument("--repeat", type=int, default=1, help="rounds, order reversed in between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/decode_cpu"))
    parser.add_argument(
        "--model-path", default="", help=f"default: a random model of {LAYERS} layers (CPU only)"
    )
    parser.add_argument("--start", choices=("fork", "spawn"), default="fork")
    given = parser.parse_args(argv)
    given.router = "kairos" if given.mode == "pd" else "none"
    given.launcher = "sglang_kairos.launch_server"
    for name, value in BY_MODE[given.mode].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.policies = given.policies.split(",")
    for name in given.policies:
        if name not in POLICIES:
            parser.error(f"--policies: {name!r}; known: {', '.join(POLICIES)}")
    for name in ("loads", "tpots_ms"):
        setattr(given, name, positive_numbers(parser, name, getattr(given, name)))
    for name in (
        "ttft_ms",
        "load_s",
        "repeat",
        "capacity",
        "median_input",
        "max_input",
        "median_output",
        "kv_tokens",
    ):
        value = getattr(given, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: must be positive, got {value}")
    longest = given.max_input + MAX_OUTPUT
    if given.kv_tokens < longest:
        parser.error(f"--kv-tokens: the longest request needs {longest}, got {given.kv_tokens}")
    return given


def positive_numbers(parser: argparse.ArgumentParser, name: str, text: str) -> list[float]:
    """The numbers of a list with commas; ends in `parser.error`, naming the flag, if they are none."""
    flag = "--" + name.replace("_", "-")
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        parser.error(f"{flag}: must be numbers, got {text!r}")
    if not all(value > 0 for value in values):
        parser.error(f"{flag}: must be positive, got {text!r}")
    return values


def run_grid(given: argparse.Namespace, zygote: Any) -> list[report.Run]:
    """Every TPOT target, load, repeat and policy; the rows are rewritten after each run."""
    runs: list[report.Run] = []
    cells = [
        (tpot, load, turn, policy)
        for tpot in given.tpots_ms
        for load in given.loads
        for turn in range(given.repeat)
        for policy in given.policies[:: -1 if turn % 2 else 1]
    ]
    seen = None if given.capacity else tpot_by_abreast(given, zygote)
    for number, (tpot, load, turn, policy) in enumerate(cells, start=1):
        say = demo.narrator(f"[{number}/{len(cells)} {policy} load {load:g} TPOT {tpot:g} ms]")
        capacity = given.capacity or capacity_of(seen or {}, sample(1000, given.seed, given), tpot)
        rate = load * capacity
        rows = sample(max(2, round(rate * given.load_s)), given.seed + turn, given)
        plan = demo.Plan(traces.scale_rate(rows, rate), given.ttft_ms, tpot, given.seed, None)
        with Cluster(spec_for(policy, given, zygote, number, given.kv_tokens)) as cluster:
            prepare(cluster, given)
            result = drive(cluster, given, plan.rows, given.ttft_ms, tpot)
            facts = demo.kairos_reports(cluster)
        for line in failures(result.outcomes):
            say(f"failed: {line}")
        say(demo.summary(result))
        facts = {
            "mode": given.mode,
            "load": load,
            "rate_rps": round(rate, 3),
            "capacity_rps": round(capacity, 3),
            "kv_tokens": given.kv_tokens,
            "repeat": turn,
            "slo": {"ttft_ms": given.ttft_ms, "tpot_ms": tpot},
            "platform": demo.platform(),
            **silences_ms(result),
            "window_tokens_per_s": round(window_tokens_per_s(result, plan.rows[-1].arrival_s), 1),
            **facts,
        }
        runs.append(report.Run(policy, result, facts))
        result.dump(given.out / f"{number}-{policy}.jsonl")
        text = json.dumps([one.row() for one in runs], indent=1)
        (given.out / "rows.json").write_text(text + "\n", encoding="utf-8")
    return runs


def sample(count: int, seed: int, given: argparse.Namespace) -> list[traces.Request]:
    """The trace, at any rate: a long tail of contexts and of outputs."""
    return traces.long_tail(
        count,
        1.0,
        seed,
        median_input=given.median_input,
        max_input=given.max_input,
        median_output=given.median_output,
        max_output=MAX_OUTPUT,
    )


def spec_for(
    policy: str, given: argparse.Namespace, zygote: Any, number: int, kv_tokens: int
) -> ClusterSpec:
    """The demo's pair; policies differ in scheduling and in nothing else."""
    kairos, order = POLICIES[policy]
    spec = demo.spec_for(policy, given, zygote, lambda line: None, number)
    fake = ["--disaggregation-transfer-backend", "fake"] if given.mode == "decode" else []
    return replace(
        spec,
        kairos=kairos,
        prefill_args=["--schedule-policy", order] if order else [],
        decode_args=["--max-total-tokens", str(kv_tokens), *fake],
        log_dir=given.out / "logs" / f"{number}-{policy}",
    )


def prepare(cluster: Cluster, given: argparse.Namespace) -> None:
    """Warm servers, and a core for the decode scheduler."""
    demo.separate(cluster, "d")
    drive(cluster, given, sample(REHEARSED, given.seed + 1000, given), 1e5, 1e5, WARM_ABREAST)
    demo.forget(cluster)


def drive(
    cluster: Cluster,
    given: argparse.Namespace,
    rows: Sequence[traces.Request],
    ttft_ms: float,
    tpot_ms: float,
    concurrency: int | None = None,
) -> Result:
    """Sends the rows at their times, or `concurrency` at once, and waits for the last answer."""
    alone = given.mode == "decode"
    jobs = make_jobs(
        rows, ttft_ms, tpot_ms, seed=given.seed, extra=FAKE_TRANSFER if alone else None
    )
    url = cluster.decode_urls[0] if alone else cluster.url
    return run(replay(url, jobs, timeout_s=TIMEOUT_S, concurrency=concurrency, check=cluster.check))


def tpot_by_abreast(given: argparse.Namespace, zygote: Any) -> dict[int, float]:
    """Seconds per token that clients of stock see, by how many requests are kept abreast."""
    say = demo.narrator("[capacity]")
    found: dict[int, float] = {}
    with Cluster(spec_for("stock", given, zygote, 0, demo.KV_TOKENS)) as cluster:
        prepare(cluster, given)
        for abreast in ABREAST:
            rows = sample(4 * abreast, given.seed + 1000 + abreast, given)
            done = drive(cluster, given, rows, 1e5, 1e5, abreast).outcomes
            # The first and the last ones had fewer beside them.
            full = done[abreast // 2 : -abreast]
            decoding = sum(one.last_token_s - one.first_token_s for one in full)
            found[abreast] = decoding / sum(max(0, one.output_tokens - 1) for one in full)
            say(f"{abreast} abreast: {1e3 * found[abreast]:.1f} ms per token")
            if 1e3 * found[abreast] > max(given.tpots_ms):
                break
    return found


def capacity_of(
    tpot_s: Mapping[int, float], rows: Sequence[traces.Request], tpot_ms: float
) -> float:
    """Requests per second at which as many are abreast as see just `tpot_ms` per token.

    `tpot_s`: seconds per token by how many are abreast; straight lines in between.
    """
    abreast = float(np.interp(tpot_ms / 1e3, list(tpot_s.values()), list(tpot_s)))
    return abreast / (tpot_ms / 1e3 * float(np.mean([row.output_tokens for row in rows])))


def silences_ms(result: Result) -> dict[str, float]:
    """Time between a request's tokens as the client saw it: 99th percentile, and the longest."""
    gaps = np.array([gap for one in result.outcomes for gap in one.itls_ms] or [0.0])
    return {
        "itl_p99_ms": round(float(np.quantile(gaps, 0.99)), 1),
        "itl_longest_ms": round(float(gaps.max()), 1),
    }


def markdown(runs: Sequence[report.Run]) -> str:
    """A table: mean over rounds (and their range) per TPOT target, load and policy."""
    lines = [
        "| TPOT target | load | policy | TTFT met | TPOT met | both met | tokens/s while requests"
        " arrive | over the whole run | ITL p99 | longest silence |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[float, float, str], list[report.Run]] = {}
    for one in runs:
        key = one.facts["slo"]["tpot_ms"], one.facts["load"], one.policy
        cells.setdefault(key, []).append(one)
    for (tpot, load, policy), some in cells.items():
        metrics = [one.result.metrics for one in some]
        shares = [
            spread([100 * getattr(each, name) for each in metrics], "%")
            for name in ("ttft_attainment", "tpot_attainment", "e2e_attainment")
        ]
        figures = [
            spread([one.row()[name] for one in some], unit)
            for name, unit in (
                ("window_tokens_per_s", ""),
                ("decode_tokens_per_s", ""),
                ("itl_p99_ms", "ms"),
                ("itl_longest_ms", "ms"),
            )
        ]
        cell = " | ".join([f"{tpot:g} ms", f"{load:g}", policy, *shares, *figures])
        lines.append(f"| {cell} |")
    return "\n".join(lines)


def spread(values: Sequence[float], unit: str) -> str:
    """Mean, and the range where there are several."""
    mean, low, high = float(np.mean(values)), min(values), max(values)
    digits = 1 if unit == "%" else 0
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ({low:.{digits}f}–{high:.{digits}f})"
    return f"{text} {unit}".strip()


def window_tokens_per_s(result: Result, until_s: float) -> float:
    """Tokens per second while requests arrived; a request's come evenly over its time."""
    tokens = 0.0
    for one in result.outcomes:
        if not one.ok or one.first_token_s >= until_s:
            continue
        lasted = max(one.last_token_s - one.first_token_s, 1e-9)
        tokens += one.output_tokens * min(1.0, (until_s - one.first_token_s) / lasted)
    return tokens / until_s


if __name__ == "__main__":
    raise SystemExit(main())
