"""Where the supported SGLang versions keep the same thing under different names.

Every function looks at the object it is given, never at a version number. The newest layout comes
first; what only older ones have is named so, and goes with them. Functions that SGLang renamed or
that one version lacks are no matter of layout: they are in the table of `seams.table`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def prefix_len(req: Any) -> int:
    """Prompt tokens whose KV the request has. Up to v0.5.21: their slots only."""
    found: int | None = getattr(req, "prefix_len", None)
    return len(req.prefix_indices) if found is None else found


def extend_end(req: Any) -> int | None:
    """Where the chunk launched last ends, in tokens; None before the first. Up to v0.5.21: a range."""
    if hasattr(req, "extend_end"):
        end: int | None = req.extend_end
        return end
    return None if req.extend_range is None else int(req.extend_range.end)


def holds_kv(req: Any) -> bool:
    """Whether it has a row of KV. Up to v0.5.18 the row's index is in the request itself."""
    kv = req.kv
    return (kv.req_pool_idx if hasattr(kv, "req_pool_idx") else req.req_pool_idx) is not None


def tokenizer_workers(scheduler: Any) -> int | None:
    """Tokenizer processes of this server; None if it does not say."""
    count = getattr(getattr(scheduler, "server_args", None), "tokenizer_worker_num", None)
    return None if count is None else int(count)


def in_beam_search(req: Any) -> bool:
    """There is none before v0.5.19."""
    return getattr(req, "beam_group", None) is not None


def match_prefix(req: Any, tree_cache: Any) -> None:
    """Look the prompt up in the prefix cache; upstream notes the hit in the request."""
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
    """KV tokens that are free or evictable once the cached prefix of `req` is locked, less what the
    batch being built has been promised."""
    with adder._lock_node(req.last_node):
        return int(adder.rem_total_tokens)


def finalizes_input_logprobs() -> bool:
    """Whether log probabilities are brought into one form before results are read. Not so before
    v0.5.21."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    return hasattr(LogitsProcessorOutput, "finalize_input_logprobs")


def tp_size(scheduler: Any) -> int:
    """Tensor-parallel ranks of this server. Before v0.5.21 they are in the scheduler's parallel state,
    in v0.5.21 in the process' only."""
    for holder in (scheduler, getattr(scheduler, "ps", None)):
        if (size := getattr(holder, "tp_size", None)) is not None:
            return int(size)
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_size)


def pipeline_ranks() -> int:
    """Pipeline-parallel ranks of this scheduler process' server."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().pp_size)


def feature(scheduler: Any, name: str) -> Any:
    """A switch: an attribute of the scheduler or, in older versions for some, a server argument."""
    if hasattr(scheduler, name):
        return getattr(scheduler, name)
    return getattr(getattr(scheduler, "server_args", None), name, None)


def add_waiting_tokens(snapshot: Any, tokens: int) -> None:
    """Count `tokens` as still to be computed in a load snapshot. v0.5.16 has the total only."""
    snapshot.num_total_tokens += tokens
    if hasattr(snapshot, "num_active_tokens"):
        snapshot.num_active_tokens += tokens


def outstanding_parts(manager: Any) -> dict[int, int]:
    """Parts in hand or to be sent, by room, of a transfer manager. Not counted before v0.5.19."""
    found: dict[int, int] = getattr(manager, "_staging_outstanding", {})
    return found


def fail_transfer(manager: Any, room: int, reason: str) -> None:
    """Fail a transfer and tell decode; before v0.5.20 decode hears of it from whoever sent to both."""
    if hasattr(manager, "conclude_failure"):
        manager.conclude_failure(bootstrap_room=room, failure_reason=reason)
        return
    from sglang.srt.disaggregation.base.conn import KVPoll

    manager.record_failure(room, reason)
    manager.update_status(room, KVPoll.Failed)


def give_up_s() -> float:
    """Seconds that SGLang lets a request wait for its reservation, as far as this process knows.

    That is prefill's time-out, which decode is not told. Whoever shortens one side's shortens the
    other's as well, so the shorter one counts.
    """
    from sglang.srt.environ import envs

    bootstrap = envs.SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT.get()
    waiting = envs.SGLANG_DISAGGREGATION_WAITING_TIMEOUT.get()
    return max(1e-3, float(min(bootstrap, waiting)))


def may_compute_again(req: Any) -> bool:
    """Whether a finished prefill can be made anew: not every grammar can take its token back."""
    if req.grammar is None:
        return True
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject

    return type(req.grammar).rollback is not BaseGrammarObject.rollback


def reserves_after_prefill(queue: Any) -> bool:
    """Whether decode is asked for KV only once it is computed. v0.5.16 knows no such policy."""
    return bool(getattr(getattr(queue, "kv_manager", None), "defer_decode_allocation", False))


def least_growth(queue: Any, req: Any) -> int:
    """Tokens that must be free beside the prompt before an empty decode server takes `req`."""
    most = getattr(req.sampling_params, "max_new_tokens", None) or 0
    return max(getattr(queue, "num_reserved_decode_tokens", 0), min(most, _longest_planned()))


@functools.cache
def _longest_planned() -> int:
    """SGLang plans for longer outputs as if they were this long."""
    from sglang.srt.environ import envs

    return int(envs.SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION.get())
