"""Decode under load: stock SGLang and Kairos in turn, real servers, no GPU needed.

    python -m benchmark.experiments.decode_cpu                 # prefill and decode server
    python -m benchmark.experiments.decode_cpu --mode decode   # decode alone, KV not transferred

The first cluster, stock's, is measured: with 8, 16, 32 … requests kept abreast, at how many does the
TPOT that clients see reach the target? That gives the capacity in requests per second, as far as
step times limit it. With ``--kv-tokens`` the decode server's memory is the limit instead.

Each load of the grid is a share of it. Every policy is warmed up alike and sent the same long-tailed
trace, open loop. Policies: stock (fcfs prefill, every running request in every step), kairos,
kairos-no-park (the same prefill, stock decode) and kairos-no-breaker (parks however badly steps are
predicted). Writes one row per run (a `Run.row()` with mode, load, repeat and targets) to
``rows.json`` and one JSON line per request under ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.harness import arguments, page
from benchmark.harness.experiment import Experiment, Trial, run_experiment, write_json
from benchmark.harness.servers import (
    KV_TOKENS,
    RELAXED_MS,
    forget,
    kairos_reports,
    narrator,
    pair_spec,
    platform,
    separate,
    summary,
)
from sglang_kairos.cluster.run import Cluster, ClusterSpec
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


@dataclass(frozen=True)
class DecodeLoad:
    """A TPOT target in ms, and a share of the capacity at it."""

    tpot_ms: float
    share: float

    def __str__(self) -> str:
        return f"{self.share:g} TPOT {self.tpot_ms:g} ms"


class DecodeCpu(Experiment):
    """A fresh cluster per trial: a policy at a share of the capacity at a TPOT target."""

    tpot_by_abreast: Mapping[int, float] | None = None

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None) -> argparse.Namespace:
        parser = arguments.parser_for(
            "benchmark.experiments.decode_cpu",
            __doc__,
            policies="stock,kairos",
            ttft_ms=1000.0,
            load_s=45.0,
            repeat=1,
            seed=0,
            out=Path("out/decode_cpu"),
        )
        add = parser.add_argument
        add("--mode", choices=("pd", "decode"), default="pd")
        add("--loads", default="0.5,1,1.3,1.5,2", help="shares of the capacity")
        add("--tpots-ms", help="TPOT targets, comma separated (default: by mode)")
        add("--capacity", type=float, help="requests/s (default: measured, per TPOT)")
        add("--median-input", type=float, help="tokens (default: by mode)")
        add("--max-input", type=int, help="tokens (default: by mode)")
        add("--median-output", type=float, help="tokens (default: by mode)")
        kv = "of the decode server (default: %(default)s)"
        add("--kv-tokens", type=int, default=KV_TOKENS, help=kv)
        add("--model-path", default="", help=f"default: a random model of {LAYERS} layers")
        add("--start", choices=("fork", "spawn"), help="fork servers, or start each anew")
        given = parser.parse_args(argv)
        given.router = "kairos" if given.mode == "pd" else "none"
        for name, value in BY_MODE[given.mode].items():
            if getattr(given, name) is None:
                setattr(given, name, value)
        given.policies = arguments.chosen(parser, "policies", given.policies, POLICIES)
        for name in ("loads", "tpots_ms"):
            setattr(given, name, arguments.numbers(parser, name, getattr(given, name)))
        names = ("ttft_ms", "load_s", "repeat", "capacity", "kv_tokens")
        arguments.positive(parser, given, (*names, "median_input", "max_input", "median_output"))
        longest = given.max_input + MAX_OUTPUT
        if given.kv_tokens < longest:
            parser.error(f"--kv-tokens: the longest request needs {longest}, got {given.kv_tokens}")
        return given

    def loads(self) -> list[DecodeLoad]:
        given = self.given
        return [DecodeLoad(tpot, share) for tpot in given.tpots_ms for share in given.loads]

    def run(self) -> None:
        given = self.given
        if not given.model_path:
            model = make_tiny_model(given.out / "model", TinyModel(layers=LAYERS))
            given.model_path = str(model)
        super().run()

    def measure(self, trial: Trial) -> None:
        given, load = self.given, trial.load
        capacity = given.capacity or self.capacity_at(load.tpot_ms)
        rate = load.share * capacity
        rows = sample(max(2, round(rate * given.load_s)), given.seed + trial.turn, given)
        rows = traces.scale_rate(rows, rate)
        with Cluster(self.spec(trial.policy, trial.name, given.kv_tokens)) as cluster:
            prepare(cluster, given)
            result = drive(cluster, given, rows, given.ttft_ms, load.tpot_ms)
            told = kairos_reports(cluster)
        for line in failures(result.outcomes):
            trial.say(f"failed: {line}")
        trial.say(summary(result))
        facts = {
            "mode": given.mode,
            "load": load.share,
            "rate_rps": round(rate, 3),
            "capacity_rps": round(capacity, 3),
            "kv_tokens": given.kv_tokens,
            "repeat": trial.turn,
            "slo": {"ttft_ms": given.ttft_ms, "tpot_ms": load.tpot_ms},
            "platform": platform(),
            **silences_ms(result),
            "window_tokens_per_s": round(window_tokens_per_s(result, rows[-1].arrival_s), 1),
            **told,
        }
        self.runs.append(report.Run(trial.policy, result, facts))
        result.dump(given.out / f"{trial.name}.jsonl")

    def spec(self, policy: str, name: str, kv_tokens: int) -> ClusterSpec:
        """Returns the pair; policies differ in scheduling and in nothing else."""
        kairos, order = POLICIES[policy]
        spec = pair_spec(policy, self.given, self.zygote, lambda line: None, name)
        alone = self.given.mode == "decode"
        fake = ["--disaggregation-transfer-backend", "fake"] if alone else []
        return replace(
            spec,
            kairos=kairos,
            prefill_args=["--schedule-policy", order] if order else [],
            decode_args=["--max-total-tokens", str(kv_tokens), *fake],
        )

    def capacity_at(self, tpot_ms: float) -> float:
        """Returns requests/s that stock keeps at this TPOT, measured once."""
        if self.tpot_by_abreast is None:
            self.tpot_by_abreast = self.measure_abreast()
        return capacity_of(self.tpot_by_abreast, sample(1000, self.given.seed, self.given), tpot_ms)

    def measure_abreast(self) -> dict[int, float]:
        """Returns seconds per token that clients of stock see, by requests kept abreast."""
        given, say = self.given, narrator("[capacity]")
        found: dict[int, float] = {}
        with Cluster(self.spec("stock", "0-stock", KV_TOKENS)) as cluster:
            prepare(cluster, given)
            for abreast in ABREAST:
                rows = sample(4 * abreast, given.seed + 1000 + abreast, given)
                done = drive(cluster, given, rows, RELAXED_MS, RELAXED_MS, abreast).outcomes
                # The first and the last ones had fewer beside them.
                full = done[abreast // 2 : -abreast]
                decoding = sum(one.last_token_s - one.first_token_s for one in full)
                found[abreast] = decoding / sum(max(0, one.output_tokens - 1) for one in full)
                say(f"{abreast} abreast: {1e3 * found[abreast]:.1f} ms per token")
                if 1e3 * found[abreast] > max(given.tpots_ms):
                    break
        return found

    def save(self) -> None:
        write_json(self.given.out / "rows.json", self.rows(), indent=1)

    def text(self) -> str:
        text, out = markdown(self.runs), self.given.out
        (out / "table.md").write_text(text + "\n", encoding="utf-8")
        wrote = f"wrote {out / 'rows.json'} and table.md"
        return f"{platform()}, {self.given.mode}\n\n{text}\n\n{wrote}"


def sample(count: int, seed: int, given: argparse.Namespace) -> list[traces.Request]:
    """Returns the trace, at any rate: a long tail of contexts and of outputs."""
    names = ("median_input", "max_input", "median_output")
    tail = {name: getattr(given, name) for name in names}
    return traces.long_tail(count, 1.0, seed, max_output=MAX_OUTPUT, **tail)


def prepare(cluster: Cluster, given: argparse.Namespace) -> None:
    """Warms the servers, and gives the decode scheduler a core."""
    separate(cluster, "d")
    rows = sample(REHEARSED, given.seed + 1000, given)
    drive(cluster, given, rows, RELAXED_MS, RELAXED_MS, WARM_ABREAST)
    forget(cluster)


def drive(
    cluster: Cluster,
    given: argparse.Namespace,
    rows: Sequence[traces.Request],
    ttft_ms: float,
    tpot_ms: float,
    abreast: int | None = None,
) -> Result:
    """Sends the rows at their times, or `abreast` at once, and waits for the last answer."""
    alone = given.mode == "decode"
    extra = FAKE_TRANSFER if alone else None
    jobs = make_jobs(rows, ttft_ms, tpot_ms, seed=given.seed, extra=extra)
    url = cluster.decode_urls[0] if alone else cluster.url
    return run(replay(url, jobs, timeout_s=TIMEOUT_S, concurrency=abreast, check=cluster.check))


def capacity_of(
    tpot_s: Mapping[int, float], rows: Sequence[traces.Request], tpot_ms: float
) -> float:
    """Returns requests per second at which as many are abreast as see just `tpot_ms` per token.

    `tpot_s`: seconds per token by how many are abreast; straight lines in between.
    """
    abreast = float(np.interp(tpot_ms / 1e3, list(tpot_s.values()), list(tpot_s)))
    return abreast / (tpot_ms / 1e3 * float(np.mean([row.output_tokens for row in rows])))


def silences_ms(result: Result) -> dict[str, float]:
    """Returns p99 and maximum of the time between a request's tokens, as the client saw it."""
    gaps = np.array([gap for one in result.outcomes for gap in one.itls_ms] or [0.0])
    return {
        "itl_p99_ms": round(float(np.quantile(gaps, 0.99)), 1),
        "itl_longest_ms": round(float(gaps.max()), 1),
    }


