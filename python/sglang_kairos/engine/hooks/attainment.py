"""Feeds `slo.attainment` from SGLang's scheduler: which requests got a token, which ended, and how."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sglang_kairos.engine.state.scheduler_state import KairosState, current
from sglang_kairos.slo.attainment import (
    ABORTED,
    AGAIN,
    FAILED,
    REFUSED,
    RETRACTED,
    SERVED,
    Verdict,
    judge,
    tpot_of,
)

_KEPT = operator.attrgetter("_kairos")


def stream_output(
    original: Callable[..., Any],
    streamer: Any,
    reqs: Sequence[Any],
    return_logprob: bool,
    skip_req: Any = None,
) -> Any:
    """Seam of SchedulerOutputStreamer.stream_output: all that get a token or end pass here."""
    state = current()
    if state is not None:
        told = functools.partial(_note, state, reqs, skip_req, state.now())
        state.guarded("attainment", told, None)
    return original(streamer, reqs, return_logprob, skip_req)


def count_ended(state: KairosState, reqs: Iterable[Any], reason: Any = None) -> None:
    """Counts requests that SGLang ends, and does not all show again. `reason`: as SGLang words it.

    Some of what an abort names may be no requests yet: those whose images are still on their way.
    """
    for req in reqs:
        if hasattr(req, "finished_reason") and not (kept := state.promise(req)).counted:
            if req.finished():
                continue
            kept.counted = True
            _tell(state, _outcome_of(reason or {}))


def _note(state: KairosState, reqs: Sequence[Any], skip_req: Any, now_s: float) -> None:
    if reqs and state.mode != "prefill":
        _note_tokens(state, reqs, skip_req, now_s)
    for req in reqs:
        if req.finished_reason is None:
            continue
        state.talking = []  # hold no request that has left
        if not (kept := state.promise(req)).counted:
            kept.counted = True
            outcome = _outcome(state, req)
            served = outcome in (SERVED, RETRACTED)
            _tell(state, outcome, _verdict(state, req, now_s) if served else None)


def _note_tokens(state: KairosState, reqs: Sequence[Any], skip_req: Any, now_s: float) -> None:
    if reqs == state.talking:
        state.silences.step(now_s)
        return
    talking = [
        req
        for req in reqs
        if req.output_ids
        and req is not skip_req
        and not (req.retraction_count and _comes_back(state, req))
    ]
    if talking:
        state.talking = talking
        try:
            streams = list(map(_KEPT, talking))
        except AttributeError:  # somebody is new
            streams = list(map(state.promise, talking))
        state.silences.step(now_s, streams)


def _comes_back(state: KairosState, req: Any) -> bool:
    """Returns whether it is shown because it runs again after a retraction; it has no new token then."""
    kept = state.promise(req)
    known, kept.retractions = kept.retractions, req.retraction_count
    return bool(known < kept.retractions)


def _outcome_of(abort: dict[str, Any]) -> str:
    status = abort.get("status_code")
    if status is None:
        return ABORTED
    return REFUSED if 400 <= int(status) < 500 else FAILED


def _outcome(state: KairosState, req: Any) -> str:
    ended = req.finished_reason.to_json()
    if ended.get("type") == "abort":
        return _outcome_of(ended)
    if state.mode != "prefill":
        return RETRACTED if req.retraction_count else SERVED
    # When decode asks again, it does so under the same id and in the same bootstrap room.
    return AGAIN if state.prefilled.seen((req.rid, req.bootstrap_room)) else SERVED


def _verdict(state: KairosState, req: Any, now_s: float) -> Verdict:
    kept = state.promise(req)
    label = state.attainment.label(kept.slo.name)
    if state.mode == "prefill":
        first_s = req.time_stats.prefill_finished_time or now_s
        return judge(kept.slo, label, first_s - kept.arrival_s, None, 1, 0.0)
    state.silences.settle(kept)
    first_s = now_s if kept.first_token_s is None else kept.first_token_s
    tokens = len(req.output_ids)
    tpot_s = tpot_of(first_s, now_s, tokens)
    return judge(kept.slo, label, first_s - kept.arrival_s, tpot_s, tokens, kept.silent_s)


def _tell(state: KairosState, outcome: str, verdict: Verdict | None = None) -> None:
    state.attainment.ended(outcome, verdict)
    if state.metrics is not None:
        state.metrics.ended(outcome, verdict, state.attainment.longest_silence_s)
