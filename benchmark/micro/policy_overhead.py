"""What a prefill decision costs: Kairos through its engine glue, its pure policy, upstream's hrrn.

    python -m benchmark.micro.policy_overhead --json out/policy_overhead.json

The same long-tailed queue of 100, 1,000 and 10,000 waiting requests is put to each, in alternation.
No server, no GPU. SGLang must be installed: its `SchedulePolicy` is imported, with a prefix cache
that never hits. SGLang's own `Req` is replaced by one with the fields that the code reads.

- `glue`: `get_new_batch_prefill` around an upstream that admits nothing: the whole of Kairos' work
- `glue_arrivals`: the same when a hundredth of the queue has just come, not seen before
- `policy`: `plan_prefill` on ready arrays
- `hrrn`: upstream's `calc_priority`. Above 128 waiting requests it gives up and serves first come
  first served; `hrrn_unlimited` is the same without that limit: what its order would cost
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmark.harness.arguments import parser_for
from benchmark.harness.experiment import write_json
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.hooks import prefill
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.policy.prefill_step import PrefillQueue, plan_prefill
from sglang_kairos.predict.online_prefill import PrefillTimeModel

SIZES = (100, 1_000, 10_000)
TARGETS_MS = {1_000: 1.0, 10_000: 10.0}
CHUNK_TOKENS = 512


class CostedReq:
    """The fields of SGLang's request that the decisions read."""

    def __init__(self, rng: random.Random, index: int, age_s: float) -> None:
        length = min(16_000, max(8, int(rng.lognormvariate(6.0, 1.2))))
        self.rid, self.extra_key, self.cache_salt = f"{index:06d}", None, None
        self.origin_input_ids, self.output_ids = [0] * length, []  # type: ignore[var-annotated]
        self.num_matched_prefix_tokens = self.prefix_len = self.host_hit_length = 0
        self.extend_end = None
        self.pending_bootstrap = False
        self.arrival_processed_tokens = rng.randrange(1_000_000)
        wire = {"kairos": {"ttft_ms": rng.choice([500, 2_000, 10_000, 60_000]), "tpot_ms": 50}}
        self.sampling_params = SimpleNamespace(custom_params=wire)
        arrival = time.perf_counter() - age_s * rng.random()
        self.time_stats = SimpleNamespace(
            scheduler_recv_time=arrival, wait_queue_entry_time=arrival
        )


def fake_scheduler(queue: list[CostedReq]) -> Any:
    """Returns as much of SGLang's prefill scheduler as the glue looks at."""
    return SimpleNamespace(
        waiting_queue=list(queue),
        chunked_req=None,
        chunked_prefill_size=CHUNK_TOKENS,
        max_prefill_tokens=16_384,
        page_size=1,
        tp_size=1,
        device="cpu",
        tree_cache=SimpleNamespace(disable=True, evictable_size=lambda: 0),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 1_000_000),
        disaggregation_mode=SimpleNamespace(value="prefill"),
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=list),
    )


