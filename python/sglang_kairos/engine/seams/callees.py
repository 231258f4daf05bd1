"""Functions of SGLang that handlers call or replace without wrapping them.

They are private, or do more than their names promise. So they are fingerprinted like the seams: a
handler whose callee changed would schedule on assumptions that no longer hold. `table` says which
seam relies on which. docs/upstream.md says what to do when one changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sglang_kairos.engine.fingerprints import known_texts


class Function:
    """A function of SGLang; `target` is ``module:qualified.name``."""

    target: str
    known: Mapping[str, str] | None
    kind: ClassVar[known_texts.Kind]

    @property
    def module(self) -> str:
        return self.target.split(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.split(":")[1]

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Returns version -> hash of the function's source; a version that is not there does without it.

        Decorators are excluded, so that a patched tree has the same hash.
        """
        if self.known is not None:
            return self.known
        return known_texts.of(self.target, self.kind)


@dataclass(frozen=True)
class Callee(Function):
    """One function of SGLang, and what handlers take for granted of it.

    `elsewhere`: why some versions do without it. `known`: as for a seam.
    """

    target: str
    taken: str
    elsewhere: str = ""
    known: Mapping[str, str] | None = None

    kind: ClassVar[known_texts.Kind] = "relied_on"


_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder"
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
_PREFILL = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin"
_PREALLOC = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
_MANAGER = "sglang.srt.disaggregation.common.conn:CommonKVManager"

REQUEUE = Callee(
    f"{_PREFILL}.optimistic_release_and_requeue",
    "gives KV and slots of one finished optimistic prefill back and queues it anew",
)
HAS_BOOTSTRAPPED = Callee(
    f"{_PREFILL}.has_bootstrapped_waiting_req",
    "looks, changes nothing, and answers alike on all ranks",
)
MATCH_CACHE = Callee(
    "sglang.srt.mem_cache.common:match_kv_cache",
    "notes the hit in the request and locks nothing",
    "match_prefix_for_req serves there",
)
MATCH_PREFIX = Callee(
    "sglang.srt.managers.schedule_policy:match_prefix_for_req",
    "notes the hit in the request and locks nothing",
    "match_kv_cache serves there",
)
LOCK_NODE = Callee(
    f"{_ADDER}._lock_node",
    "a context in which a cached prefix counts as neither free nor evictable",
)
ROOM = Callee(
    f"{_ADDER}.rem_total_tokens",
    "free and evictable KV less what the batch being built has been promised",
)
CEIL_TOKENS = Callee(
    f"{_ADDER}.ceil_paged_tokens",
    "rounds up to whole pages",
)
SLOT_ABORTS = Callee(
    f"{_SCHEDULER}.run_batch",
    "of all that note a request in `_pending_chunked_abort_req`, the only one without a seam: it "
    "notes the one in the chunk slot",
    "it does not touch that attribute",
)
RESOLVE = Callee(
    f"{_PREALLOC}._resolve_pending_reqs",
    "may be called before pop_preallocated does so again",
)
HANDSHAKES = Callee(
    f"{_PREALLOC}._update_handshake_waiters",
    "without arguments looks at all that wait, and may be called twice in a row",
)
PREPARE_ABORT = Callee(
    "sglang.srt.disaggregation.utils:prepare_abort",
    "sets the finish reason, which pop_preallocated then answers with",
)
RETRACTION_ORDER = Callee(
    f"{_BATCH}._get_decode_retraction_order",
    "is asked of the batch itself, and gives indices: the last of them go first",
)
FILTER_BATCH = Callee(
    f"{_BATCH}.filter_batch",
    "rebinds the batch's fields and never changes them in place",
)
FILTER_SAMPLING = Callee(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.filter_batch",
    "rebinds its fields and never changes them in place, penalties apart",
)
CONCLUDE_FAILURE = Callee(
    f"{_MANAGER}.conclude_failure",
    "fails a room and tells decode",
    "record_failure and update_status serve there",
)
RECORD_FAILURE = Callee(
    f"{_MANAGER}.record_failure",
    "notes why a room failed, whatever its state",
)
