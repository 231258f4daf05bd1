"""Ends a standstill of a prefill server whose KV is full of optimistic prefills (`policy.standstill`)."""

from __future__ import annotations

from typing import Any

from sglang_kairos.engine import compat
from sglang_kairos.engine.state.scheduler_state import KairosState
from sglang_kairos.policy.standstill import who_gives_way


def give_way(state: KairosState, scheduler: Any, batch: Any) -> None:
    """Requeues one parked request if all stand still; called after a scheduling point.

    `batch`: what that scheduling point launched; None: nothing. Every condition is on the queues'
    contents, which are alike on all ranks; only clocks differ.
    """
    in_flight = getattr(scheduler, "disagg_prefill_inflight_queue", [])
    if batch is not None or not in_flight:
        return
    waiting = [req for req in in_flight if req.pending_bootstrap]
    parked = [req for req in waiting if compat.may_compute_again(req)]
    if not parked or _computing(scheduler) or not _may_be_requeued(scheduler):
        return
    sending = len(in_flight) - len(waiting)
    due = int(scheduler.has_bootstrapped_waiting_req())
    if not due and not sending and _out_of_buffers(scheduler):
        due = state.agree(sum(map(_is_reserved, scheduler.disagg_prefill_bootstrap_queue.queue)))
    now = state.now()
    left = [state.promise(req).ttft_due_s - now for req in parked]
    chosen = who_gives_way(False, sending, due, left)
    if chosen < 0:
        return
    req = parked[state.agree(chosen)]
    in_flight.remove(req)
    if req.grammar is not None:
        req.grammar.rollback(len(req.output_ids))  # its first token will be made once more
        req.grammar.finished = False
    scheduler.optimistic_release_and_requeue(req)
    state.counters["gave_way"] += 1


def _computing(scheduler: Any) -> bool:
    """Returns whether a step runs, or its result is not processed yet."""
    return scheduler.last_batch is not None or bool(getattr(scheduler, "result_queue", None))


def _may_be_requeued(scheduler: Any) -> bool:
    """Returns False where decode reserves after the prefill: it was told that the KV is there."""
    policy = getattr(scheduler.server_args, "disaggregation_decode_allocation_policy", "early")
    return bool(policy == "early")


def _out_of_buffers(scheduler: Any) -> bool:
    """Returns whether no metadata buffer is free, without which a request cannot leave bootstrap."""
    return (
        bool(scheduler.disagg_prefill_bootstrap_queue.queue)
        and scheduler.req_to_metadata_buffer_idx_allocator.available_size() == 0
    )


def _is_reserved(req: Any) -> bool:
    from sglang.srt.disaggregation.base.conn import KVPoll

    return bool(req.disagg_kv_sender.poll() == KVPoll.WaitingForInput)
