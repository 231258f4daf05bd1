"""A prefill server full of optimistic prefills gives one back, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import Req, make_scheduler
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.hooks import prefill, standstill
from sglang_kairos.engine.state import scheduler_state

pytest.importorskip("sglang")


def pending(rid: str, ttft_ms: float = 1000.0) -> Req:
    """An optimistic prefill that decode has not reserved for; its first token is computed."""
    return Req(rid, ttft_ms=ttft_ms, output_ids=[7], pending=True)


def full(parked: list[Req], due: list[Req]) -> Any:
    """A prefill server whose memory `parked` fill while `due` wait."""
    scheduler = make_scheduler(due, None)
    scheduler.disagg_prefill_inflight_queue = parked
    return scheduler


def after(scheduler: Any, batch: Any = None) -> list[Any]:
    """Who was given back at a scheduling point that launched `batch`."""
    made = scheduler_state.KairosState(scheduler, KairosConfig())
    standstill.give_way(made, scheduler, batch)
    assert made.counters["gave_way"] == len(scheduler.returned)
    return list(scheduler.returned)


def test_a_parked_prefill_gives_way_to_one_that_decode_has_reserved_for() -> None:
    soon, later = pending("soon", 100), pending("later", 9000)
    scheduler = full([later, soon], [Req("due")])
    assert after(scheduler) == [later]
    assert scheduler.disagg_prefill_inflight_queue == [soon]


@pytest.mark.parametrize(
    "moves",
    [
        lambda s: setattr(s, "last_batch", object()),
        lambda s: setattr(s, "result_queue", [object()]),
        lambda s: s.disagg_prefill_inflight_queue.append(Req("sending")),
        lambda s: setattr(s, "waiting_queue", [pending("not reserved either")]),
        lambda s: setattr(
            s.server_args, "disaggregation_decode_allocation_policy", "prefill_complete"
        ),
    ],
    ids=["a step", "a result", "a transfer", "nobody is due", "decode was told of the KV"],
)
def test_nobody_gives_way_while_something_moves_or_nothing_would_come_of_it(moves: Any) -> None:
    scheduler = full([pending("parked")], [Req("due")])
    moves(scheduler)
    assert after(scheduler) == []


def test_nobody_gives_way_while_a_batch_is_launched() -> None:
    assert after(full([pending("parked")], [Req("due")]), object()) == []


def test_without_a_metadata_buffer_a_reserved_one_in_the_bootstrap_queue_counts() -> None:
    from sglang.srt.disaggregation.base.conn import KVPoll

    scheduler = full([pending("parked")], [])
    scheduler.disagg_prefill_bootstrap_queue.queue = [reserved := pending("reserved")]
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

    able, unable = pending("able"), pending("unable", 9000)
    able.grammar, unable.grammar = Takes(), BaseGrammarObject()
    able.grammar.finished = True
    scheduler = full([able, unable], [Req("due")])
    assert after(scheduler) == [able]
    assert able.grammar.back == 1 and not able.grammar.finished
    scheduler.returned.clear()
    assert after(scheduler) == []


@pytest.mark.parametrize("order", [True, False])
def test_the_scheduling_point_of_prefill_looks_for_a_standstill(
    order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = full([pending("parked")], [Req("due")])
    made = scheduler_state.KairosState(scheduler, KairosConfig(order=order))
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    monkeypatch.setattr(prefill, "learn_from_synchronous_step", lambda state: None)
    monkeypatch.setattr(prefill, "_apply_plan", lambda state, scheduler: [])
    nothing = SimpleNamespace(batch_to_run=None)
    prefill.get_new_batch_prefill(lambda s, b: nothing, scheduler, None)
    assert len(scheduler.returned) == 1
