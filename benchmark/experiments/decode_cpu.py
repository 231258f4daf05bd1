"""Decode under load: stock SGLang and Kairos in turn, real servers, no GPU needed.

    python -m benchmark.experiments.decode_cpu                 # prefill and decode server
    python -m benchmark.experiments.decode_cpu --mode decode   # decode server alone, made-up KV

The first cluster, stock's, is measured: with 8, 16, 32 … requests kept abreast, at how many does the
TPOT that clients see reach the target? Hence the capacity in requests per second, as far as step
times limit it; with ``--kv-tokens`` the decode server's memory is the limit instead. Each load of
the grid is a share of it. Every policy is warmed up alike and sent the same long-tailed trace, open
loop.

Policies: stock (fcfs prefill, every running request in every step), kairos, kairos-no-park (the same
prefill, stock decode) and kairos-no-breaker (parks however badly steps are predicted). Writes one
row per run to ``rows.json`` and one JSON line per request under ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmark.harness import arguments, driver, page, servers
from benchmark.harness.experiment import Experiment, Trial, run_experiment, write_json
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.cpu.tiny_model import TinyModel, make_tiny_model
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result
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
DEFAULTS: dict[str, Any] = {
    "policies": "stock,kairos",
    "loads": "0.5,1,1.3,1.5,2",
    "ttft_ms": 1000.0,
    "load_s": 45.0,
    "repeat": 1,
    "seed": 0,
    "out": Path("out/decode_cpu"),
    "model_path": "",
}
# Heading, key of a row, unit, digits, factor.
COLUMNS = (
    ("TTFT met", "ttft_attainment", "%", 1, 100),
    ("TPOT met", "tpot_attainment", "%", 1, 100),
    ("both met", "e2e_attainment", "%", 1, 100),
    ("tokens/s while requests arrive", "window_tokens_per_s", "", 0, 1),
    ("over the whole run", "decode_tokens_per_s", "", 0, 1),
    ("ITL p99", "itl_p99_ms", "ms", 0, 1),
    ("longest silence", "itl_longest_ms", "ms", 0, 1),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the checked command line, with lists as lists."""
    parser = arguments.parser_for("benchmark.experiments.decode_cpu", __doc__, **DEFAULTS)
    arguments.add_start(parser)
    parser.add_argument("--mode", choices=("pd", "decode"), default="pd")
    parser.add_argument("--tpots-ms", help="TPOT targets, comma separated (default: by mode)")
    parser.add_argument("--capacity", type=float, help="requests/s (default: measured, per TPOT)")
    parser.add_argument("--median-input", type=float, help="tokens (default: by mode)")
    parser.add_argument("--max-input", type=int, help="tokens (default: by mode)")
    parser.add_argument("--median-output", type=float, help="tokens (default: by mode)")
    text = "of the decode server (default: %(default)s)"
    parser.add_argument("--kv-tokens", type=int, default=servers.KV_TOKENS, help=text)
    given = parser.parse_args(argv)
    given.router = "kairos" if given.mode == "pd" else "none"
    for name, value in BY_MODE[given.mode].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
    for name in ("loads", "tpots_ms"):
        setattr(given, name, arguments.numbers(parser, name, getattr(given, name)))
    lengths = ("median_input", "max_input", "median_output", "kv_tokens")
    arguments.positive(parser, given, ("ttft_ms", "load_s", "repeat", "capacity", *lengths))
    longest = given.max_input + MAX_OUTPUT
    if given.kv_tokens < longest:
        parser.error(f"--kv-tokens: the longest request needs {longest}, got {given.kv_tokens}")
    return given


class DecodeLoad(NamedTuple):
    """A TPOT target in ms, and a share of the capacity at it."""

    tpot_ms: float
    share: float

    def __str__(self) -> str:
        return f"{self.share:g} TPOT {self.tpot_ms:g} ms"


