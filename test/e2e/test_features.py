"""Whatever a request asks for, the answer is stock SGLang's while Kairos parks and pauses.

A real pair behind the router serves the same jobs twice: stock, and under random but legal decisions,
so that what is parked depends on no machine's speed. (The policies themselves: `test_identity`.)
What cannot run in part (penalties) turns packing off while it runs, says so once, and no longer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from answers import difference, send
from pd_client import PdClient, again_if_stock_lost_one, trouble_in

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote

RANDOM = {"chaos_seed": 21}
SERVER_ARGS = (
    *("--chunked-prefill-size", "512", "--max-total-tokens", "49152"),
    *("--grammar-backend", "llguidance", "--constrained-json-disable-any-whitespace"),
)
REGEX = r"[a-z]{4,12} [0-9]{3,9}, [a-z]{4,12}\."
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "sizes": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 3, "maxItems": 6},
        "round": {"type": "boolean"},
    },
    "required": ["colour", "sizes", "round"],
    "additionalProperties": False,
}
STOP_IDS = list(range(300, 400))
FAVOURED = 321


def params(**more: Any) -> dict[str, Any]:
    return {"sampling_params": more}


# Feature → what its requests say beyond prompt, temperature and length.
PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "regex": params(regex=REGEX),
    "json_schema": params(json_schema=json.dumps(SCHEMA), max_new_tokens=120),
    "logprobs": {"return_logprob": True, "top_logprobs_num": 3},
    "prompt_logprobs": {"return_logprob": True, "logprob_start_len": 0},
    "token_logprobs": {"return_logprob": True, "token_ids_logprob": [300, 400, 500]},
    "regex_with_logprobs": {"return_logprob": True, **params(regex=REGEX)},
    "stop": params(stop=["er", "ing", "th"]),
    "stop_token_ids": params(stop_token_ids=STOP_IDS),
    "logit_bias": params(logit_bias={str(FAVOURED): 6.0}),
    "stream": {"stream": True},
    "stream_interval": {"stream": True, **params(stream_interval=4)},
    "n": params(n=2),
}
PENALISED: dict[str, dict[str, Any]] = {
    "frequency_penalty": params(frequency_penalty=1.5),
    "presence_penalty": params(presence_penalty=1.9),
    "repetition_penalty": params(repetition_penalty=1.7),
    "min_new_tokens": params(min_new_tokens=16, stop_token_ids=STOP_IDS),
}
FEATURES = {**PACKED, **PENALISED}


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of a feature, sent `at_s` seconds after its phase begins."""

    feature: str
    at_s: float
    prompt: list[int]
    tokens: int

    def body(self) -> dict[str, Any]:
        """What is posted to /generate."""
        asked = FEATURES[self.feature]
        sampling = {"temperature": 0, "max_new_tokens": self.tokens}
        sampling |= asked.get("sampling_params", {})
        return {"input_ids": self.prompt, **asked, "sampling_params": sampling}


def mixed(features: Sequence[str], seed: int, span_s: float = 1.0) -> list[Job]:
    """Two jobs of every feature and six plain ones, over `span_s`; some prompts take three chunks."""
    rng = random.Random(seed)
    jobs = []
    for index, feature in enumerate([*features, "plain", "plain", "plain"] * 2):
        length = 1100 if index % 8 == 0 else rng.randrange(8, 250)
        prompt = [rng.randrange(10, 500) for _ in range(length)]
        jobs.append(Job(feature, rng.uniform(0.0, span_s), prompt, rng.randrange(26, 40)))
    return jobs


# Penalties come in the middle, so that packing is seen to end and to begin again.
BESIDE = ["regex", "logprobs"]
PHASES = [
    mixed(list(PACKED), seed=1),
    mixed([*PENALISED, *BESIDE], seed=2),
    mixed(["plain"] * 2, seed=3),
]
JOBS = [job for phase in PHASES for job in phase]


# The same prompt twice: its log probabilities in either endpoint's shape.
WORDS = "the water and the sun"
ECHOED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": WORDS, **FEATURES["prompt_logprobs"], **params(max_new_tokens=2)}),
    (
        "/v1/completions",
        {"model": "m", "prompt": WORDS, "echo": True, "logprobs": 2, "max_tokens": 2},
    ),
]


@dataclasses.dataclass
class Run:
    """What one run left behind: the answers in the order of `JOBS`, counters after each phase."""

    answers: list[list[dict[str, Any]]]
    events: list[int]
    decode: list[Counter[str]]
    prefill: Counter[str]
    echoed: list[dict[str, Any]]
    settled: bool
    trouble: list[str]
    log: str


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    asked = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as response:
        return dict(json.load(response))


def run_phases(zygote: Zygote, model: str, log_dir: Path, kairos: bool | dict[str, Any]) -> Run:
    """Start a pair and its router, run the phases one after the other, stop them."""
    spec = ClusterSpec(
        model_path=model,
        kairos=kairos,
        server_args=SERVER_ARGS,
        zygote=zygote,
        log_dir=log_dir,
    )
    with Cluster(spec) as cluster:
        client = PdClient(cluster)
        replies, counters = [], []
        prefill: dict[str, Any] = {}
        for phase in PHASES:
            timed = [(job.at_s, job.body()) for job in phase]
            replies += asyncio.run(send(cluster.url, timed))
            prefill, decode = client.kairos()
            counters.append(Counter(decode.get("counters", {})))
        echoed = [post(cluster.url + path, body) for path, body in ECHOED]
        return Run(
            answers=[rows for rows, _ in replies],
            events=[events for _, events in replies],
            decode=counters,
            prefill=Counter(prefill.get("counters", {})),
            echoed=echoed,
            settled=client.settles(),
            trouble=trouble_in(cluster.logs),
            log=cluster.logs["d0"].read_text(errors="replace"),
        )