def upstream_hrrn() -> tuple[Any, Any]:
    """SGLang's own `SchedulePolicy("hrrn")` and its module, over a cache that never hits."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from sglang.srt.managers import schedule_policy

    def match(req: CostedReq, cache: Any, token_ids: Any = None) -> None:
        req.num_matched_prefix_tokens = req.prefix_len = 0

    schedule_policy.match_kv_cache = match
    schedule_policy.IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD = -1  # no second, in-batch cache
    cache = SimpleNamespace(
        disable=False,
        supports_fast_match_prefix=lambda: False,
        supports_prefix_sharing=lambda: False,
    )
    schedule_policy.get_disagg = lambda: SimpleNamespace(disaggregation_mode="prefill")
    schedule_policy.get_memory = lambda: SimpleNamespace(radix_eviction_policy="lru")
    policy = schedule_policy.SchedulePolicy("hrrn", cache, False, False, False)
    return policy, schedule_policy


def measure(count: int, repeat: int, seed: int) -> dict[str, list[float]]:
    """Returns milliseconds of each contender, `repeat` times in alternation, over `count` requests."""
    rng = random.Random(seed)
    queue = [CostedReq(rng, i, age_s=5.0) for i in range(count)]
    scheduler = fake_scheduler(queue)
    kairos = scheduler_state.CURRENT = scheduler_state.KairosState(scheduler, KairosConfig())
    kairos.prefill_time = PrefillTimeModel(1e-3, 1e-4, 1e-9)
    hrrn, module = upstream_hrrn()
    limit = module.WAITING_QUEUE_PREFIX_MATCH_MAX
    nothing = SimpleNamespace(batch_to_run=None, running_batch=None)

    def upstream(scheduler: Any, running_batch: Any) -> Any:
        prefill.calc_priority(lambda *a: None, None, scheduler.waiting_queue)
        return nothing

    def glue() -> None:
        prefill.get_new_batch_prefill(upstream, scheduler, None)

    def policy() -> None:
        plan_prefill(
            PrefillQueue(work, slack, tokens, none),
            chunk_tokens=CHUNK_TOKENS,
            current=-1,
            free_tokens=1_000_000,
            max_paused=8,
        )

    def calc_priority() -> None:
        hrrn.calc_priority(queue, None, processed_tokens=2_000_000)

    took: dict[str, list[float]] = {
        name: [] for name in ("glue", "glue_arrivals", "policy", "hrrn", "hrrn_unlimited")
    }

    def clock(name: str, act: Callable[[], None]) -> None:
        begun = time.perf_counter()
        act()
        took[name].append(1e3 * (time.perf_counter() - begun))

    glue()
    for _ in range(repeat):
        clock("glue", glue)
        rng.shuffle(scheduler.waiting_queue)
        gone = set(scheduler.waiting_queue[: count // 100])
        scheduler.waiting_queue = scheduler.waiting_queue[count // 100 :]
        queue = [req for req in queue if req not in gone]
        gone.clear()
        new = [CostedReq(rng, i, age_s=0.0) for i in range(count // 100)]
        queue += new
        scheduler.waiting_queue += new
        clock("glue_arrivals", glue)
        rows = kairos.roster.rows(queue)
        roster = kairos.roster
        tokens = roster.tokens[rows]
        slack = roster.arrival_s[rows] + roster.ttft_s[rows] - kairos.now()
        work, none = tokens * 1e-4, np.zeros(count, bool)
        clock("policy", policy)
        clock("hrrn", calc_priority)
        module.WAITING_QUEUE_PREFIX_MATCH_MAX = 10**9
        clock("hrrn_unlimited", calc_priority)
        module.WAITING_QUEUE_PREFIX_MATCH_MAX = limit
    scheduler_state.CURRENT = None
    assert len(scheduler.waiting_queue) == count and not kairos.counters["urgency_errors"]
    return took


def main(argv: list[str] | None = None) -> int:
    """Prints a table and writes ``--json``. Returns 1 when the glue's median misses a target."""
    parser = parser_for("benchmark.micro.policy_overhead", __doc__, json=None)
    parser.add_argument("--repeat", type=int, default=31, help="times each is measured")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error("--repeat: must be at least 1")
    report: dict[str, Any] = {"repeat": args.repeat, "seed": args.seed, "unit": "ms", "waiting": {}}
    print(f"{'waiting':>8} {'':<16} {'median':>9} {'p10':>9} {'p90':>9}   ms a decision")
    missed = False
    for count in SIZES:
        cell = report["waiting"][str(count)] = {}
        for name, took in measure(count, args.repeat, args.seed).items():
            low, high = np.quantile(took, [0.1, 0.9]).tolist()
            cell[name] = {"median": statistics.median(took), "p10": low, "p90": high}
            print(f"{count:>8} {name:<16} {cell[name]['median']:>9.3f} {low:>9.3f} {high:>9.3f}")
        if count in TARGETS_MS:
            met = cell["glue"]["median"] <= TARGETS_MS[count]
            cell["target_ms"], cell["target_met"] = TARGETS_MS[count], met
            missed |= not met
            print(f"{count:>8} target {TARGETS_MS[count]:g} ms: {'met' if met else 'MISSED'}")
    if args.json:
        write_json(args.json, report)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
