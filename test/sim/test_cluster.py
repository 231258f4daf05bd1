"""The simulated cluster: nothing is lost, nothing appears, memory holds, and it is repeatable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sglang_kairos.loads.traces import Request, long_tail, rate_of, read_trace, scale_rate
from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.sim.baselines.policies import POLICIES
from sglang_kairos.sim.core.cluster import Setup, SimCluster
from sglang_kairos.sim.core.predictions import PredictionError
from sglang_kairos.sim.hardware.times import MINIMAX_M25_H200_TP4, LawTimes, System

# About a CPU: a long prompt takes seconds, twenty decodes fill the TPOT target.
SLOW = LawTimes(PrefillLatency(5e-3, 1e-4, 1e-9), DecodeLatency(3.5e-3, 0.22e-3, 0.65e-6))
TIGHT = System(
    SLOW,
    chunk_tokens=512,
    prefill_kv_tokens=20_000,
    decode_kv_tokens=18_000,
    max_running=64,
    reserved_tokens=8,
    kv_bytes=4096,
    link_bytes_per_s=1e9,
)
ROOMY = replace(TIGHT, prefill_kv_tokens=10**6, decode_kv_tokens=10**6)
SETUP = Setup(TIGHT, ttft_ms=(500.0, 4000.0), tpot_ms=8.0)


def shared_prefixes(rows: list[Request], tokens: int = 64) -> list[Request]:
    """Every prompt begins like that of the request nine before it, for half of its length."""
    made = []
    for index, row in enumerate(rows):
        blocks = -(-row.input_tokens // tokens)
        own = [1000 * index + i for i in range(blocks)]
        common = [1_000_000 + 1000 * (index % 9) + i for i in range(blocks // 2)]
        hashes = (*common, *own[blocks // 2 :])
        made.append(replace(row, hash_ids=hashes, block_tokens=tokens))
    return made


ROWS = shared_prefixes(long_tail(70, 6.0, seed=3))


class Meter(LawTimes):
    """Step times that add up what was executed and check memory at every step."""

    def __init__(self) -> None:
        super().__init__(SLOW.prefill_law, SLOW.decode_law)
        self.cluster: SimCluster | None = None
        self.prefill_tokens = self.decode_tokens = 0
        self.seconds = 0.0
        self.last_s = 0.0

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        assert 0 < sum(new_tokens) <= TIGHT.chunk_tokens and min(new_tokens) > 0
        self.prefill_tokens += sum(new_tokens)
        return self._check(super().prefill_s(new_tokens, prefix_tokens))

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        assert 0 < batch <= kv_tokens
        self.decode_tokens += batch
        return self._check(super().decode_s(batch, kv_tokens))

    def _check(self, seconds: float) -> float:
        cluster = self.cluster
        assert cluster is not None and cluster.clock.now_s >= self.last_s
        self.last_s = cluster.clock.now_s
        for prefill in cluster.prefills:
            assert prefill.cache.held_tokens >= 0
            assert prefill.cache.used_tokens <= prefill.cache.capacity_tokens
        for decode in cluster.decodes:
            assert 0 <= decode.kv_tokens <= cluster.setup.system.decode_kv_tokens
        self.seconds += seconds
        return seconds


def run(cluster: SimCluster) -> list[dict[str, object]]:
    return [asdict(outcome) for outcome in cluster.run().outcomes]


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (1, 1)) for name in POLICIES), ("fcfs", (2, 3)), ("kairos", (2, 3))],
)
def test_every_token_is_computed_once_and_memory_is_never_exceeded(
    name: str, shape: tuple[int, int]
) -> None:
    meter = Meter()
    system = replace(TIGHT, times=meter)
    setup = replace(SETUP, system=system, prefills=shape[0], decodes=shape[1])
    cluster = meter.cluster = SimCluster(setup, POLICIES[name], ROWS)
    outcomes = cluster.run().outcomes
    assert [o.index for o in outcomes] == list(range(len(ROWS)))
    assert all(o.ok and o.output_tokens == o.asked_tokens for o in outcomes)
    assert meter.prefill_tokens == sum(r.prompt - r.hit for r in cluster.requests)
    assert all(r.done == r.prompt and r.hit + r.computed == r.prompt for r in cluster.requests)
    assert meter.decode_tokens == sum(r.output - 1 for r in cluster.requests)
    busy = [server.busy_s for server in cluster.prefills] + [s.busy_s for s in cluster.decodes]
    assert sum(busy) == pytest.approx(meter.seconds)
    assert max(busy) <= max(o.ended_s for o in outcomes)
    for o in outcomes:
        assert o.sent_s < o.first_token_s <= o.last_token_s == o.ended_s
    for prefill in cluster.prefills:
        assert not (prefill.waiting or prefill.paused or prefill.slot or prefill.cache.held_tokens)
        assert prefill.cache.free_tokens == prefill.cache.capacity_tokens
    for decode in cluster.decodes:
        assert not (decode.asking or decode.ready or decode.running or decode.retracted)
        assert decode.kv_tokens == decode.in_flight == 0
    assert sum(r.hit for r in cluster.requests) > 0


def test_short_memory_retracts_and_still_serves_everybody() -> None:
    system = replace(ROOMY, decode_kv_tokens=1500, reserved_tokens=1)
    rows = [Request(0.0, 100, 300) for _ in range(12)]
    for name in ("fcfs", "kairos"):
        cluster = SimCluster(replace(SETUP, system=system), POLICIES[name], rows)
        assert cluster.run().metrics.failed == 0
        assert cluster.facts()["counters"]["retractions"] > 0
        assert cluster.decodes[0].max_kv_tokens <= 1500


def test_a_request_that_can_never_fit_is_refused_at_once_and_counted() -> None:
    rows = [Request(0.0, 30_000, 5), Request(0.0, 100, 5)]
    metrics = SimCluster(SETUP, POLICIES["fcfs"], rows).run().metrics
    assert (metrics.sent, metrics.failed) == (2, 1)
    assert metrics.ttft_attainment == 0.5


def test_a_lone_request_takes_what_the_laws_say() -> None:
    system = replace(ROOMY, kv_bytes=1e3, link_bytes_per_s=1e6, link_latency_s=0.25)
    cluster = SimCluster(replace(SETUP, system=system), POLICIES["fcfs"], [Request(1.0, 600, 3)])
    outcome = cluster.run().outcomes[0]
    computed = SLOW.prefill_s([512], [0]) + SLOW.prefill_s([88], [512])
    # The first chunk's 0.512 s on the wire outlast the second chunk.
    crossed = SLOW.prefill_s([512], [0]) + 0.600 + 0.25
    assert computed < crossed - 0.25
    assert outcome.ttft_ms == pytest.approx(crossed * 1e3)
    steps = SLOW.decode_s(1, 601) + SLOW.decode_s(1, 602)
    assert outcome.tpot_ms == pytest.approx(steps * 1e3 / 2)


def test_a_cached_prefix_is_not_computed_again() -> None:
    rows = [
        Request(0.0, 512, 1, (1, 2, 3, 4), 128),
        Request(5.0, 512, 1, (1, 2, 3, 4), 128),
        Request(9.0, 300, 1, (1, 2, 9), 128),
    ]
    cluster = SimCluster(replace(SETUP, system=ROOMY), POLICIES["fcfs"], rows)
    cluster.run()
    assert [req.hit for req in cluster.requests] == [0, 511, 256]


def test_prefill_starts_only_after_decode_has_room() -> None:
    system = replace(ROOMY, decode_kv_tokens=1000)
    rows = [Request(0.0, 600, 100), Request(0.0, 600, 100)]
    cluster = SimCluster(replace(SETUP, system=system), POLICIES["fcfs"], rows)
    first, second = cluster.run().outcomes
    assert second.first_token_s > first.last_token_s


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    noisy = replace(SETUP, error=PredictionError(noise=0.3), prefills=2, decodes=2)
    rows = ROWS[:40]
    runs = [run(SimCluster(replace(noisy, seed=s), POLICIES["kairos"], rows)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_fcfs_prefills_in_order_of_arrival() -> None:
    cluster = SimCluster(SETUP, POLICIES["fcfs"], ROWS)
    order: list[int] = []
    cluster.prefills[0]._prefilled = lambda req: order.append(req.index)
    cluster.run()
    assert order == list(range(len(ROWS)))


def at_load(n: int, load: float, seed: int, system: System) -> list[Request]:
    """A made trace whose prompts keep one prefill server busy for this share of the time."""
    rows = long_tail(n, 1.0, seed)
    model = system.times.prefill_model()
    chunk = system.chunk_tokens
    work = sum(float(model.remaining_s(row.input_tokens, 0, chunk)) for row in rows) / n
    return scale_rate(rows, load / work)


@pytest.mark.parametrize("error", [PredictionError(), PredictionError(learn=True)])
def test_kairos_keeps_more_promises_than_fcfs_on_a_long_tail_at_90_percent_load(
    error: PredictionError,
) -> None:
    setup = Setup(ROOMY, ttft_ms=(1000.0,), tpot_ms=30.0, error=error)
    rows = at_load(500, 0.9, 7, ROOMY)
    met = {
        name: SimCluster(setup, POLICIES[name], rows).run().metrics.ttft_attainment
        for name in ("fcfs", "shortest-prefill-first", "kairos")
    }
    assert met["kairos"] >= met["fcfs"] + 0.2
    assert met["kairos"] >= max(met.values()) - 0.01


def test_packing_keeps_more_tpot_promises_than_running_everybody_past_capacity() -> None:
    setup = Setup(ROOMY, ttft_ms=(4000.0,), tpot_ms=15.0)
    rows = [replace(row, input_tokens=200) for row in long_tail(300, 14.0, seed=5)]
    stock, packed = (
        SimCluster(setup, POLICIES[name], rows).run().metrics for name in ("fcfs", "kairos-decode")
    )
    assert packed.tpot_attainment >= stock.tpot_attainment + 0.05
    assert packed.decode_tokens_per_s >= 0.98 * stock.decode_tokens_per_s


STOCK_DECODE = replace(POLICIES["kairos"], name="stock-decode", gate=False, park=False)


@pytest.mark.parametrize("seed", [1, 2])
def test_with_room_for_everybody_not_one_step_differs_from_stock_decode(seed: int) -> None:
    setup = Setup(ROOMY, ttft_ms=(4000.0,), tpot_ms=30.0)
    rows = [replace(row, input_tokens=200) for row in long_tail(150, 8.0, seed)]
    stock, kairos = (
        SimCluster(setup, policy, rows) for policy in (STOCK_DECODE, POLICIES["kairos"])
    )
    assert run(stock) == run(kairos)
    assert kairos.facts()["counters"].get("subset_steps", 0) == 0


@pytest.mark.parametrize("rate", [12.0, 14.0, 18.0])
@pytest.mark.parametrize("learn", [False, True])
def test_past_capacity_tpot_and_both_improve_and_ttft_does_not_suffer(
    rate: float, learn: bool
) -> None:
    setup = Setup(ROOMY, ttft_ms=(2000.0,), tpot_ms=15.0, error=PredictionError(learn=learn))
    rows = [replace(row, input_tokens=200) for row in long_tail(250, rate, seed=4)]
    stock, kairos = (
        SimCluster(setup, policy, rows).run().metrics
        for policy in (STOCK_DECODE, POLICIES["kairos"])
    )
    assert kairos.tpot_attainment >= stock.tpot_attainment
    assert kairos.e2e_attainment >= stock.e2e_attainment
    assert kairos.ttft_attainment >= stock.ttft_attainment - 0.01


def test_short_of_slots_the_gate_keeps_more_promises_than_parking_alone() -> None:
    system = replace(ROOMY, max_running=40)
    setup = Setup(system, ttft_ms=(2000.0,), tpot_ms=12.0)
    rows = [replace(row, input_tokens=200) for row in long_tail(400, 20.0, seed=6)]
    stock, no_gate, kairos = (
        SimCluster(setup, policy, rows).run().metrics.e2e_attainment
        for policy in (STOCK_DECODE, POLICIES["kairos-no-gate"], POLICIES["kairos"])
    )
    assert kairos >= no_gate >= stock
    assert kairos >= stock + 0.2


def test_shipped_traces_run(shared_dir: Path | None) -> None:
    if shared_dir is None:
        pytest.skip("no traces on this machine")
    for path in sorted((shared_dir / "traces").glob("*.*l*")):
        if path.suffix in (".jsonl", ".csv"):
            rows = read_trace(path)[:150]
            setup = Setup(MINIMAX_M25_H200_TP4)
            result = SimCluster(setup, POLICIES["kairos"], scale_rate(rows, rate_of(rows))).run()
            assert result.metrics.failed == 0
