"""A table of every place where Kairos touches SGLang, in every version that it supports.

A seam wraps one SGLang function with one Kairos function of the form ``(original, *args,
**kwargs)``. Before anything is wrapped, `engine.survey` compares the source text of each SGLang
function with the `engine.fingerprints.known_texts` of the versions that Kairos knows. A renamed or
changed function stops the start-up (``--kairos-strict on``). Otherwise Kairos would schedule on
assumptions that no longer hold.

How to add a version: docs/upstream.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.seams import callees, losses
from sglang_kairos.engine.seams.callees import Callee, Function

SUPPORTED_VERSIONS = tuple(known_texts.table())  # newest first


@dataclass(frozen=True)
class Seam(Function):
    """One SGLang function and what Kairos does around it.

    `target`, `handler`: ``module:qualified.name``.
    `process`: where it matters: the scheduler processes, those of them that import ``mooncake``, or
    the HTTP server. `instead`: what is wrapped in versions that have no such function, or a better
    place. `elsewhere`: why nothing is wrapped in the others.
    `relies_on`: other functions of SGLang that the handler calls or replaces.
    `upstream`: the issue or pull request that is nearest to making the seam unneeded.
    `known`: fingerprints to use instead of the table's.
    """

    target: str
    handler: str
    why: str
    how: str
    gone_when: str
    instead: tuple[str, ...] = ()
    elsewhere: str = ""
    process: str = "scheduler"
    relies_on: tuple[Callee, ...] = ()
    upstream: str = ""
    known: Mapping[str, str] | None = None

    kind: ClassVar[known_texts.Kind] = "seams"

    @property
    def lost(self) -> str:
        """Returns what is lost where it is left out (``--kairos-strict seam``)."""
        return losses.LOST[self.qualname]

    @property
    def needs(self) -> tuple[str, ...]:
        """Returns the seams, by qualified name, without which it is left out too."""
        return losses.NEEDS.get(self.qualname, ())


SEAMS: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
        handler="sglang_kairos.engine.hooks.http:run_http_server",
        process="http",
        why="a request's SLO arrives in body fields or headers that SGLang does not know",
        how="checks that every scheduler has Kairos, then adds an ASGI middleware that validates "
        "SLOs and moves them into custom_params",
        gone_when="SGLang's request schema has ttft_ms and tpot_ms",
        upstream="sgl-project/sglang#38464: plugins in every process",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.get_init_info",
        handler="sglang_kairos.engine.hooks.lifecycle:get_init_info",
        why="the server must not serve when a scheduler process came up without Kairos",
        how="adds the number of installed seams to the hand-shake; the HTTP server checks it",
        gone_when="SGLang reports loaded plugins in the hand-shake",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.run_event_loop",
        handler="sglang_kairos.engine.hooks.lifecycle:run_event_loop",
        why="Kairos' state belongs to one scheduler and must refuse what it does not support",
        how="builds the state, refuses what is not supported, then runs the loop",
        gone_when="SGLang has a start-up hook for scheduler plugins",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
        handler="sglang_kairos.engine.hooks.prefill:get_new_batch_prefill",
        why="the chunk in progress always runs first, so a long prompt blocks every urgent one",
        how="plans by urgency, swaps Scheduler.chunked_req (pause and resume), holds back what must "
        "wait, ends a standstill of optimistic prefills",
        gone_when="the chunk slot is chosen by the schedule policy",
        relies_on=(
            callees.REQUEUE,
            callees.HAS_BOOTSTRAPPED,
            callees.MATCH_CACHE,
            callees.MATCH_PREFIX,
        ),
        upstream="sgl-project/sglang#34623: several chunked prefills at a time",
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority",
        handler="sglang_kairos.engine.hooks.prefill:calc_priority",
        why="the waiting queue is ordered here; no upstream policy knows a deadline",
        how="runs the upstream policy (it matches prefixes), then applies the order of the plan",
        gone_when="schedule policies are pluggable",
        upstream="sgl-project/sglang#10063: a schedule policy for short prompts among long ones",
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:SchedulePolicy.shortest_prefill_chunk_limit",
        handler="sglang_kairos.engine.hooks.prefill:chunk_limit",
        why="the chunk in progress takes the whole token budget, more urgent short prompts get none",
        how="returns the plan's share of the chunk budget",
        gone_when="the chunk budget is split by the schedule policy",
        instead=("PrefillAdder.add_chunked_req",),
        upstream="sgl-project/sglang#39717: controls for what runs beside the chunk in progress",
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:PrefillAdder.add_chunked_req",
        handler="sglang_kairos.engine.hooks.prefill:add_chunked_req",
        why="the chunk in progress takes the whole token budget, more urgent short prompts get none",
        how="shows it the plan's share of the chunk budget only",
        gone_when="v0.5.20 is no longer supported",
        instead=("SchedulePolicy.shortest_prefill_chunk_limit",),
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
        handler="sglang_kairos.engine.hooks.prefill:add_one_req",
        why="when the chunk slot took part of the budget, a long request behind it would start a "
        "second chunked prefill, which upstream asserts against. Upstream also does not know that "
        "paused prefills need KV for their rest. Filled by others, it runs out and the server ends",
        how="ends admission instead, and the request keeps its place",
        gone_when="pausing is upstream",
        relies_on=(callees.LOCK_NODE, callees.ROOM, callees.CEIL_TOKENS),
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.process_pending_chunked_abort",
        handler="sglang_kairos.engine.hooks.pausing:process_pending_chunked_abort",
        why="an aborted request that is paused must be torn down like the chunk in progress",
        how="lends each aborted paused request the chunk slot while upstream tears it down",
        gone_when="pausing is upstream",
        relies_on=(callees.SLOT_ABORTS,),
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.abort_request",
        handler="sglang_kairos.engine.hooks.pausing:abort_request",
        why="an abort looks through upstream's queues only, and a paused prefill is in none. It also "
        "ends every request whose id begins like the one it names",
        how="marks the paused request of that id, then runs upstream's function, while requests "
        "whose ids only begin alike have other ids",
        gone_when="pausing is upstream, and aborts compare whole ids",
        upstream="sgl-project/sglang#32237: aborts compare beginnings only where asked to",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler._collect_inflight_batches",
        handler="sglang_kairos.engine.hooks.pausing:collect_inflight_batches",
        why="running timeouts and weight-version records look for started requests in batches only",
        how="adds the paused requests as one more batch",
        gone_when="pausing is upstream",
        instead=("Scheduler.collect_inflight_reqs",),
        elsewhere="before v0.5.19 abort_request walks the batches itself and has a seam, and running "
        "timeouts look at the running batch only, which a prefill server never fills",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.collect_inflight_reqs",
        handler="sglang_kairos.engine.hooks.pausing:collect_inflight_reqs",
        why="weight-version records and aborts look for started requests in batches only",
        how="adds the paused requests",
        gone_when="v0.5.21 is no longer supported",
        instead=("Scheduler._collect_inflight_batches",),
        elsewhere="before v0.5.19 abort_request walks the batches itself and has a seam",
    ),
    Seam(
        target="sglang.srt.disaggregation.prefill:"
        "SchedulerDisaggregationPrefillMixin.resolve_waiting_queue_bootstrap",
        handler="sglang_kairos.engine.hooks.pausing:resolve_waiting_queue_bootstrap",
        why="a paused request whose decode peer failed would keep its KV until it is resumed",
        how="puts paused requests in the waiting queue while upstream polls that queue's senders",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.is_fully_idle",
        handler="sglang_kairos.engine.hooks.pausing:is_fully_idle",
        why="idle checks and cache flushes would run over the KV of a paused prefill",
        how="answers that it is not idle while anything is paused",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler._record_step_counters",
        handler="sglang_kairos.engine.hooks.step_timing:record_step_counters",
        why="the prefill predictor learns from executed steps",
        how="reads the busy time that upstream just added for this batch",
        gone_when="SGLang publishes per-step timings",
        instead=("Scheduler.run_batch", "Scheduler.process_batch_result"),
        elsewhere="v0.5.17 to v0.5.20 have one that counts other spans than a batch's own",
        upstream="sgl-project/sglang#33067: the time of each step in the log",
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.run_batch",
        handler="sglang_kairos.engine.hooks.step_timing:run_batch",
        why="the prefill predictor learns from executed steps",
        how="notes when a prefill batch was launched",
        gone_when="v0.5.20 is no longer supported",
        instead=("Scheduler._record_step_counters",),
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.process_batch_result",
        handler="sglang_kairos.engine.hooks.step_timing:process_batch_result",
        why="the prefill predictor learns from executed steps",
        how="takes the time since the launch when the result is there",
        gone_when="v0.5.20 is no longer supported",
        instead=("Scheduler._record_step_counters",),
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer:"
        "SchedulerLoadInquirer._get_num_pending_tokens",
        handler="sglang_kairos.engine.hooks.pausing:num_pending_tokens",
        why="load reports would not count the work left in paused prefills",
        how="adds it",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer:"
        "SchedulerLoadInquirer.get_num_waiting_uncached_tokens",
        handler="sglang_kairos.engine.hooks.pausing:num_waiting_uncached_tokens",
        why="load reports would not count the work left in paused prefills",
        how="adds it",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer:"
        "SchedulerLoadInquirer.get_loads",
        handler="sglang_kairos.engine.hooks.pausing:get_loads",
        why="/v1/loads and data-parallel balancing would not see the paused requests",
        how="counts them as waiting and adds the tokens they still need",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.metrics_reporter:"
        "SchedulerMetricsReporter.report_prefill_stats",
        handler="sglang_kairos.engine.hooks.pausing:report_with_paused",
        why="the log's #queue-req and the Prometheus queue gauges count the waiting queue only",
        how="puts paused requests in the waiting queue meanwhile",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.metrics_reporter:"
        "SchedulerMetricsReporter._build_queued_request_metrics",
        handler="sglang_kairos.engine.hooks.pausing:report_with_paused",
        why="forward-pass metrics describe the waiting queue only",
        how="puts paused requests in the waiting queue meanwhile",
        gone_when="pausing is upstream",
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.internal_state:"
        "SchedulerInternalStateController.get_internal_state",
        handler="sglang_kairos.engine.hooks.lifecycle:get_internal_state",
        why="the router and operators need predictors, errors and counters",
        how="adds a `kairos` entry to /server_info",
        gone_when="never: this is Kairos' own report",
        instead=("Scheduler.get_internal_state",),
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.get_internal_state",
        handler="sglang_kairos.engine.hooks.lifecycle:get_internal_state",
        why="the router and operators need predictors, errors and counters",
        how="adds a `kairos` entry to /server_info",
        gone_when="never: this is Kairos' own report",
        instead=("SchedulerInternalStateController.get_internal_state",),
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.output_streamer:"
        "SchedulerOutputStreamer.stream_output",
        handler="sglang_kairos.engine.hooks.attainment:stream_output",
        why="whether a request met its SLO is known where its tokens leave, and every served request "
        "passes here at its end",
        how="notes when each request got its first and last token, and judges those that ended",
        gone_when="SGLang's request schema has targets, and its metrics say whether they were met",
    ),
    Seam(
        target="sglang.srt.disaggregation.decode:DecodePreallocQueue.pop_preallocated",
        handler="sglang_kairos.engine.hooks.decode:pop_preallocated",
        why="prefill sees a request only after decode reserved its KV, first come first served",
        how="sorts the queue by urgency, and lets through as many as can be kept on pace",
        gone_when="pre-allocation follows the schedule policy",
        relies_on=(callees.RESOLVE, callees.HANDSHAKES, callees.PREPARE_ABORT),
        upstream="sgl-project/sglang#40166: an order for pre-allocation",
    ),
    Seam(
        target="sglang.srt.disaggregation.decode:"
        "SchedulerDisaggregationDecodeMixin.get_new_prebuilt_batch",
        handler="sglang_kairos.engine.hooks.decode:get_new_prebuilt_batch",
        why="the first token is streamed on admission, so the order of admission decides TTFT",
        how="sorts transferred requests by TTFT slack before upstream admits",
        gone_when="admission follows the schedule policy",
        upstream="sgl-project/sglang#25062: priorities count in PD mode",
    ),
    Seam(
        target="sglang.srt.disaggregation.decode:"
        "SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
        handler="sglang_kairos.engine.hooks.decode:get_next_decode_batch",
        why="every running request decodes in every step, whatever its slack",
        how="runs upstream's function, then executes the subset chosen while it ran",
        gone_when="the running batch and the executed batch are separate upstream",
        upstream="sgl-project/sglang#28477: decode batches bounded by a latency target",
    ),
    Seam(
        target="sglang.srt.disaggregation.common.conn:CommonKVManager.update_status",
        handler="sglang_kairos.engine.hooks.transfer:update_status",
        why="two threads read and write a request's status without a lock. Decode's hand-shake is "
        "lost when it arrives while the request is opened, and the request waits for its time-out",
        how="lets one thread in at a time",
        gone_when="upstream changes statuses under a lock",
        upstream="sgl-project/sglang#19205: a review there says that it is not thread-safe",
    ),
    Seam(
        target="sglang.srt.disaggregation.mooncake.conn:MooncakeKVManager.transfer_worker",
        handler="sglang_kairos.engine.hooks.transfer:transfer_worker",
        process="mooncake",
        why="an error in the transfer of one request ends the thread, and the server with it",
        how="fails that request and runs upstream's loop again",
        gone_when="upstream's transfer thread fails one request only",
        relies_on=(callees.CONCLUDE_FAILURE, callees.RECORD_FAILURE),
        upstream="sgl-project/sglang#27162: an error fails one request only",
    ),
    Seam(
        target="sglang.srt.disaggregation.common.conn:CommonKVManager.check_status",
        handler="sglang_kairos.engine.hooks.transfer:check_status",
        why="a request cleared between two look-ups ends the transfer thread, and the server with it",
        how="answers that a room that is not there has failed, instead of a KeyError",
        gone_when="upstream's transfer thread fails one request only",
    ),
    Seam(
        target="sglang.srt.managers.schedule_batch:ScheduleBatch.retract_decode",
        handler="sglang_kairos.engine.hooks.decode:retract_decode",
        why="upstream retracts the requests with the fewest output tokens, whatever their SLO",
        how="makes this batch retract in the order of least SLO lost, and counts requests that "
        "upstream ends",
        gone_when="upstream's --retraction-policy can be extended",
        relies_on=(callees.RETRACTION_ORDER,),
        upstream="sgl-project/sglang#30573: --retraction-policy",
    ),
    Seam(
        target="sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_decode",
        handler="sglang_kairos.engine.hooks.decode:prepare_for_decode",
        why="it allocates the next token's KV for the whole batch, after filtering and retraction",
        how="prepares only the chosen subset view and writes the new lengths back",
        gone_when="the running batch and the executed batch are separate upstream",
        relies_on=(callees.FILTER_BATCH, callees.FILTER_SAMPLING),
    ),
)