class DecodeCpu(Experiment):
    """A fresh cluster per trial; a load is a TPOT target in ms and a share of its capacity."""

    fails_with = (ClusterError,)

    def __init__(self, given: argparse.Namespace, zygote: Any = None) -> None:
        super().__init__(given, zygote)
        if not given.model_path:
            model = make_tiny_model(given.out / "model", TinyModel(layers=LAYERS))
            given.model_path = str(model)
        self.seen: dict[int, float] = {}

    def loads(self) -> Sequence[Any]:
        given = self.given
        return [DecodeLoad(tpot, load) for tpot in given.tpots_ms for load in given.loads]

    def run(self) -> None:
        if not self.given.capacity:
            self.seen = self.tpot_by_abreast()
        super().run()

    def measure(self, trial: Trial) -> None:
        given, (tpot, load) = self.given, trial.load
        capacity = given.capacity or capacity_of(self.seen, sample(1000, given.seed, given), tpot)
        rate = load * capacity
        rows = sample(max(2, round(rate * given.load_s)), given.seed + trial.turn, given)
        rows = traces.scale_rate(rows, rate)
        with Cluster(self.spec(trial.policy, trial.name, given.kv_tokens)) as cluster:
            self.prepare(cluster)
            result = self.drive(cluster, rows, given.ttft_ms, tpot)
            reports = servers.kairos_reports(cluster)
        driver.tell_failures(result, trial.say)
        trial.say(driver.summary(result))
        facts = {
            "mode": given.mode,
            "load": load,
            "rate_rps": round(rate, 3),
            "capacity_rps": round(capacity, 3),
            "kv_tokens": given.kv_tokens,
            "repeat": trial.turn,
            "slo": {"ttft_ms": given.ttft_ms, "tpot_ms": tpot},
            "platform": servers.platform(),
            **silences_ms(result),
            "window_tokens_per_s": round(window_tokens_per_s(result, rows[-1].arrival_s), 1),
            **reports,
        }
        self.runs.append(report.Run(trial.policy, result, facts))
        result.dump(given.out / f"{trial.name}.jsonl")

    def save(self, trial: Trial) -> None:
        write_json(self.given.out / "rows.json", [one.row() for one in self.runs], indent=1)

    def spec(self, policy: str, name: str, kv_tokens: int) -> ClusterSpec:
        """Returns the demo's pair; policies differ in scheduling and in nothing else."""
        kairos, order = POLICIES[policy]
        fake = ["--disaggregation-transfer-backend", "fake"] if self.given.mode == "decode" else []
        return replace(
            servers.pair_spec(policy, self.given, self.zygote, lambda line: None, name),
            kairos=kairos,
            prefill_args=["--schedule-policy", order] if order else [],
            decode_args=["--max-total-tokens", str(kv_tokens), *fake],
        )

    def prepare(self, cluster: Cluster) -> None:
        """Warms the servers, and gives the decode scheduler a core."""
        servers.separate(cluster, "d")
        rows = sample(REHEARSED, self.given.seed + 1000, self.given)
        self.drive(cluster, rows, concurrency=WARM_ABREAST)
        servers.forget(cluster)

    def drive(
        self, cluster: Cluster, rows: Sequence[traces.Request], *targets: float, **options: Any
    ) -> Result:
        """Sends the rows at their times, or `concurrency` at once, and waits for the last answer."""
        if self.given.mode == "decode":
            options |= {"url": cluster.decode_urls[0], "extra": FAKE_TRANSFER}
        options |= {"seed": self.given.seed, "timeout_s": TIMEOUT_S}
        return driver.send(cluster, rows, *targets, **options)

    def tpot_by_abreast(self) -> dict[int, float]:
        """Returns seconds per token that clients of stock see, by how many are kept abreast."""
        given, say = self.given, servers.narrator("[capacity]")
        found: dict[int, float] = {}
        with Cluster(self.spec("stock", "0-stock", servers.KV_TOKENS)) as cluster:
            self.prepare(cluster)
            for abreast in ABREAST:
                rows = sample(4 * abreast, given.seed + 1000 + abreast, given)
                done = self.drive(cluster, rows, concurrency=abreast).outcomes
                # The first and the last ones had fewer beside them.
                full = done[abreast // 2 : -abreast]
                decoding = sum(one.last_token_s - one.first_token_s for one in full)
                found[abreast] = decoding / sum(max(0, one.output_tokens - 1) for one in full)
                say(f"{abreast} abreast: {1e3 * found[abreast]:.1f} ms per token")
                if 1e3 * found[abreast] > max(given.tpots_ms):
                    break
        return found

    def text(self) -> str:
        return f"{servers.platform()}, {self.given.mode}\n\n{markdown(self.runs)}"

    def finish(self) -> int:
        super().finish()
        out = self.given.out
        (out / "table.md").write_text(markdown(self.runs) + "\n", encoding="utf-8")
        print(f"\nwrote {out / 'rows.json'} and table.md")
        return 0


def sample(count: int, seed: int, given: argparse.Namespace) -> list[traces.Request]:
    """Returns the trace, at any rate: a long tail of contexts and of outputs."""
    names = ("median_input", "max_input", "median_output")
    lengths = {name: getattr(given, name) for name in names}
    return traces.long_tail(count, 1.0, seed, **lengths, max_output=MAX_OUTPUT)


def capacity_of(
    tpot_s: Mapping[int, float], rows: Sequence[traces.Request], tpot_ms: float
) -> float:
    """Returns requests per second at which as many are abreast as see just `tpot_ms` per token.

    `tpot_s`: seconds per token by how many are abreast; straight lines in between.
    """
    abreast = float(np.interp(tpot_ms / 1e3, list(tpot_s.values()), list(tpot_s)))
    return abreast / (tpot_ms / 1e3 * float(np.mean([row.output_tokens for row in rows])))


def silences_ms(result: Result) -> dict[str, float]:
    """Returns the time between a request's tokens at the client: 99th percentile, and longest."""
    gaps = np.array([gap for one in result.outcomes for gap in one.itls_ms] or [0.0])
    return {
        "itl_p99_ms": round(float(np.quantile(gaps, 0.99)), 1),
        "itl_longest_ms": round(float(gaps.max()), 1),
    }


def window_tokens_per_s(result: Result, until_s: float) -> float:
    """Returns tokens per second while requests arrived; a request's come evenly over its time."""
    tokens = 0.0
    for one in result.outcomes:
        if not one.ok or one.first_token_s >= until_s:
            continue
        lasted = max(one.last_token_s - one.first_token_s, 1e-9)
        tokens += one.output_tokens * min(1.0, (until_s - one.first_token_s) / lasted)
    return tokens / until_s


def markdown(runs: Sequence[report.Run]) -> str:
    """Returns a table: mean over rounds (and their range) per TPOT target, load and policy."""
    cells: dict[tuple[float, float, str], list[dict[str, Any]]] = {}
    for one in runs:
        key = one.facts["slo"]["tpot_ms"], one.facts["load"], one.policy
        cells.setdefault(key, []).append(one.row())
    rows = []
    for (tpot, load, policy), some in cells.items():
        figures = [
            page.spread([factor * row[key] for row in some], digits, unit)
            for _, key, unit, digits, factor in COLUMNS
        ]
        rows.append([f"{tpot:g} ms", f"{load:g}", policy, *figures])
    return page.table(["TPOT target", "load", "policy", *(column[0] for column in COLUMNS)], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the grid. Returns the exit status."""
    return run_experiment(DecodeCpu, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