# Heading, key of the row, factor to the shown unit, digits, unit.
SHOWN = (
    ("TTFT met", "ttft_attainment", 100, 1, "%"),
    ("TPOT met", "tpot_attainment", 100, 1, "%"),
    ("both met", "e2e_attainment", 100, 1, "%"),
    ("tokens/s while requests arrive", "window_tokens_per_s", 1, 0, ""),
    ("over the whole run", "decode_tokens_per_s", 1, 0, ""),
    ("ITL p99", "itl_p99_ms", 1, 0, "ms"),
    ("longest silence", "itl_longest_ms", 1, 0, "ms"),
)


def markdown(runs: Sequence[report.Run]) -> str:
    """Returns a table: mean over rounds (and their range) per TPOT target, load and policy."""
    cells: dict[tuple[float, float, str], list[dict[str, Any]]] = {}
    for one in runs:
        key = one.facts["slo"]["tpot_ms"], one.facts["load"], one.policy
        cells.setdefault(key, []).append(one.row())
    rows = [
        [f"{tpot:g} ms", f"{load:g}", policy]
        + [
            page.spread([factor * row[name] for row in some], digits, unit)
            for _, name, factor, digits, unit in SHOWN
        ]
        for (tpot, load, policy), some in cells.items()
    ]
    return page.table(["TPOT target", "load", "policy", *(head for head, *_ in SHOWN)], rows)


def window_tokens_per_s(result: Result, until_s: float) -> float:
    """Returns tokens per second while requests arrived; a request's come evenly over its time."""
    tokens = 0.0
    for one in result.outcomes:
        if not one.ok or one.first_token_s >= until_s:
            continue
        lasted = max(one.last_token_s - one.first_token_s, 1e-9)
        tokens += one.output_tokens * min(1.0, (until_s - one.first_token_s) / lasted)
    return tokens / until_s


if __name__ == "__main__":
    sys.exit(run_experiment(DecodeCpu))
