"""Load generators against a real pair: what `kairos report` makes of their files is what the router
and the decode server counted.

Bounds: counts are equal. A mean TTFT at the client is the router's and at most 40 ms and a third more
(its own connection; and on two cores it waits for its turn), a mean TPOT differs by 1 ms or a fifth at
most. Attainment differs by those whose time is that near to the target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from pd_client import trouble_in
from router_counts import Counted, counted

from helpers.load_generators import TOOLS, Load
from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.reports.formats import Reading, known_tools, read_results
from sglang_kairos.reports.outcomes import Targets

PLAIN = Load(60, 4.0, output=16, spread=4, longest=32, ttft_ms=150.0, tpot_ms=12.0)
# Longer answers than the servers' running time-out leaves time for; more at once than the router takes.
TROUBLE = Load(48, 6.0, output=250, spread=400, longest=900, ttft_ms=5000.0, tpot_ms=500.0)
RUNNING_TIMEOUT_S = 1.5
LATER, LATER_MS = 1 / 3, 40.0
TPOT_APART, TPOT_APART_MS = 0.2, 1.0

pytestmark = pytest.mark.timeout(600)
# In `make test` there is SGLang's own benchmark only, of which test_bench_goodput has a run.
each_tool = pytest.mark.parametrize(
    "tool", [pytest.param(name, marks=pytest.mark.slow) for name in TOOLS]
)


@pytest.fixture(scope="module")
def spec(zygote: Zygote, tiny_model: str, out_dir: Path) -> ClusterSpec:
    log_dir = out_dir / "load-generators"
    return ClusterSpec(model_path=tiny_model, zygote=zygote, log_dir=log_dir)


@pytest.fixture(scope="module")
def cluster(spec: ClusterSpec) -> Iterator[Cluster]:
    with Cluster(spec) as running:
        yield running
        assert not trouble_in(running.logs)


@pytest.fixture(scope="module")
def impatient(spec: ClusterSpec) -> Iterator[Cluster]:
    """A pair that ends answers that take long, behind a router that takes few at once."""
    spec = replace(
        spec,
        router_args=("--max-concurrent-requests", "16"),
        env={"SGLANG_REQ_RUNNING_TIMEOUT": str(RUNNING_TIMEOUT_S)},
    )
    with Cluster(spec) as running:
        yield running
        assert not trouble_in(running.logs)


def measured(
    tool: str, load: Load, cluster: Cluster, model: str, folder: Path
) -> tuple[Reading, Counted]:
    """A run of `tool`: its file as the report reads it, and what was counted meanwhile."""
    before = counted(cluster)
    file = TOOLS[tool](cluster.url, model, load, folder)
    cluster.check()
    reading = read_results(file, Targets(load.ttft_ms, load.tpot_ms), one_token_as_tool=False)
    assert len(reading.results) == 1
    return reading, counted(cluster) - before


@each_tool
def test_the_report_counts_and_measures_what_the_router_does(
    tool: str, cluster: Cluster, tiny_model: str, tmp_path: Path
) -> None:
    reading, seen = measured(tool, PLAIN, cluster, tiny_model, tmp_path)
    (result,) = reading.results
    outcomes, metrics = result.outcomes, result.metrics
    assert metrics.sent == seen.answers() == PLAIN.count
    assert metrics.failed == seen.answers() - seen.answers("200") == 0, Counter(
        one.error for one in outcomes
    )
    several = [outcome for outcome in outcomes if outcome.output_tokens > 1]
    assert seen.met("ttft")[1] == PLAIN.count
    assert seen.met("tpot")[1] == len(several)
    ttft_ms = mean(outcome.ttft_ms for outcome in outcomes)
    tpot_ms = mean(outcome.tpot_ms for outcome in several)
    print(f"{tool}: TTFT {ttft_ms:.1f} / {seen.mean_ms('ttft'):.1f} ms, ", end="")
    print(f"TPOT {tpot_ms:.2f} / {seen.mean_ms('tpot'):.2f} ms, ", end="")
    print(f"met {sum(o.met_ttft for o in outcomes)} / {seen.met('ttft')[0]}, ", end="")
    print(f"{sum(o.met_tpot for o in several)} / {seen.met('tpot')[0]} of {PLAIN.count}")
    assert -1.0 < ttft_ms - seen.mean_ms("ttft") < LATER_MS + LATER * seen.mean_ms("ttft")
    assert tpot_ms == pytest.approx(seen.mean_ms("tpot"), rel=TPOT_APART, abs=TPOT_APART_MS)
    latest = PLAIN.ttft_ms + 2 * (LATER_MS + LATER * PLAIN.ttft_ms)
    near = [one for one in outcomes if PLAIN.ttft_ms < one.ttft_ms <= latest]
    missed_late = seen.met("ttft")[0] - sum(one.met_ttft for one in outcomes)
    assert 0 <= missed_late <= len(near)
    room = 2 * max(TPOT_APART * PLAIN.tpot_ms, TPOT_APART_MS)
    near = [one for one in several if abs(one.tpot_ms - PLAIN.tpot_ms) < room]
    assert abs(sum(one.met_tpot for one in several) - seen.met("tpot")[0]) <= len(near)


@each_tool
def test_what_the_server_ended_and_the_router_refused_has_failed_in_the_report(
    tool: str, impatient: Cluster, tiny_model: str, tmp_path: Path
) -> None:
    reading, seen = measured(tool, TROUBLE, impatient, tiny_model, tmp_path)
    (result,) = reading.results
    metrics = result.metrics
    statuses = Counter(outcome.status for outcome in result.outcomes)
    print(tool, statuses, dict(seen.router), dict(seen.served), sep="\n  ")
    assert metrics.sent == seen.answers() == TROUBLE.count
    answered = [outcome for outcome in result.outcomes if outcome.ok]
    assert len(answered) == seen.served["served"] > 0
    ended = seen.served["failed"]
    assert ended > 0, "nobody ran into the time-out: the test proves nothing"
    refused = seen.answers("429")
    assert metrics.failed == ended + refused
    # The router counts a TPOT for whole answers only, and none for those of one token.
    several = [outcome for outcome in answered if outcome.output_tokens > 1]
    assert seen.met("tpot")[1] == len(several)
    # Nobody who was answered missed these targets: attainment is what was answered, of all sent.
    assert metrics.e2e_attainment == pytest.approx(len(answered) / TROUBLE.count)


def test_every_tool_is_read() -> None:
    names = {"bench": "sglang.benchmark.serving", "guidellm": "GuideLLM"}
    assert {names.get(tool, tool) for tool in TOOLS} == set(known_tools())
