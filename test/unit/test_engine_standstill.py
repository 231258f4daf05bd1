"""A prefill server full of optimistic prefills gives one back, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.hooks import prefill, standstill
from sglang_kairos.engine.state import scheduler_state

pytest.importorskip("sglang")


class Req:
    def __init__(self, rid: str, ttft_ms: float = 1000.0, pending: bool = True) -> None:
        self.rid, self.pending_bootstrap, self.grammar = rid, pending, None
        self.output_ids = [7]
        self.sampling_params = SimpleNamespace(
            custom_params={"kairos": {"ttft_ms": ttft_ms, "tpot_ms": 50.0}}
        )
        self.time_stats = SimpleNamespace(scheduler_recv_time=0.0)
        self.disagg_kv_sender = SimpleNamespace(poll=lambda: None)


class Scheduler(SimpleNamespace):
    """The queues of a prefill server; `returned` is whom upstream requeues."""

    def __init__(self, parked: list[Req], due: list[Req]) -> None:
        super().__init__(
            disaggregation_mode=SimpleNamespace(value="prefill"),
            device="cpu",
            tp_size=1,
            tp_worker=SimpleNamespace(),
            req_to_token_pool=SimpleNamespace(),
            server_args=SimpleNamespace(disaggregation_decode_allocation_policy="early"),
            disagg_prefill_inflight_queue=parked,
            disagg_prefill_bootstrap_queue=SimpleNamespace(queue=[]),
            req_to_metadata_buffer_idx_allocator=SimpleNamespace(available_size=lambda: 4),
            waiting_queue=due,
            last_batch=None,
            returned=[],
        )

    def has_bootstrapped_waiting_req(self) -> bool:
        return any(not req.pending_bootstrap for req in self.waiting_queue)

    def optimistic_release_and_requeue(self, req: Req) -> None:
        self.returned.append(req)


def after(scheduler: Any, batch: Any = None) -> list[Any]:
    """Who was given back at a scheduling point that launched `batch`."""
    made = scheduler_state.KairosState(scheduler, KairosConfig())
    standstill.give_way(made, scheduler, batch)
    assert made.counters["gave_way"] == len(scheduler.returned)
    return list(scheduler.returned)


def test_a_parked_prefill_gives_way_to_one_that_decode_has_reserved_for() -> None:
    soon, later = Req("soon", 100), Req("later", 9000)
    scheduler = Scheduler([later, soon], [Req("due", pending=False)])
    assert after(scheduler) == [later]
    assert scheduler.disagg_prefill_inflight_queue == [soon]


@pytest.mark.parametrize(
    "moves",
    [
        lambda s: setattr(s, "last_batch", object()),
        lambda s: setattr(s, "result_queue", [object()]),
        lambda s: s.disagg_prefill_inflight_queue.append(Req("sending", pending=False)),
        lambda s: setattr(s, "waiting_queue", [Req("not reserved either")]),
        lambda s: setattr(
            s.server_args, "disaggregation_decode_allocation_policy", "prefill_complete"
        ),
    ],
    ids=["a step", "a result", "a transfer", "nobody is due", "decode was told of the KV"],
)
def test_nobody_gives_way_while_something_moves_or_nothing_would_come_of_it(moves: Any) -> None:
    scheduler = Scheduler([Req("parked")], [Req("due", pending=False)])
    moves(scheduler)
    assert after(scheduler) == []


def test_nobody_gives_way_while_a_batch_is_launched() -> None:
    assert after(Scheduler([Req("parked")], [Req("due", pending=False)]), object()) == []


def test_without_a_metadata_buffer_a_reserved_one_in_the_bootstrap_queue_counts() -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    scheduler = Scheduler([Req("parked")], [])
    scheduler.disagg_prefill_bootstrap_queue.queue = [reserved := Req("reserved")]
    scheduler.req_to_metadata_buffer_idx_allocator.available_size = lambda: 0
    assert after(scheduler) == []
    reserved.disagg_kv_sender.poll = lambda: KVPoll.WaitingForInput
    assert len(after(scheduler)) == 1


def test_a_grammar_takes_its_token_back_and_one_that_cannot_stays() -> None:
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject

    class Takes(BaseGrammarObject):
        back = 0

        def rollback(self, k: int) -> None:
            self.back += k

    able, unable = Req("able"), Req("unable", 9000)
    able.grammar, unable.grammar = Takes(), BaseGrammarObject()
    able.grammar.finished = True
    scheduler = Scheduler([able, unable], [Req("due", pending=False)])
    assert after(scheduler) == [able]
    assert able.grammar.back == 1 and not able.grammar.finished
    scheduler.returned.clear()
    assert after(scheduler) == []


@pytest.mark.parametrize("order", [True, False])
def test_the_scheduling_point_of_prefill_looks_for_a_standstill(
    order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler([Req("parked")], [Req("due", pending=False)])
    made = scheduler_state.KairosState(scheduler, KairosConfig(order=order))
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    monkeypatch.setattr(prefill, "learn_from_synchronous_step", lambda state: None)
    monkeypatch.setattr(prefill, "_apply_plan", lambda state, scheduler: [])
    nothing = SimpleNamespace(batch_to_run=None)
    prefill.get_new_batch_prefill(lambda s, b: nothing, scheduler, None)
    assert len(scheduler.returned) == 1
