"""What functions of SGLang must mean for the handlers that wrap, call or replace them.

`relied` has the attributes, `engine.fingerprints.meanings` the kinds of checks. docs/upstream.md
says what to do when a check fails.
"""

from __future__ import annotations

from sglang_kairos.engine.fingerprints.meanings import (
    AskedBy,
    Decorated,
    Delegates,
    Flow,
    Mentions,
    Rebinds,
    Sets,
    SourceCheck,
    Takes,
)
from sglang_kairos.engine.fingerprints.trials import BusyTime

_SRT = "sglang.srt"
_SCHEDULER = f"{_SRT}.managers.scheduler:Scheduler"
_ADDER = f"{_SRT}.managers.schedule_policy:PrefillAdder"
_BATCH = f"{_SRT}.managers.schedule_batch:ScheduleBatch"
_SAMPLING = f"{_SRT}.sampling.sampling_batch_info:SamplingBatchInfo"
_PREALLOC = f"{_SRT}.disaggregation.decode:DecodePreallocQueue"
_REQUEUE = (
    f"{_SRT}.disaggregation.prefill:"
    "SchedulerDisaggregationPrefillMixin.optimistic_release_and_requeue"
)
_MATCHES = (
    f"{_SRT}.mem_cache.common:match_kv_cache",
    f"{_SRT}.managers.schedule_policy:match_prefix_for_req",
)

_SCHED = f"{_SRT}.managers.scheduler"
_PREFILLS = f"{_SRT}.disaggregation.prefill"
_DECODES = f"{_SRT}.disaggregation.decode"
_MIXIN = f"{_DECODES}:SchedulerDisaggregationDecodeMixin"
_COMPONENTS = f"{_SRT}.managers.scheduler_components"
_LOADS = f"{_COMPONENTS}.load_inquirer"
_REPORTER = f"{_COMPONENTS}.metrics_reporter"
_STEP = "get_next_disagg_prefill_batch_to_run"
_BUILD = "_get_new_batch_prefill_raw"

_ASKED = (
    AskedBy(f"{_SCHEDULER}.get_new_batch_prefill", _PREFILLS, (_STEP,)),
    AskedBy(f"{_SCHEDULER}.process_pending_chunked_abort", _PREFILLS, (_STEP,)),
    AskedBy(
        f"{_PREFILLS}:SchedulerDisaggregationPrefillMixin.resolve_waiting_queue_bootstrap",
        _PREFILLS,
        (_STEP,),
    ),
    *(
        AskedBy(f"{_SRT}.managers.schedule_policy:{name}", _SCHED, (_BUILD,))
        for name in (
            "SchedulePolicy.calc_priority",
            "SchedulePolicy.shortest_prefill_chunk_limit",
            "PrefillAdder.add_chunked_req",
            "PrefillAdder.add_one_req",
        )
    ),
    AskedBy(f"{_SCHEDULER}._collect_inflight_batches", _SCHED, ("_poll_timeout_aborts",)),
    AskedBy(f"{_SCHEDULER}.collect_inflight_reqs", _SCHED, ("abort_request",)),
    AskedBy(f"{_SCHEDULER}.is_fully_idle", _SCHED, ("flush_cache", "on_idle")),
    AskedBy(f"{_SCHEDULER}._record_step_counters", _SCHED, ("process_batch_result",)),
    AskedBy(f"{_SCHEDULER}.run_batch", _PREFILLS, ("event_loop_overlap_disagg_prefill",)),
    AskedBy(
        f"{_SCHEDULER}.process_batch_result", _PREFILLS, ("event_loop_overlap_disagg_prefill",)
    ),
    AskedBy(f"{_LOADS}:SchedulerLoadInquirer._get_num_pending_tokens", _SCHED, (_BUILD,)),
    AskedBy(
        f"{_LOADS}:SchedulerLoadInquirer.get_num_waiting_uncached_tokens", _LOADS, ("get_loads",)
    ),
    AskedBy(f"{_LOADS}:SchedulerLoadInquirer.get_loads", _SCHED, ("publish_load_snapshot",)),
    AskedBy(
        f"{_REPORTER}:SchedulerMetricsReporter.report_prefill_stats",
        _PREFILLS,
        ("process_batch_result_disagg_prefill",),
    ),
    AskedBy(
        f"{_REPORTER}:SchedulerMetricsReporter._build_queued_request_metrics",
        _REPORTER,
        ("_emit_forward_pass_metrics",),
    ),
    AskedBy(f"{_PREALLOC}.pop_preallocated", _DECODES, ("process_decode_queue",)),
    AskedBy(f"{_MIXIN}.get_new_prebuilt_batch", _DECODES, ("get_next_disagg_decode_batch_to_run",)),
    AskedBy(
        f"{_MIXIN}.get_next_disagg_decode_batch_to_run",
        _DECODES,
        ("event_loop_normal_disagg_decode", "event_loop_overlap_disagg_decode"),
    ),
    AskedBy(f"{_BATCH}.retract_decode", _SCHED, ("update_running_batch",)),
    AskedBy(f"{_BATCH}.prepare_for_decode", _SCHED, ("update_running_batch",)),
)