@pytest.fixture(scope="module")
def stock(zygote: Zygote, tiny_model: str, out_dir: Path) -> Run:
    """Stock SGLang, Kairos off."""
    logs = out_dir / "features-stock"
    return again_if_stock_lost_one(logs, lambda: run_phases(zygote, tiny_model, logs, kairos=False))


@pytest.fixture(scope="module")
def packed(zygote: Zygote, tiny_model: str, out_dir: Path) -> Run:
    """Kairos, deciding at random."""
    return run_phases(zygote, tiny_model, out_dir / "features-kairos", kairos=RANDOM)


def rows_of(run: Run, feature: str) -> list[dict[str, Any]]:
    """All rows of a feature's answers."""
    pairs = zip(JOBS, run.answers, strict=True)
    return [row for job, rows in pairs if job.feature == feature for row in rows]


@pytest.mark.parametrize("feature", FEATURES)
def test_every_answer_is_stocks(feature: str, stock: Run, packed: Run) -> None:
    pairs = list(zip(rows_of(packed, feature), rows_of(stock, feature), strict=True))
    assert len(pairs) >= 2
    for got, want in pairs:
        assert not difference(got, want)


def finish(rows: list[dict[str, Any]]) -> list[Any]:
    """Why the rows ended: what matched, None for their length."""
    return [row["meta_info"]["finish_reason"].get("matched") for row in rows]


def test_every_feature_was_at_work(stock: Run) -> None:
    for row in rows_of(stock, "regex"):
        assert re.fullmatch(REGEX, row["text"]), row["text"]
    for row in rows_of(stock, "json_schema"):
        assert json.loads(row["text"]).keys() == SCHEMA["properties"].keys()
    for row in rows_of(stock, "logprobs"):
        meta = row["meta_info"]
        assert len(meta["output_token_logprobs"]) == meta["completion_tokens"] > 25
        assert all(len(tops) == 3 for tops in meta["output_top_logprobs"])
    for row in rows_of(stock, "prompt_logprobs"):
        assert len(row["meta_info"]["input_token_logprobs"]) == row["meta_info"]["prompt_tokens"]
    for row in rows_of(stock, "token_logprobs"):
        assert all(len(some) == 3 for some in row["meta_info"]["output_token_ids_logprobs"])
    assert set(finish(rows_of(stock, "stop"))) & {"er", "ing", "th"}
    assert set(finish(rows_of(stock, "stop_token_ids"))) & set(STOP_IDS)
    assert any(FAVOURED in row["output_ids"] for row in rows_of(stock, "logit_bias"))
    for row in rows_of(stock, "stream") + rows_of(stock, "stream_interval"):
        assert len(row["output_ids"]) == row["meta_info"]["completion_tokens"] > 25
    assert {len(stock.answers[i]) for i, job in enumerate(JOBS) if job.feature == "n"} == {2}
    lengths = [row["meta_info"]["completion_tokens"] for row in rows_of(stock, "min_new_tokens")]
    assert min(lengths) >= 16 and set(finish(rows_of(stock, "min_new_tokens"))) & set(STOP_IDS)


def test_an_echoed_completion_has_its_prompts_log_probabilities(stock: Run, packed: Run) -> None:
    for run in (stock, packed):
        native, completion = run.echoed
        want = [probability for probability, *_ in native["meta_info"]["input_token_logprobs"]]
        found = completion["choices"][0]["logprobs"]
        assert len(want) == completion["usage"]["prompt_tokens"] > 2
        assert found["token_logprobs"][: len(want)] == pytest.approx(want, abs=1e-4)
        assert {len(listed) for listed in found.values()} == {len(want) + 2}
        assert "".join(found["tokens"][: len(want)]) == WORDS


def test_a_stream_interval_thins_the_events_out(stock: Run, packed: Run) -> None:
    for run in (stock, packed):
        events: Counter[str] = Counter()
        for job, rows, seen in zip(JOBS, run.answers, run.events, strict=True):
            events[job.feature] += seen
            if job.feature == "stream_interval":
                # The first token at once, then every fourth, then the end.
                assert seen <= 2 + rows[0]["meta_info"]["completion_tokens"] / 4
        assert events["stream"] > events["stream_interval"] > 4, events


def test_packing_stops_for_penalties_says_so_once_and_goes_on(stock: Run, packed: Run) -> None:
    assert all(not counters for counters in stock.decode), "Kairos must not be there when it is off"
    before, during, after = packed.decode
    assert before["subset_steps"] >= 20 and before["parked"] >= 40, before
    assert before["fallback_steps"] == 0, before
    assert during["fallback_steps"] >= 10, during
    assert after["fallback_steps"] == during["fallback_steps"]
    assert after["subset_steps"] >= during["subset_steps"] + 10, (during, after)
    lines = [line for line in packed.log.splitlines() if "decode packing is off" in line]
    assert len(lines) == 1 and "a request uses penalties" in lines[0]


def test_nothing_failed_or_was_left_behind(stock: Run, packed: Run) -> None:
    for run in (stock, packed):
        assert run.settled, "a server did not become idle after the last request"
        assert not run.trouble, "\n".join(run.trouble)
    names = {*packed.prefill, *packed.decode[-1]}
    assert not [name for name in names if name.endswith("_errors")], names
