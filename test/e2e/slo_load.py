"""A load with all kinds of SLOs, counted by its client; and what servers export of it."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections import Counter
from typing import Any

import orjson
from prometheus_client.parser import text_string_to_metric_families

from sglang_kairos.cluster.run import Cluster
from sglang_kairos.loads.replay import Job, Outcome, replay
from sglang_kairos.loads.traces import Request

KEY = {"authorization": "Bearer secret"}
EASY, HARD = 60_000.0, 1.0  # milliseconds: nobody misses the one, nobody meets the other
Counts = Counter[tuple[str, ...]]


def mixed_jobs(count: int, seed: int, bootstrap_port: int | None = None) -> tuple[list[Job], Any]:
    """Streams of 1 or of 32 to 48 tokens, ten a second, and the class that each counts under.

    One in four names a class that the servers do not know, in the form that gateways pass on.
    `bootstrap_port`: they go to both servers at once, without a router.
    """
    rng, jobs, classes = random.Random(seed), [], []
    for index in range(count):
        tokens = 1 if index % 10 == 0 else rng.randrange(32, 49)
        prompt = [rng.randrange(10, 500) for _ in range(rng.randrange(16, 300))]
        ttft, tpot = rng.choice((EASY, HARD)), rng.choice((EASY, HARD / 10))
        params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        body: dict[str, Any] = {"input_ids": prompt, "stream": True, "sampling_params": params}
        name = ("default", "chat", "gold", "default")[index % 4]
        if name == "gold":
            wire = {"class": name, "ttft_ms": ttft, "tpot_ms": tpot}
            params["custom_params"] = {"kairos": wire}
        else:
            body |= {"slo": {"class": name, "ttft_ms": ttft, "tpot_ms": tpot}}
        if bootstrap_port is not None:
            room = rng.getrandbits(62)
            body |= {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap_port}
            body |= {"bootstrap_room": room, "rid": f"straight-{room}"}
        row = Request(index / 10, len(prompt), tokens)
        jobs.append(Job(row, ttft, tpot, orjson.dumps(body)))
        classes.append("other" if name == "gold" else name)
    return jobs, classes


def send(cluster: Cluster, jobs: list[Job], *, straight: bool) -> list[Outcome]:
    """Through the router, or to both servers at once; as their client sees it."""

    async def main() -> list[Outcome]:
        if not straight:
            return (await replay(cluster.url, jobs, headers=KEY)).outcomes
        both = (cluster.prefill_urls[0], cluster.decode_urls[0])
        _, decode = await asyncio.gather(*(replay(url, jobs, headers=KEY) for url in both))
        return decode.outcomes

    return asyncio.run(main())


def clients_count(outcomes: list[Outcome], classes: list[str]) -> Counts:
    """Served requests by target, whether it was met, and class."""
    counts: Counts = Counter()
    for outcome, name in zip(outcomes, classes, strict=True):
        assert outcome.ok, outcome
        met = {"ttft": outcome.met_ttft, "tpot": outcome.met_tpot}
        met["both"] = all(met.values())
        counts.update((target, str(kept).lower(), name) for target, kept in met.items())
    return counts


def in_one_piece(outcomes: list[Outcome]) -> int:
    """Answers of many tokens that reached a busy client at once: it cannot tell what decoding took."""
    hard = [outcome for outcome in outcomes if outcome.tpot_slo_ms < HARD]
    return sum(outcome.output_tokens > 1 and outcome.met_tpot for outcome in hard)


class Exported:
    """The counters and sums of one server's /metrics that are Kairos' own."""

    def __init__(self, url: str) -> None:
        request = urllib.request.Request(url + "/metrics", headers=KEY)
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        self.samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("kairos_")
        ]

    def by(self, name: str, *labels: str) -> Counts:
        """The samples of that name, summed by these of their labels."""
        counts: Counts = Counter()
        for sample in self.samples:
            if sample.name == name:
                counts[tuple(sample.labels[label] for label in labels)] += sample.value  # type: ignore[assignment]
        return counts

    @property
    def slo(self) -> Counts:
        return self.by("kairos_slo_total", "target", "met", "slo_class")

    @property
    def outcomes(self) -> Counts:
        return self.by("kairos_requests_total", "outcome")