# What functions must mean: those wrapped, and those that handlers call or replace besides.
MEANINGS: tuple[SourceCheck, ...] = (
    *_ASKED,
    Delegates(
        f"{_SCHEDULER}.abort_request",
        ("running_batch", "last_batch"),
        ("Scheduler._collect_inflight_batches", "Scheduler.collect_inflight_reqs"),
    ),
    # Who delegates has become a detail of another.
    Mentions(f"{_SCHEDULER}.collect_inflight_reqs", ("running_batch", "last_batch")),
    Mentions(f"{_SCHEDULER}._collect_inflight_batches", ("running_batch", "last_batch")),
    BusyTime(f"{_SCHEDULER}._record_step_counters", "total_prefill_busy_us"),
    Flow(
        f"{_ADDER}.add_chunked_req",
        "_rem_tokens",
        (
            "rem_chunk_tokens",
            "rem_total_tokens",
            "rem_swa_tokens",
            "page_size",
            "_get_dllm_remain_tokens",
        ),
    ),
    Takes(f"{_PREALLOC}.pop_preallocated", 1, ("rids_to_check",)),
    Mentions(
        f"{_PREALLOC}.pop_preallocated", ("_resolve_pending_reqs", "_update_handshake_waiters")
    ),
    Mentions(f"{_BATCH}.retract_decode", ("_get_decode_retraction_order",)),
    Takes(_REQUEUE, 2),
    Mentions(
        _REQUEUE,
        (
            "release_kv_cache",
            "reset_for_retract",
            "pending_bootstrap",
            "waiting_queue",
            "disagg_prefill_bootstrap_queue",
        ),
    ),
    *(Mentions(target, ("num_matched_prefix_tokens",)) for target in _MATCHES),
    Takes(_MATCHES[1], 2, ("include_req",)),
    Takes(_MATCHES[0], 2),
    Decorated(f"{_ADDER}._lock_node", "contextmanager"),
    Takes(f"{_ADDER}._lock_node", 2),
    Decorated(f"{_ADDER}.rem_total_tokens", "property"),
    Mentions(
        f"{_ADDER}.rem_total_tokens",
        ("available_size", "evictable_size", "rem_total_token_offset"),
    ),
    Takes(f"{_ADDER}.ceil_paged_tokens", 2),
    Sets(f"{_SCHEDULER}.run_batch", "_pending_chunked_abort_req", ("self.chunked_req",)),
    Takes(f"{_PREALLOC}._resolve_pending_reqs", 1),
    Takes(f"{_PREALLOC}._update_handshake_waiters", 1),
    Decorated(f"{_BATCH}._get_decode_retraction_order", "staticmethod"),
    Takes(f"{_BATCH}.filter_batch", 1, ("keep_indices",)),
    Rebinds(f"{_BATCH}.filter_batch", ("filter_batch", "finished", "need_capture")),
    Rebinds(f"{_SAMPLING}.filter_batch", ("filter", "items", "keys")),
)
