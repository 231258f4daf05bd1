"""What is lost when SGLang's function is unknown and its seam is left out (``--kairos-strict seam``).

Some seams keep others safe. Without them those are left out as well, and what they made possible is
off. Plain data in, plain data out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from sglang_kairos.config import KairosConfig

# Without this seam Kairos cannot start.
START = "Scheduler.run_event_loop"

_PREFILL = "SchedulerDisaggregationPrefillMixin"
_DECODE = "SchedulerDisaggregationDecodeMixin"
_PLAN = "Scheduler.get_new_batch_prefill"
_ORDER = "SchedulePolicy.calc_priority"
_ADMIT = "PrefillAdder.add_one_req"
_NEXT = f"{_DECODE}.get_next_disagg_decode_batch_to_run"
_PREPARE = "ScheduleBatch.prepare_for_decode"

LOST: Mapping[str, str] = {
    "_setup_and_run_http_server": "SLOs sent straight to this server are dropped, those from Kairos' "
    "router are not; requests that harm a scheduler are not refused",
    "Scheduler.get_init_info": "a scheduler process that came up without Kairos goes unnoticed",
    START: "everything",
    _PLAN: "prefills run in SGLang's order and are not paused; nothing ends a standstill of "
    "optimistic prefills",
    _ORDER: "prefills run in SGLang's order and are not paused",
    "SchedulePolicy.shortest_prefill_chunk_limit": "the chunk in progress takes the whole budget of "
    "a step",
    "PrefillAdder.add_chunked_req": "the chunk in progress takes the whole budget of a step",
    _ADMIT: "prefills are not paused, and the chunk in progress takes the whole budget of a step",
    "Scheduler.process_pending_chunked_abort": "prefills are not paused",
    "Scheduler.abort_request": "prefills are not paused; an abort ends all whose ids begin like the "
    "one it names; aborted requests are missing in the attainment",
    "Scheduler._collect_inflight_batches": "prefills are not paused",
    "Scheduler.collect_inflight_reqs": "prefills are not paused",
    f"{_PREFILL}.resolve_waiting_queue_bootstrap": "prefills are not paused",
    "Scheduler.is_fully_idle": "prefills are not paused",
    "Scheduler._record_step_counters": "prefill times are not learnt on GPUs",
    "Scheduler.run_batch": "prefill times are not learnt",
    "Scheduler.process_batch_result": "prefill times are not learnt",
    "SchedulerLoadInquirer._get_num_pending_tokens": "load reports leave paused prefills out",
    "SchedulerLoadInquirer.get_num_waiting_uncached_tokens": "load reports leave paused prefills out",
    "SchedulerLoadInquirer.get_loads": "load reports leave paused prefills out",
    "SchedulerMetricsReporter.report_prefill_stats": "log and gauges leave paused prefills out",
    "SchedulerMetricsReporter._build_queued_request_metrics": "forward-pass metrics leave paused "
    "prefills out",
    "SchedulerInternalStateController.get_internal_state": "no report on /server_info",
    "Scheduler.get_internal_state": "no report on /server_info",
    "SchedulerOutputStreamer.stream_output": "attainment is not counted",
    "DecodePreallocQueue.pop_preallocated": "KV is reserved in SGLang's order, without limit by "
    "predicted steps",
    f"{_DECODE}.get_new_prebuilt_batch": "transferred requests enter in SGLang's order",
    _NEXT: "running requests are not parked, predicted steps do not limit admission",
    _PREPARE: "running requests are not parked, predicted steps do not limit admission",
    "ScheduleBatch.retract_decode": "who is retracted is SGLang's choice",
    "CommonKVManager.update_status": "a hand-shake may be lost: that request waits for its time-out",
    "CommonKVManager.check_status": "a cleared request may end the transfer thread",
    "MooncakeKVManager.transfer_worker": "an error in one transfer ends the transfer thread",
}

# Seams that must be there for another to be safe, or of any use.
NEEDS: Mapping[str, tuple[str, ...]] = {
    _PLAN: (_ORDER,),
    _ORDER: (_PLAN,),
    _ADMIT: (_PLAN,),
    "SchedulePolicy.shortest_prefill_chunk_limit": (_PLAN, _ADMIT),
    "PrefillAdder.add_chunked_req": (_PLAN, _ADMIT),
    "Scheduler.run_batch": ("Scheduler.process_batch_result",),
    "Scheduler.process_batch_result": ("Scheduler.run_batch",),
    _NEXT: (_PREPARE,),
    _PREPARE: (_NEXT,),
}

# The seams by which SGLang finds a paused prefill, and those that run a step without parked requests.
PAUSING = (
    _PLAN,
    _ORDER,
    _ADMIT,
    "Scheduler.process_pending_chunked_abort",
    "Scheduler.abort_request",
    "Scheduler._collect_inflight_batches",
    "Scheduler.collect_inflight_reqs",
    f"{_PREFILL}.resolve_waiting_queue_bootstrap",
    "Scheduler.is_fully_idle",
)
PARKING = (_NEXT, _PREPARE)


def missing(wrapped: Iterable[str], unknown: Collection[str]) -> dict[str, str]:
    """Returns the seams to leave out, by qualified name, and what is lost with each.

    `wrapped`: the seams of a version. `unknown`: those of them whose functions are unknown. Left
    out are the unknown ones, and those that need one of them.
    """
    names = list(wrapped)
    out = dict.fromkeys(name for name in names if name in unknown)
    while more := [
        name
        for name in names
        if name not in out and any(need in out for need in NEEDS.get(name, ()))
    ]:
        out.update(dict.fromkeys(more))
    return {name: LOST[name] for name in names if name in out}


def cannot_pause(lost: Collection[str]) -> list[str]:
    """Returns why prefills are not paused, in words; nothing where they are."""
    names = [name for name in PAUSING if name in lost]
    return [f"SGLang's {', '.join(names)} is unknown"] if names else []


def without(config: KairosConfig, lost: Collection[str]) -> KairosConfig:
    """Returns the configuration that is safe when these seams are left out."""
    return dataclasses.replace(
        config,
        pause=config.pause and not any(name in lost for name in PAUSING),
        park=config.park and not any(name in lost for name in PARKING),
    )
