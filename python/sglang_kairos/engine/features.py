"""A table of SGLang features that Kairos does not schedule around.

Pausing and parking are proven where the identity tests run. Elsewhere a request may carry state
beside its KV, or be counted somewhere that does not know of a pause. There stock scheduling stays.
The start-up log and the table in docs/architecture.md (``scripts/doc_tables.py``) come from
`FEATURES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sglang_kairos.engine import compat

Action = Literal["pause", "park", "reserve", "start", "serve"]

# What a server logs when it starts, by the mode where the action matters.
_LOST: dict[str, dict[Action, str]] = {
    "prefill": {"pause": "chunked prefills are not paused"},
    "decode": {
        "park": "decode packing is off",
        "reserve": "predicted steps do not limit admission",
    },
}


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of SGLang and what it forbids.

    `reason` completes "… is off while"; for a refusal it is the whole message. `flag` is what users
    know it by. `server` looks for it on the scheduler, `batch` on each running batch (for parking).

    `forbids`:
        pause     pausing a chunked prefill
        park      parking running requests
        reserve   limiting reservations by predicted steps
        start     starting a scheduler at all
        serve     starting the HTTP server; `server` then gets SGLang's server arguments
    """

    name: str
    reason: str
    forbids: tuple[Action, ...]
    server: Callable[[Any], Any] | None = None
    batch: Callable[[Any], Any] | None = None
    flag: str = ""

    def found(self, server: Any, batch: Any = None) -> bool:
        """Returns whether `server` or, if given, `batch` has it."""
        if self.server is not None and self.server(server):
            return True
        return batch is not None and self.batch is not None and bool(self.batch(batch))


def _on(name: str) -> Callable[[Any], Any]:
    """Returns a check for a switch of the scheduler, or for one of its server arguments."""
    return functools.partial(compat.feature, name=name)


def _speculates(owner: Any) -> bool:
    """Returns whether a scheduler or a batch decodes speculatively."""
    algorithm = getattr(owner, "spec_algorithm", None)
    return algorithm is not None and not algorithm.is_none()


def _has_mamba(scheduler: Any) -> bool:
    pool = getattr(scheduler, "req_to_token_pool", None)
    return getattr(pool, "mamba_allocator", None) is not None


FEATURES = (
    Feature(
        "speculative decoding",
        "speculative decoding is on",
        ("pause", "park", "reserve"),  # a step yields several tokens: its time says little of TPOT
        _speculates,
        _speculates,
        "--speculative-algorithm",
    ),
    Feature(
        "penalties",
        "a request uses penalties",
        ("park",),
        batch=lambda batch: batch.sampling_info.penalizer_orchestrator.is_required,
    ),
    Feature(
        "beam search",
        "a request uses beam search",
        ("park",),
        batch=lambda batch: any(map(compat.in_beam_search, batch.reqs)),
    ),
    Feature(
        "hisparse",
        "hisparse is on",
        ("pause", "park"),
        _on("enable_hisparse"),
        lambda batch: batch.hisparse_coordinator is not None,
        "--enable-hisparse",
    ),
    Feature(
        "encoder-decoder models",
        "the model is an encoder-decoder",
        ("park",),
        batch=lambda batch: batch.model_config.is_encoder_decoder,
    ),
    Feature("Mamba models", "the model has mamba state", ("park",), _has_mamba),
    Feature(
        "DP attention",
        "DP attention synchronises batches",
        ("pause", "park"),
        _on("require_mlp_sync"),
        flag="--enable-dp-attention",
    ),
    Feature(
        "sliding-window models",
        "the model has a sliding-window KV pool",
        ("pause",),
        _on("is_hybrid_swa"),
    ),
    Feature("hybrid models", "the model has state-space layers", ("pause",), _on("is_hybrid_ssm")),
    Feature("LoRA", "LoRA is on", ("pause",), _on("enable_lora"), flag="--enable-lora"),
    Feature(
        "hierarchical cache",
        "the hierarchical cache is on",
        ("pause",),
        _on("enable_hierarchical_cache"),
        flag="--enable-hierarchical-cache",
    ),
    Feature("LMCache", "LMCache is on", ("pause",), _on("enable_lmcache"), flag="--enable-lmcache"),
    Feature("staged KV transfer", "KV transfer is staged", ("pause",), _on("enable_staging")),
    Feature("diffusion LLMs", "the model is a diffusion LLM", ("pause",), _on("dllm_config")),
    Feature(
        "pipeline parallelism",
        "Kairos does not support pipeline parallelism (--pp-size > 1); start with --kairos off",
        ("start",),
        lambda _: compat.pipeline_ranks() > 1,
        flag="--pp-size > 1",
    ),
    Feature(
        "several tokenizer processes",
        "Kairos does not support --tokenizer-worker-num > 1: those worker processes load no "
        "plugins, so SLOs would be dropped silently. Use 1, or start with --kairos off.",
        ("serve",),
        lambda server_args: getattr(server_args, "tokenizer_worker_num", 1) > 1,
        flag="--tokenizer-worker-num > 1",
    ),
)

_BY_ACTION: dict[Action, tuple[Feature, ...]] = {
    action: tuple(row for row in FEATURES if action in row.forbids)
    for action in ("pause", "park", "reserve", "start", "serve")
}


def reasons(action: Action, server: Any, batch: Any = None) -> Iterator[str]:
    """Yields why `action` is forbidden on this scheduler (and batch), in words."""
    return (row.reason for row in _BY_ACTION[action] if row.found(server, batch))


def why_not(action: Action, server: Any, batch: Any = None) -> str:
    """Returns the first of the `reasons`; empty if the action is allowed."""
    return next(reasons(action, server, batch), "")


def refuse_unsupported(scheduler: Any) -> None:
    """Raises RuntimeError where Kairos cannot schedule correctly at all."""
    if reason := why_not("start", scheduler):
        raise RuntimeError(reason)


def lost(mode: str, scheduler: Any, wanted: Container[Action]) -> list[str]:
    """Returns what of `wanted` a server in this mode does without, and why.

    For the start-up log.
    """
    return [
        f"{text}: {', '.join(found)}"
        for action, text in _LOST.get(mode, {}).items()
        if action in wanted and (found := list(reasons(action, scheduler)))
    ]
