"""What the handlers take for granted of SGLang's objects, seam by seam.

The table is data. `engine.judge` looks it up in a source tree, and a test compares it with what the
handlers really use. A line of `ATTRIBUTES` is words:

    owner.attribute   the owner has the attribute
    a.x|b.y           either will do, the newest layout first (`compat` looks at the object)
    module:name       what is imported
    …@0.5.19          versions before have none, and need none
    +a.x              Kairos adds the attribute itself
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

# Where the attributes of an object are defined: classes, or ``module:*`` for all of a module's. A name
# in brackets is a module that gives the object attributes from outside.
_SRT = "sglang.srt"
OWNERS: Mapping[str, tuple[str, ...]] = {
    "abort": (f"{_SRT}.managers.io_struct:AbortReq",),
    "add_result": (f"{_SRT}.managers.schedule_policy:AddReqResult",),
    "adder": (f"{_SRT}.managers.schedule_policy:PrefillAdder",),
    "batch": (f"{_SRT}.managers.schedule_batch:ScheduleBatch",),
    "bootstrap_queue": (f"{_SRT}.disaggregation.prefill:PrefillBootstrapQueue",),
    "chunk": (f"{_SRT}.disaggregation.common.utils:TransferKVChunk",),
    "decode_plan": (f"{_SRT}.managers.schedule_batch:*", f"{_SRT}.managers.scheduler:*"),
    "dllm": (f"{_SRT}.dllm.mixin.scheduler:*",),
    "entry": (f"{_SRT}.disaggregation.decode:DecodeRequest",),
    "environ": (f"{_SRT}.environ:Envs",),
    "extend_range": (f"{_SRT}.managers.schedule_batch:*", f"{_SRT}.utils.common:*"),
    "finish_reason": (f"{_SRT}.managers.schedule_batch:BaseFinishReason",),
    "forward_mode": (f"{_SRT}.model_executor.forward_batch_info:ForwardMode",),
    "grammar": (f"{_SRT}.constrained.base_grammar_backend:BaseGrammarObject",),
    "grammar_manager": (f"{_SRT}.constrained.grammar_manager:GrammarManager",),
    "graphs": (
        f"{_SRT}.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
        f"{_SRT}.model_executor.cuda_graph_runner:CudaGraphRunner",
    ),
    "internal_state": (f"{_SRT}.managers.io_struct:GetInternalStateReqOutput",),
    "kv": (f"{_SRT}.managers.schedule_batch:ReqKvInfo",),
    "kv_allocator": (f"{_SRT}.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",),
    "kv_manager": (
        f"{_SRT}.disaggregation.common.conn:CommonKVManager",
        f"{_SRT}.disaggregation.mooncake.conn:MooncakeKVManager",
    ),
    "kv_sender": (f"{_SRT}.disaggregation.base.conn:BaseKVSender",),
    "load": (f"{_SRT}.managers.io_struct:*", f"{_SRT}.managers.load_snapshot:*"),
    "logits": (f"{_SRT}.layers.logits_processor:LogitsProcessorOutput",),
    "metadata_allocator": (f"{_SRT}.disaggregation.utils:ReqToMetadataIdxAllocator",),
    "mm_receiver": (
        f"{_SRT}.disaggregation.encoder.receiver:*",
        f"{_SRT}.disaggregation.encode_receiver:*",
    ),
    "model_config": (f"{_SRT}.configs.model_config:ModelConfig",),
    "model_runner": (f"{_SRT}.model_executor.model_runner:ModelRunner",),
    "parallel": (
        f"{_SRT}.runtime_context:*",
        f"{_SRT}.arg_groups.fields.parallel:*",
        f"{_SRT}.server_args:ServerArgs",
        f"{_SRT}.distributed.parallel_state:*",
    ),
    "penalties": (f"{_SRT}.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator",),
    "poll": (f"{_SRT}.disaggregation.base.conn:KVPoll",),
    "preallocation": (f"{_SRT}.disaggregation.decode:DecodePreallocQueue",),
    "prefill_plan": (f"{_SRT}.managers.schedule_batch:*", f"{_SRT}.managers.scheduler:*"),
    "prefix_cache": (f"{_SRT}.mem_cache.base_prefix_cache:BasePrefixCache",),
    "reporter": (
        f"{_SRT}.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter",
    ),
    "req": (f"{_SRT}.managers.schedule_batch:Req",),
    "req_pool": (f"{_SRT}.mem_cache.memory_pool:*",),
    "result": (f"{_SRT}.managers.utils:GenerationBatchResult",),
    "sampling_info": (f"{_SRT}.sampling.sampling_batch_info:SamplingBatchInfo",),
    "sampling_params": (f"{_SRT}.sampling.sampling_params:SamplingParams",),
    "scheduler": (
        f"{_SRT}.managers.scheduler:Scheduler",
        f"[{_SRT}.disaggregation.role_switch]",
    ),
    "server_args": (f"{_SRT}.server_args:ServerArgs", f"{_SRT}.arg_groups.fields.*:*"),
    "speculation": (f"{_SRT}.speculative.spec_info:SpeculativeAlgorithm",),
    "time_stats": (f"{_SRT}.observability.req_time_stats:SchedulerReqTimeStats",),
    "tokenizer_manager": (f"{_SRT}.managers.tokenizer_manager:TokenizerManager",),
    "tp_worker": (f"{_SRT}.managers.tp_worker:TpModelWorker",),
    "transfer_queue": (f"{_SRT}.disaggregation.decode:DecodeTransferQueue",),
}

_FEATURES = """
scheduler.spec_algorithm batch.spec_algorithm speculation.is_none scheduler.req_to_token_pool
req_pool.mamba_allocator batch.sampling_info sampling_info.penalizer_orchestrator
penalties.is_required batch.reqs req.beam_group@0.5.19 scheduler.enable_hisparse
batch.hisparse_coordinator batch.model_config model_config.is_encoder_decoder
scheduler.require_mlp_sync scheduler.is_hybrid_swa scheduler.is_hybrid_ssm scheduler.enable_lora
scheduler.enable_hierarchical_cache scheduler.enable_lmcache|server_args.enable_lmcache
scheduler.enable_staging scheduler.dllm_config parallel.pp_size server_args.tokenizer_worker_num
scheduler.server_args
"""
_PREFIX = "req.prefix_len|req.prefix_indices"
_LEFT = f"req.origin_input_ids {_PREFIX} req.extend_end|req.extend_range"
_RELEASED = "req.finished req.kv kv.req_pool_idx|req.req_pool_idx"
_QUEUED = f"{_RELEASED} scheduler.waiting_queue"
_TIMES = "time_stats.decode_prebuilt_finish_time time_stats.last_decode_finish_time"
_RUNNING = f"""
{_TIMES} req.finished batch.seq_lens_cpu sglang.srt.environ:envs
environ.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT environ.SGLANG_DISAGGREGATION_WAITING_TIMEOUT
"""
_ASKING = f"""
{_RUNNING} environ.SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION preallocation.queue
preallocation.num_reserved_decode_tokens preallocation.kv_manager
kv_manager.defer_decode_allocation@0.5.22 entry.req entry.waiting_for_input entry.is_rebootstrap
sampling_params.max_new_tokens scheduler.waiting_queue
"""
_REPORTED = f"reporter.scheduler {_QUEUED}"

# What every handler relies on, for the scheduler's state does: that of `run_event_loop`.
STATE = f"""
{_FEATURES} {_LEFT} extend_range.end@0.5.16-0.5.21 req.output_ids req.rid req.sampling_params
sampling_params.custom_params req.time_stats time_stats.scheduler_recv_time
scheduler.disaggregation_mode scheduler.model_config model_config.vocab_size
model_config.context_len sglang.srt.runtime_context:get_parallel
scheduler.tp_size|scheduler.ps|parallel.tp_size scheduler.attn_tp_cpu_group
scheduler.attn_cp_cpu_group scheduler.tp_worker tp_worker.model_runner
model_runner.decode_cuda_graph_runner graphs.disable_padding graphs.capture_bs
server_args.enable_metrics|scheduler.enable_metrics server_args.served_model_name
server_args.model_path server_args.dtype server_args.quantization server_args.kv_cache_dtype
server_args.attention_backend server_args.moe_runner_backend server_args.port
"""

ATTRIBUTES: Mapping[str, str] = {
    "_setup_and_run_http_server": "sglang.srt.entrypoints.http_server:app "
    "server_args.allow_auto_truncate server_args.disaggregation_transfer_backend "
    "server_args.enable_pd_role_switch@0.5.21 server_args.num_reserved_decode_tokens "
    "server_args.page_size server_args.preferred_sampling_params server_args.disaggregation_mode "
    "server_args.enable_hisparse server_args.enable_metrics server_args.served_model_name "
    "sglang.srt.layers.logits_processor:LogitsProcessorOutput "
    "logits.finalize_input_logprobs@0.5.21 tokenizer_manager.preferred_sampling_params "
    "tokenizer_manager.model_config tokenizer_manager.context_len",
    "Scheduler.run_event_loop": f"{STATE} scheduler.enable_priority_scheduling",
    "Scheduler.get_new_batch_prefill": f"""
        sglang.srt.constrained.base_grammar_backend:BaseGrammarObject grammar.rollback req.grammar
        grammar.finished sglang.srt.disaggregation.base.conn:KVPoll poll.WaitingForInput
        kv_allocator.available_size prefill_plan.batch_to_run scheduler.chunked_prefill_size
        scheduler.max_prefill_tokens scheduler.chunked_req prefix_cache.disable
        prefix_cache.evictable_size req.disagg_kv_sender kv_sender.poll
        scheduler.disagg_prefill_bootstrap_queue bootstrap_queue.queue
        scheduler.disagg_prefill_inflight_queue
        server_args.disaggregation_decode_allocation_policy@0.5.22 batch.extend_lens
        batch.prefix_lens {_QUEUED} scheduler.has_bootstrapped_waiting_req scheduler.last_batch
        batch.launch_ts@0.5.17 scheduler.optimistic_release_and_requeue scheduler.page_size
        sglang.srt.mem_cache.common:match_kv_cache|sglang.srt.managers.schedule_policy:match_prefix_for_req
        req.num_matched_prefix_tokens req.pending_bootstrap scheduler.result_queue
        scheduler.req_to_metadata_buffer_idx_allocator metadata_allocator.available_size
        scheduler.token_to_kv_pool_allocator scheduler.tree_cache
    """,
    "SchedulePolicy.calc_priority": "scheduler.chunked_prefill_size scheduler.max_prefill_tokens "
    "req.num_matched_prefix_tokens",
    "PrefillAdder.add_chunked_req": "adder.rem_chunk_tokens",
    "PrefillAdder.add_one_req": """
        sglang.srt.managers.schedule_policy:AddReqResult add_result.NO_TOKEN add_result.OTHER
        adder._lock_node adder.ceil_paged_tokens scheduler.chunked_req
        req.full_untruncated_fill_ids req.host_hit_length req.last_node adder.new_chunked_req
        adder.page_size adder.rem_chunk_tokens adder.rem_total_tokens
    """,
    "Scheduler.process_pending_chunked_abort": f"scheduler._pending_chunked_abort_req "
    f"scheduler.chunked_req {_RELEASED}",
    "Scheduler.abort_request": f"""
        abort.abort_all {_QUEUED} scheduler.chunked_req scheduler.disagg_decode_prealloc_queue
        preallocation.queue preallocation.retracted_queue scheduler.disagg_decode_transfer_queue
        transfer_queue.queue scheduler.disagg_prefill_bootstrap_queue bootstrap_queue.queue
        scheduler.disagg_prefill_inflight_queue scheduler.dllm_manager dllm.waiting_queue
        dllm.staging_queue req.finished_reason scheduler.grammar_manager
        grammar_manager.grammar_queue scheduler.last_batch scheduler.mm_receiver
        mm_receiver.waiting_list entry.req scheduler.result_queue scheduler.running_batch
    """,
    "Scheduler._collect_inflight_batches": _RELEASED,
    "Scheduler.collect_inflight_reqs": _RELEASED,
    "SchedulerDisaggregationPrefillMixin.resolve_waiting_queue_bootstrap": _QUEUED,
    "Scheduler.is_fully_idle": _RELEASED,
    "Scheduler._record_step_counters": "batch.extend_lens batch.prefix_lens "
    "scheduler.total_prefill_busy_us",
    "Scheduler.run_batch": "batch.forward_mode forward_mode.is_extend_without_speculative "
    "+batch.launch_ts +result.launch_ts",
    "Scheduler.process_batch_result": "batch.extend_lens batch.prefix_lens +result.launch_ts",
    "SchedulerLoadInquirer._get_num_pending_tokens": f"{_RELEASED} req.seqlen",
    "SchedulerLoadInquirer.get_num_waiting_uncached_tokens": _RELEASED,
    "SchedulerLoadInquirer.get_loads": f"{_RELEASED} load.num_active_tokens@0.5.17 "
    "load.num_total_tokens load.num_waiting_reqs load.queues load.waiting",
    "SchedulerMetricsReporter.report_prefill_stats": _REPORTED,
    "SchedulerMetricsReporter._build_queued_request_metrics": _REPORTED,
    "SchedulerInternalStateController.get_internal_state": "internal_state.internal_state",
    "Scheduler.get_internal_state": "internal_state.internal_state",
    "SchedulerOutputStreamer.stream_output": "req.bootstrap_room req.finished_reason "
    "time_stats.prefill_finished_time req.retraction_count finish_reason.to_json",
    "DecodePreallocQueue.pop_preallocated": f"""
        {_ASKING} preallocation._resolve_pending_reqs preallocation._update_handshake_waiters
        kv_allocator.available_size req.finished_reason scheduler.max_running_requests
        scheduler.max_total_num_tokens scheduler.page_size
        sglang.srt.disaggregation.utils:prepare_abort scheduler.running_batch req_pool.size
        scheduler.token_to_kv_pool_allocator preallocation.transfer_queue transfer_queue.queue
    """,
    "SchedulerDisaggregationDecodeMixin.get_new_prebuilt_batch": _ASKING,
    "SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run": "decode_plan.batch_to_run "
    "batch.seq_lens_cpu",
    "MooncakeKVManager.transfer_worker": """
        sglang.srt.disaggregation.base.conn:KVPoll poll.Failed poll.Success
        kv_manager._staging_outstanding@0.5.18 kv_manager.conclude_failure|kv_manager.record_failure
        kv_manager.update_status kv_manager.request_status chunk.room
    """,
    "CommonKVManager.check_status": "sglang.srt.disaggregation.base.conn:KVPoll poll.Failed",
    "ScheduleBatch.retract_decode": f"{_RUNNING} req.finished_reason "
    "server_args.retraction_policy +batch._get_decode_retraction_order",
    "ScheduleBatch.prepare_for_decode": f"{_RUNNING} batch.filter_batch batch.forward_mode "
    "batch.input_ids batch.orig_seq_lens batch.out_cache_loc batch.seq_lens batch.seq_lens_sum",
}


@dataclass(frozen=True)
class Need:
    """Something that must be there: any of `choices` (``owner.attribute`` or ``module:name``).

    It holds from version `since` to `until` (empty: no end); in other versions it is missing and
    not needed. `ours`: Kairos adds it itself, so the owner must take new attributes.
    """

    choices: tuple[str, ...]
    since: str = ""
    until: str = ""
    ours: bool = False

    @classmethod
    def parse(cls, word: str) -> Need:
        """Returns the need that a word of the table stands for."""
        names, _, versions = word.removeprefix("+").partition("@")
        since, _, until = versions.partition("-")
        return cls(tuple(names.split("|")), since, until, word.startswith("+"))


def needs(seam: str) -> Iterator[Need]:
    """Yields what the handler of the seam with this qualified name relies on."""
    yield from map(Need.parse, sorted(set(ATTRIBUTES.get(seam, "").split())))
