"""Access to the same thing where the supported SGLang versions keep it under different names.

Every function looks at the object it is given, never at a version number. The newest layout comes
first. What only older versions have is marked with the version, and is dropped with it. Functions
that SGLang renamed, or that a version lacks, are handled by `seams.table` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def prefix_len(req: Any) -> int:
    """Returns the prompt tokens whose KV the request has; up to v0.5.21 from their slots."""
    found: int | None = getattr(req, "prefix_len", None)
    return len(req.prefix_indices) if found is None else found


def extend_end(req: Any) -> int | None:
    """Returns where the last launched chunk ends, in tokens; None before the first.

    Up to v0.5.21 this is the end of a range.
    """
    if hasattr(req, "extend_end"):
        end: int | None = req.extend_end
        return end
    return None if req.extend_range is None else int(req.extend_range.end)


def holds_kv(req: Any) -> bool:
    """Returns whether the request has a row of KV; up to v0.5.18 its index is in the request."""
    kv = req.kv
    return (kv.req_pool_idx if hasattr(kv, "req_pool_idx") else req.req_pool_idx) is not None


def tokenizer_workers(scheduler: Any) -> int | None:
    """Returns the number of tokenizer processes of this server; None if unknown."""
    count = getattr(getattr(scheduler, "server_args", None), "tokenizer_worker_num", None)
    return None if count is None else int(count)


def in_beam_search(req: Any) -> bool:
    """Returns whether the request uses beam search, which SGLang has since v0.5.19."""
    return getattr(req, "beam_group", None) is not None


def match_prefix(req: Any, tree_cache: Any) -> None:
    """Looks the prompt up in the prefix cache; upstream notes the hit in the request."""
    _matcher()(req, tree_cache)


@functools.cache
def _matcher() -> Callable[[Any, Any], Any]:
    try:
        from sglang.srt.mem_cache.common import match_kv_cache
    except ImportError:  # up to v0.5.21
        from sglang.srt.managers.schedule_policy import match_prefix_for_req

        return lambda req, tree_cache: match_prefix_for_req(tree_cache, req, include_req=True)
    return match_kv_cache


def room_beside(adder: Any, req: Any) -> int:
    """Returns the KV tokens left for others once the cached prefix of `req` is locked.

    They are free or evictable, less what the batch being built has been promised.
    """
    with adder._lock_node(req.last_node):
        return int(adder.rem_total_tokens)


def finalizes_input_logprobs() -> bool:
    """Returns whether log probabilities are brought into one form before results are read.

    SGLang does so since v0.5.21.
    """
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    return hasattr(LogitsProcessorOutput, "finalize_input_logprobs")


def tp_size(scheduler: Any) -> int:
    """Returns the number of tensor-parallel ranks of this server.

    Before v0.5.21 they are in the scheduler's parallel state, in v0.5.21 in the process' only.
    """
    for holder in (scheduler, getattr(scheduler, "ps", None)):
        if (size := getattr(holder, "tp_size", None)) is not None:
            return int(size)
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_size)


def pipeline_ranks() -> int:
    """Returns the number of pipeline-parallel ranks of this scheduler process' server."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().pp_size)


def feature(scheduler: Any, name: str) -> Any:
    """Returns a switch: an attribute of the scheduler or, for some, a server argument."""
    if hasattr(scheduler, name):
        return getattr(scheduler, name)
    return getattr(getattr(scheduler, "server_args", None), name, None)


def add_waiting_tokens(snapshot: Any, tokens: int) -> None:
    """Counts `tokens` as still to be computed in a load snapshot; v0.5.16 has the total only."""
    snapshot.num_total_tokens += tokens
    if hasattr(snapshot, "num_active_tokens"):
        snapshot.num_active_tokens += tokens


def outstanding_parts(manager: Any) -> dict[int, int]:
    """Returns the parts in hand or to be sent by a transfer manager, by room.

    Before v0.5.19 SGLang does not count them.
    """
    found: dict[int, int] = getattr(manager, "_staging_outstanding", {})
    return found


def fail_transfer(manager: Any, room: int, reason: str) -> None:
    """Fails a transfer and tells decode.

    Before v0.5.20 decode hears of it from whoever sent to both.
    """
    if hasattr(manager, "conclude_failure"):
        manager.conclude_failure(bootstrap_room=room, failure_reason=reason)
        return
    from sglang.srt.disaggregation.base.conn import KVPoll

    manager.record_failure(room, reason)
    manager.update_status(room, KVPoll.Failed)


def give_up_s() -> float:
    """Returns the seconds that SGLang lets a request wait for its reservation, as known here.

    That is prefill's time-out, which decode is not told. An operator who shortens one side's is
    taken to shorten the other's as well, so the shorter one counts.
    """
    from sglang.srt.environ import envs

    bootstrap = envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get()
    waiting = envs.SGLANG_DISAGGREGATION_WAITING_TIMEOUT.get()
    return max(1e-3, float(min(bootstrap, waiting)))


def may_compute_again(req: Any) -> bool:
    """Returns whether a finished prefill can be made anew.

    That takes its first token back, which not every grammar can.
    """
    if req.grammar is None:
        return True
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject

    return type(req.grammar).rollback is not BaseGrammarObject.rollback


def reserves_after_prefill(queue: Any) -> bool:
    """Returns whether decode is asked for KV only once it is computed.

    V0.5.16 has no such policy.
    """
    return bool(getattr(getattr(queue, "kv_manager", None), "defer_decode_allocation", False))


def least_growth(queue: Any, req: Any) -> int:
    """Returns the tokens that must be free beside the prompt before an empty server takes `req`."""
    most = getattr(req.sampling_params, "max_new_tokens", None) or 0
    return max(getattr(queue, "num_reserved_decode_tokens", 0), min(most, _longest_planned()))


@functools.cache
def _longest_planned() -> int:
    """SGLang plans for longer outputs as if they were this long, in tokens."""
    from sglang.srt.environ import envs

    return int(envs.SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION.get())
