"""Functions of SGLang that handlers call or replace without wrapping them.

They are private, or do more than their names promise, so they are fingerprinted like the seams: a
handler whose callee changed would schedule on assumptions that no longer hold. `seams` says which
seam relies on which; docs/upstream.md says what to do when one changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class Function:
    """A function of SGLang; `target` is ``module:qualified.name``."""

    target: str

    @property
    def module(self) -> str:
        return self.target.split(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.split(":")[1]


@dataclass(frozen=True)
class Callee(Function):
    """One function of SGLang and what is taken for granted of it.

    `fingerprints` and `absent` by SGLang version, as of a seam: there is no such function, or it is
    not called there.
    """

    target: str
    taken: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder"
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
_PREFILL = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin"
_PREALLOC = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
_MANAGER = "sglang.srt.disaggregation.common.conn:CommonKVManager"

REQUEUE = Callee(
    f"{_PREFILL}.optimistic_release_and_requeue",
    "gives KV and slots of one finished optimistic prefill back and queues it anew",
    {"0.5.23": "819ca89c89b8fe1a", "0.5.16": "070255138ad79bef"},
)
HAS_BOOTSTRAPPED = Callee(
    f"{_PREFILL}.has_bootstrapped_waiting_req",
    "looks, changes nothing, and answers alike on all ranks",
    {"0.5.23": "7c5df57d069cdcda", "0.5.16": "7c5df57d069cdcda"},
)
MATCH_CACHE = Callee(
    "sglang.srt.mem_cache.common:match_kv_cache",
    "notes the hit in the request and locks nothing",
    {"0.5.23": "b06cc5c04395e8ce"},
    {"0.5.16": "match_prefix_for_req serves there"},
)
MATCH_PREFIX = Callee(
    "sglang.srt.managers.schedule_policy:match_prefix_for_req",
    "notes the hit in the request and locks nothing",
    {"0.5.16": "6ebeed5f399b273d"},
    {"0.5.23": "match_kv_cache serves there"},
)
LOCK_NODE = Callee(
    f"{_ADDER}._lock_node",
    "a context in which a cached prefix counts as neither free nor evictable",
    {"0.5.23": "c6ca218bb62a3349", "0.5.16": "94f5cc8ebc4072db"},
)
ROOM = Callee(
    f"{_ADDER}.rem_total_tokens",
    "free and evictable KV less what the batch being built has been promised",
    {"0.5.23": "fc84fef295ebf74d", "0.5.16": "9cdd3538bd38dce9"},
)
CEIL_TOKENS = Callee(
    f"{_ADDER}.ceil_paged_tokens",
    "rounds up to whole pages",
    {"0.5.23": "b6d5b9d9c1d59e35", "0.5.16": "b6d5b9d9c1d59e35"},
)
SLOT_ABORTS = Callee(
    f"{_SCHEDULER}.run_batch",
    "of all that note a request in `_pending_chunked_abort_req`, the only one without a seam: it "
    "notes the one in the chunk slot",
    {"0.5.23": "cda781c95f30944b"},
    {"0.5.16": "it does not touch that attribute"},
)
RESOLVE = Callee(
    f"{_PREALLOC}._resolve_pending_reqs",
    "may be called before pop_preallocated does so again",
    {"0.5.23": "0ada8b58d4dfb94a", "0.5.16": "d1a20075ee64f73c"},
)
HANDSHAKES = Callee(
    f"{_PREALLOC}._update_handshake_waiters",
    "without arguments looks at all that wait, and may be called twice in a row",
    {"0.5.23": "1851cb0bb61b099a", "0.5.16": "198ea5051d6bb09b"},
)
PREPARE_ABORT = Callee(
    "sglang.srt.disaggregation.utils:prepare_abort",
    "sets the finish reason, which pop_preallocated then answers with",
    {"0.5.23": "b8653dcc38941b9c", "0.5.16": "b8653dcc38941b9c"},
)
RETRACTION_ORDER = Callee(
    f"{_BATCH}._get_decode_retraction_order",
    "is asked of the batch itself, and gives indices: the last of them go first",
    {"0.5.23": "7671f7cc975946f0", "0.5.16": "00c2340e1da1cdee"},
)
FILTER_BATCH = Callee(
    f"{_BATCH}.filter_batch",
    "rebinds the batch's fields and never changes them in place",
    {"0.5.23": "2c50ee4bc908b0b0", "0.5.16": "1a71c5224452a8d8"},
)
FILTER_SAMPLING = Callee(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.filter_batch",
    "rebinds its fields and never changes them in place, penalties apart",
    {"0.5.23": "8ea6821416a943cf", "0.5.16": "4b6815c63b6ce201"},
)
CONCLUDE_FAILURE = Callee(
    f"{_MANAGER}.conclude_failure",
    "fails a room and tells decode",
    {"0.5.23": "797456b563270a76"},
    {"0.5.16": "record_failure and update_status serve there"},
)
RECORD_FAILURE = Callee(
    f"{_MANAGER}.record_failure",
    "notes why a room failed, whatever its state",
    {"0.5.23": "8153b6948364f799", "0.5.16": "8153b6948364f799"},
)
