"""Pauses chunked prefills: the chunk slot changes hands, and SGLang still finds every request.

A pause is only made around `Scheduler.get_new_batch_prefill`. There the finished chunk's KV is
already in the cache with its node locked, and its send boundary is set. `Scheduler.chunked_req` can
be swapped without any effect elsewhere. A paused request is in none of SGLang's queues. So
everything that looks for requests has a seam here: aborts, time-outs, peers that failed, idle
checks, reports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from sglang_kairos.engine import compat
from sglang_kairos.engine.hooks.aborts import only_the_named
from sglang_kairos.engine.hooks.attainment import count_ended
from sglang_kairos.engine.state.request import tokens_left
from sglang_kairos.engine.state.scheduler_state import KairosState, current


def give_slot(state: KairosState, scheduler: Any, chosen: Any) -> None:
    """Gives `chosen` (None: nobody) the chunk slot; the request that had it is paused."""
    before = scheduler.chunked_req
    if chosen is before:
        return
    if before is not None:
        state.promise(before).pause(state.now())
        state.paused.append(before)
        state.counters["pauses"] += 1
    scheduler.chunked_req = None
    if chosen in state.paused:
        state.paused.remove(chosen)
        state.promise(chosen).resume(state.now())
        scheduler.chunked_req = chosen
        state.counters["resumes"] += 1
    state.counters["max_paused"] = max(state.counters["max_paused"], len(state.paused))


def drop_released(state: KairosState) -> None:
    """Forgets paused requests that SGLang has ended or put back in a queue of its own.

    A paused request's last chunk may still be running. When its result comes in, SGLang retires it
    if it was aborted, and starts it anew if its bootstrap is pending. No KV is left to come back to
    then. All code that walks `engine.state.scheduler_state.paused` calls this first.
    """
    for req in list(filter(_released, state.paused)):
        state.paused.remove(req)
        state.promise(req).paused_since_s = None
        state.counters["paused_released"] += 1


def _released(req: Any) -> bool:
    return bool(req.finished()) or not compat.holds_kv(req)


def process_pending_chunked_abort(original: Callable[..., Any], scheduler: Any) -> None:
    """Seam of Scheduler.process_pending_chunked_abort: tear aborted paused requests down too."""
    original(scheduler)
    state = current()
    if state is None:
        return
    drop_released(state)
    for req in [req for req in state.paused if state.promise(req).aborted]:
        state.paused.remove(req)
        slot, pending = scheduler.chunked_req, scheduler._pending_chunked_abort_req
        scheduler.chunked_req = scheduler._pending_chunked_abort_req = req
        try:
            original(scheduler)
        finally:
            scheduler.chunked_req, scheduler._pending_chunked_abort_req = slot, pending
        state.counters["paused_aborts"] += 1


def abort_request(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """Seam of Scheduler.abort_request: an abort reaches paused requests, and only ids that it names.

    Parked requests need no help, as they are in the running batch; they are only counted.
    """
    if not (recv_req.abort_all or recv_req.rid):
        return None  # it names nobody, but every id begins with an empty one
    state = current()
    if state is not None:
        drop_released(state)
    ours = [] if state is None else list(state.paused)
    with only_the_named(scheduler, recv_req, ours) as named:
        if state is not None:
            reason = getattr(recv_req, "finished_reason", None)
            told = functools.partial(count_ended, state, named, reason)
            state.guarded("attainment", told, None)
            for req in set(named).intersection(state.paused):
                state.promise(req).aborted = True
            if state.subset is not None:
                parked = set(scheduler.running_batch.reqs).difference(state.subset.reqs)
                state.counters["parked_aborts"] += len(parked.intersection(named))
        return original(scheduler, recv_req)


def collect_inflight_batches(original: Callable[..., Any], scheduler: Any) -> list[Any]:
    """Seam of Scheduler._collect_inflight_batches: add the paused requests as one more batch.

    Running time-outs, aborts and weight-version records look for started requests there.
    """
    batches: list[Any] = original(scheduler)
    state = current()
    if state is not None:
        drop_released(state)
    if state is None or not state.paused:
        return batches
    return [*batches, SimpleNamespace(reqs=list(state.paused))]


def collect_inflight_reqs(original: Callable[..., Any], scheduler: Any) -> set[Any]:
    """Seam of Scheduler.collect_inflight_reqs (v0.5.19 to v0.5.21): add the paused requests."""
    reqs: set[Any] = original(scheduler)
    state = current()
    if state is None:
        return reqs
    drop_released(state)
    return reqs.union(state.paused)


def resolve_waiting_queue_bootstrap(original: Callable[..., Any], scheduler: Any) -> None:
    """Seam of Scheduler.resolve_waiting_queue_bootstrap: release paused requests whose peer failed.

    SGLang polls the senders of the waiting queue and releases those that failed.
    """
    state = current()
    if state is None or not state.paused:
        original(scheduler)
        return
    with _in_the_queue(state, scheduler) as paused:
        original(scheduler)
        left = set(scheduler.waiting_queue)
        state.paused[:] = [req for req in state.paused if req in left]
        state.counters["paused_failures"] += len(paused) - len(state.paused)


@contextmanager
def _in_the_queue(state: KairosState, scheduler: Any) -> Iterator[set[Any]]:
    """Puts the paused requests at the end of the waiting queue meanwhile; yields them."""
    drop_released(state)
    paused = dict.fromkeys(state.paused)
    scheduler.waiting_queue = [*scheduler.waiting_queue, *paused]
    try:
        yield set(paused)
    finally:
        scheduler.waiting_queue = [r for r in scheduler.waiting_queue if r not in paused]


def is_fully_idle(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """Seam of Scheduler.is_fully_idle: a paused prefill owns KV, so the scheduler is not idle."""
    state = current()
    if state is not None:
        drop_released(state)
    return bool(original(scheduler, *args, **kwargs)) and not (state is not None and state.paused)


def num_pending_tokens(
    original: Callable[..., Any], inquirer: Any, *args: Any, **kwargs: Any
) -> int:
    """Seam of _get_num_pending_tokens: add what is left of paused requests, and requests held back."""
    pending = int(original(inquirer, *args, **kwargs))
    state = current()
    if state is None:
        return pending
    return pending + _paused_tokens(state) + sum(req.seqlen for req in state.held)


def num_waiting_uncached_tokens(original: Callable[..., Any], inquirer: Any) -> int:
    """Seam of get_num_waiting_uncached_tokens: add what is left of paused requests."""
    state = current()
    return int(original(inquirer)) + (0 if state is None else _paused_tokens(state))


def get_loads(original: Callable[..., Any], inquirer: Any) -> Any:
    """Seam of SchedulerLoadInquirer.get_loads: count paused requests, and the KV they need."""
    snapshot = original(inquirer)
    state = current()
    if state is not None and state.paused:
        tokens, count = _paused_tokens(state), len(state.paused)
        snapshot.num_waiting_reqs += count
        compat.add_waiting_tokens(snapshot, tokens)
        if snapshot.queues is not None:
            snapshot.queues.waiting += count
    return snapshot


def report_with_paused(
    original: Callable[..., Any], reporter: Any, *args: Any, **kwargs: Any
) -> Any:
    """Seam of the metrics reporter's methods: count paused requests in the waiting queue."""
    state = current()
    if state is None or not state.paused:
        return original(reporter, *args, **kwargs)
    with _in_the_queue(state, reporter.scheduler):
        return original(reporter, *args, **kwargs)


def _paused_tokens(state: KairosState) -> int:
    drop_released(state)
    return sum(map(tokens_left, state.paused))
