"""Every place where Kairos touches SGLang, and the check that it is the place Kairos knows.

A seam wraps one upstream function with one Kairos function of the form ``(original, *args, **kwargs)``.
Before anything is wrapped, the source text of each upstream function is compared with the
fingerprints recorded here: a renamed or changed function stops the start-up (``--kairos-strict on``)
instead of scheduling on assumptions that no longer hold.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SUPPORTED_VERSIONS = ("0.5.23",)


@dataclass(frozen=True)
class Seam:
    """One upstream function and what Kairos does around it.

    `target` and `handler` are ``module:qualified.name``. `process` is where it matters: the
    scheduler processes or the HTTP server. `fingerprints` maps an SGLang version to the hash of the
    function's source (decorators excluded, so that a patched tree has the same one).
    """

    target: str
    handler: str
    process: str
    why: str
    how: str
    gone_when: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def module(self) -> str:
        return self.target.split(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.split(":")[1]


SEAMS: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.entrypoints.http_server:_setup_and_run_http_server",
        handler="sglang_kairos.engine.transport:run_http_server",
        process="http",
        why="a request's SLO arrives as body fields or headers that SGLang does not know",
        how="checks that every scheduler has Kairos, then adds an ASGI middleware that validates "
        "SLOs and moves them into custom_params",
        gone_when="SGLang's request schema has ttft_ms and tpot_ms",
        fingerprints={"0.5.23": "bdcd86e50f953de0"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.get_init_info",
        handler="sglang_kairos.engine.state:get_init_info",
        process="scheduler",
        why="the server must not serve when a scheduler process came up without Kairos",
        how="adds the number of installed seams to the hand-shake; the HTTP server checks it",
        gone_when="SGLang reports loaded plugins in the hand-shake",
        fingerprints={"0.5.23": "10b3059e516354be"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.run_event_loop",
        handler="sglang_kairos.engine.state:run_event_loop",
        process="scheduler",
        why="Kairos' state belongs to one scheduler and must refuse what it does not support",
        how="builds the state, refuses what is not supported, then runs the loop",
        gone_when="SGLang has a start-up hook for scheduler plugins",
        fingerprints={"0.5.23": "3f894d0448a6206a"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.get_new_batch_prefill",
        handler="sglang_kairos.engine.prefill:get_new_batch_prefill",
        process="scheduler",
        why="the chunk in progress always runs first: a long prompt blocks every urgent one",
        how="plans by urgency, swaps Scheduler.chunked_req (pause and resume), holds back what must wait",
        gone_when="the chunk slot is chosen by the schedule policy",
        fingerprints={"0.5.23": "4fd06cb5da9979ae"},
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:SchedulePolicy.calc_priority",
        handler="sglang_kairos.engine.prefill:calc_priority",
        process="scheduler",
        why="the waiting queue is ordered here; no upstream policy knows a deadline",
        how="runs the upstream policy (it matches prefixes), then applies the order of the plan",
        gone_when="schedule policies are pluggable",
        fingerprints={"0.5.23": "55854ff88dd96457"},
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:SchedulePolicy.shortest_prefill_chunk_limit",
        handler="sglang_kairos.engine.prefill:chunk_limit",
        process="scheduler",
        why="the chunk in progress takes the whole token budget, more urgent short prompts get none",
        how="returns the plan's share of the chunk budget",
        gone_when="the chunk budget is split by the schedule policy",
        fingerprints={"0.5.23": "02d0d7a316ec7639"},
    ),
    Seam(
        target="sglang.srt.managers.schedule_policy:PrefillAdder.add_one_req",
        handler="sglang_kairos.engine.prefill:add_one_req",
        process="scheduler",
        why="when the chunk slot took part of the budget, a long request behind it would start a "
        "second chunked prefill, which upstream asserts against",
        how="ends admission instead; the request keeps its place",
        gone_when="upstream refuses a second chunked request itself",
        fingerprints={"0.5.23": "0ba5f82ef33b3ce8"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.process_pending_chunked_abort",
        handler="sglang_kairos.engine.pausing:process_pending_chunked_abort",
        process="scheduler",
        why="an aborted request that is paused must be torn down like the chunk in progress",
        how="lends each aborted paused request the chunk slot while upstream tears it down",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "73eda6b71a839bed"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.abort_request",
        handler="sglang_kairos.engine.pausing:abort_request",
        process="scheduler",
        why="an abort looks through upstream's queues only, a paused prefill is in none",
        how="marks matching paused requests, then runs upstream's",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "cebc4184977cd857"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler._collect_inflight_batches",
        handler="sglang_kairos.engine.pausing:collect_inflight_batches",
        process="scheduler",
        why="running timeouts and weight-version records look for started requests in batches only",
        how="adds the paused requests as one more batch",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "981b1ac61118ddba"},
    ),
    Seam(
        target="sglang.srt.disaggregation.prefill:"
        "SchedulerDisaggregationPrefillMixin.resolve_waiting_queue_bootstrap",
        handler="sglang_kairos.engine.pausing:resolve_waiting_queue_bootstrap",
        process="scheduler",
        why="a paused request whose decode peer failed would keep its KV until it is resumed",
        how="lets the paused stand in the waiting queue while upstream polls that queue's senders",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "0e7f8e816d0c1555"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler.is_fully_idle",
        handler="sglang_kairos.engine.pausing:is_fully_idle",
        process="scheduler",
        why="idle checks and cache flushes would run over the KV of a paused prefill",
        how="not idle while anything is paused",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "26cf36a832cde2f1"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler:Scheduler._record_step_counters",
        handler="sglang_kairos.engine.prefill:record_step_counters",
        process="scheduler",
        why="the prefill predictor learns from executed steps",
        how="reads the busy time that upstream just added for this batch",
        gone_when="SGLang publishes per-step timings",
        fingerprints={"0.5.23": "1ecb174a656f0514"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer:"
        "SchedulerLoadInquirer._get_num_pending_tokens",
        handler="sglang_kairos.engine.pausing:num_pending_tokens",
        process="scheduler",
        why="load reports would not count the work left in paused prefills",
        how="adds it",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "7915cd6491be23b3"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer:"
        "SchedulerLoadInquirer.get_num_waiting_uncached_tokens",
        handler="sglang_kairos.engine.pausing:num_waiting_uncached_tokens",
        process="scheduler",
        why="load reports would not count the work left in paused prefills",
        how="adds it",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "3b9d0ea0e1ae0fa0"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.load_inquirer:"
        "SchedulerLoadInquirer.get_loads",
        handler="sglang_kairos.engine.pausing:get_loads",
        process="scheduler",
        why="/v1/loads and data-parallel balancing would not see the paused requests",
        how="counts them as waiting and adds the tokens they still need",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "2bad1914b5d61190"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.metrics_reporter:"
        "SchedulerMetricsReporter.report_prefill_stats",
        handler="sglang_kairos.engine.pausing:report_with_paused",
        process="scheduler",
        why="the log's #queue-req and the Prometheus queue gauges count the waiting queue only",
        how="lets the paused stand in the waiting queue meanwhile",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "25f50a03ae0ee2bc"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.metrics_reporter:"
        "SchedulerMetricsReporter._build_queued_request_metrics",
        handler="sglang_kairos.engine.pausing:report_with_paused",
        process="scheduler",
        why="forward-pass metrics describe the waiting queue only",
        how="lets the paused stand in the waiting queue meanwhile",
        gone_when="pausing is upstream",
        fingerprints={"0.5.23": "a42176bd00bdbb8e"},
    ),
    Seam(
        target="sglang.srt.managers.scheduler_components.internal_state:"
        "SchedulerInternalStateController.get_internal_state",
        handler="sglang_kairos.engine.state:get_internal_state",
        process="scheduler",
        why="the router and operators need predictors, errors and counters",
        how="adds a `kairos` entry to /server_info",
        gone_when="never: this is Kairos' own report",
        fingerprints={"0.5.23": "b2caad1128ded211"},
    ),
    Seam(
        target="sglang.srt.disaggregation.decode:DecodePreallocQueue.pop_preallocated",
        handler="sglang_kairos.engine.decode:pop_preallocated",
        process="scheduler",
        why="prefill sees a request only after decode reserved its KV, first come first served",
        how="sorts the queue by urgency first",
        gone_when="pre-allocation follows the schedule policy",
        fingerprints={"0.5.23": "cfa52d2f419fd954"},
    ),
    Seam(
        target="sglang.srt.disaggregation.decode:"
        "SchedulerDisaggregationDecodeMixin.get_new_prebuilt_batch",
        handler="sglang_kairos.engine.decode:get_new_prebuilt_batch",
        process="scheduler",
        why="the first token is streamed on admission: who gets a free slot decides TTFT",
        how="sorts transferred requests by TTFT slack before upstream admits",
        gone_when="admission follows the schedule policy",
        fingerprints={"0.5.23": "f905242577d5eca6"},
    ),
    Seam(
        target="sglang.srt.disaggregation.decode:"
        "SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
        handler="sglang_kairos.engine.decode:get_next_decode_batch",
        process="scheduler",
        why="every running request decodes in every step, whatever its slack",
        how="runs upstream's, then executes the subset chosen while it ran",
        gone_when="the running batch and the executed batch are separate upstream",
        fingerprints={"0.5.23": "8e26fd56c274e1a9"},
    ),
    Seam(
        target="sglang.srt.managers.schedule_batch:ScheduleBatch.retract_decode",
        handler="sglang_kairos.engine.decode:retract_decode",
        process="scheduler",
        why="who is retracted is who has the fewest output tokens, whatever was promised to him",
        how="has this batch retract in the order of least SLO lost",
        gone_when="upstream's --retraction-policy can be extended",
        fingerprints={"0.5.23": "959dc41176f9d084"},
    ),
    Seam(
        target="sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_decode",
        handler="sglang_kairos.engine.decode:prepare_for_decode",
        process="scheduler",
        why="it allocates the next token's KV for the whole batch, after filtering and retraction",
        how="prepares only the chosen subset view and writes the new lengths back",
        gone_when="the running batch and the executed batch are separate upstream",
        fingerprints={"0.5.23": "c19ab26d3aeac033"},
    ),
)


class SeamError(RuntimeError):
    """An upstream function is missing, changed, or was not wrapped."""


def _module_path(module: str) -> Path | None:
    root = importlib.util.find_spec(module.split(".")[0])
    if root is None or not root.submodule_search_locations:
        return None
    base = Path(next(iter(root.submodule_search_locations))).joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=16)
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


def _find(body: list[ast.stmt], names: list[str]) -> ast.stmt | None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == names[0]:
                return node if len(names) == 1 else _find(node.body, names[1:])
    return None


def fingerprint(source: str, qualname: str) -> str | None:
    """Hash of a function's text in `source` from ``def`` on; None when there is no such function.

    Text, not AST: the same on every Python. Trailing blanks and indentation do not count.
    """
    node = _find(_parse(source).body, qualname.split("."))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
        return None
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    text = textwrap.dedent("\n".join(line.rstrip() for line in lines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_sources(seams: Iterable[Seam] = SEAMS) -> list[str]:
    """Compare each seam with the installed SGLang's source, without importing it.

    Returns one sentence per problem, each naming the upstream function; empty when all is known.
    """
    problems: list[str] = []
    sources: dict[str, str | None] = {}
    for seam in seams:
        if seam.module not in sources:
            path = _module_path(seam.module)
            sources[seam.module] = None if path is None else path.read_text(encoding="utf-8")
        source = sources[seam.module]
        if source is None:
            problems.append(f"{seam.target}: SGLang has no module {seam.module}")
            continue
        found = fingerprint(source, seam.qualname)
        if found is None:
            problems.append(f"{seam.target}: SGLang has no such function")
        elif found not in seam.fingerprints.values():
            known = ", ".join(f"v{v}" for v in seam.fingerprints)
            problems.append(f"{seam.target}: unknown source {found}; Kairos knows {known}")
    return problems


def way_out(problems: Iterable[str], installed: str) -> str:
    """The message a user sees when Kairos refuses to start."""
    listed = "\n".join(f"  - {problem}" for problem in problems)
    versions = ", ".join(SUPPORTED_VERSIONS)
    return (
        f"Kairos refuses to start: the installed SGLang ({installed}) is not what it was checked "
        f"against.\n{listed}\n"
        f"Way out: install a supported SGLang ({versions}), or start with --kairos off (KAIROS=off) "
        "for stock scheduling, or --kairos-strict off (KAIROS_STRICT=off) to run without the seams "
        "named above at your own risk."
    )
