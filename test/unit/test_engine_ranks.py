"""Ranks: rank 0's decision everywhere, clocks that differ under test, refusals at the start."""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.engine.hooks import lifecycle
from sglang_kairos.engine.state import scheduler_state, tp_sync


def test_one_rank_asks_nobody() -> None:
    decision = object()
    assert tp_sync.agreement(SimpleNamespace(tp_size=1), Counter())(decision) is decision


def rank_main(rank: int, file: str, chaos: str, answers: Any) -> None:
    import os

    import torch.distributed as dist

    os.environ[tp_sync.CHAOS_CLOCK] = chaos
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=4)
    # Two tensor-parallel ranks in each of two context-parallel ones, as SGLang numbers them.
    tp_groups = [dist.new_group([0, 1], backend="gloo"), dist.new_group([2, 3], backend="gloo")]
    cp_groups = [dist.new_group([0, 2], backend="gloo"), dist.new_group([1, 3], backend="gloo")]
    scheduler = SimpleNamespace(
        tp_size=4,
        attn_tp_cpu_group=tp_groups[rank // 2],
        attn_cp_cpu_group=cp_groups[rank % 2],
    )
    counters: Counter[str] = Counter()
    agree = tp_sync.agreement(scheduler, counters)
    got = [agree(([rank, 7], rank, None, [])), agree(None if rank else [1]), agree("same")]
    got.append(agree(list(range(5000 + rank))))  # more than a first message holds
    got.append(agree([rank] * rank or b"x" * (tp_sync.FIRST_BYTES - 20)))
    clock = tp_sync.SharedClock(scheduler)
    answers.put((rank, got, counters["disagreements"], clock.skew_s))
    dist.destroy_process_group()


@pytest.mark.parametrize("chaos", ["", "20"])
def test_every_rank_gets_rank_0s_decision(tmp_path: Path, chaos: str) -> None:
    pytest.importorskip("torch")
    context = multiprocessing.get_context("fork")  # importing torch takes seconds
    answers = context.Queue()
    processes = [
        context.Process(target=rank_main, args=(rank, str(tmp_path / "store"), chaos, answers))
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    for _, got, disagreements, skew_s in results:
        long, brim = list(range(5000)), b"x" * (tp_sync.FIRST_BYTES - 20)
        assert got == [([0, 7], 0, None, []), [1], "same", long, brim]
        assert skew_s == (0.02 if chaos else 0.0)
        assert disagreements >= 2 if chaos else disagreements == 0


def test_chaos_clocks_differ_between_ranks_and_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tp_sync.CHAOS_CLOCK, "500")
    clock = tp_sync.SharedClock(SimpleNamespace(tp_size=1))
    plain = [clock.now() for _ in range(20)]
    assert plain != sorted(plain)
    assert len({clock.measured(1.0) for _ in range(9)}) == 9
    monkeypatch.setenv(tp_sync.CHAOS_CLOCK, "")
    calm = tp_sync.SharedClock(SimpleNamespace(tp_size=1))
    assert calm.measured(1.0) == 1.0 and calm.now() <= calm.now()


def runtime(monkeypatch: pytest.MonkeyPatch, pp_size: int) -> None:
    module = SimpleNamespace(get_parallel=lambda: SimpleNamespace(pp_size=pp_size))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", module)  # type: ignore[arg-type]


def test_pipeline_parallelism_is_refused_before_the_hand_shake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime(monkeypatch, 2)
    for seam in (lifecycle.get_init_info, lifecycle.run_event_loop):
        with pytest.raises(RuntimeError, match=r"--pp-size > 1.*--kairos off"):
            seam(lambda scheduler: {}, None)
    assert scheduler_state.current() is None
    runtime(monkeypatch, 1)
    assert "kairos" in lifecycle.get_init_info(lambda scheduler: {"other": 1}, None)


def test_the_mode_follows_a_server_that_switches_its_role() -> None:
    from helpers.fake_scheduler import make_scheduler
    from sglang_kairos.config import KairosConfig

    scheduler = make_scheduler([], None)
    kairos = scheduler_state.KairosState(scheduler, KairosConfig())
    assert kairos.mode == "prefill" and "prefill" in kairos.report()
    scheduler.disaggregation_mode.value = "decode"
    assert kairos.mode == "decode" and "decode" in kairos.report()


def test_under_dp_attention_every_data_parallel_rank_speaks_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks as torch.distributed has them: 2 of 4 in a group of 2, where it is the first."""
    dist = SimpleNamespace(
        get_world_size=lambda group: group.size, get_rank=lambda group=None: group.rank
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", dist)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(distributed=dist))  # type: ignore[arg-type]

    def scheduler(size: int, rank: int) -> Any:
        group = SimpleNamespace(size=size, rank=rank)
        return SimpleNamespace(tp_size=4, attn_tp_cpu_group=group)

    assert tp_sync.leads(SimpleNamespace(tp_size=1))
    assert tp_sync.leads(scheduler(2, 0)) and not tp_sync.leads(scheduler(2, 1))
    assert tp_sync.leads(scheduler(1, 0))
