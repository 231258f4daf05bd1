"""The start of SGLang's HTTP server: checks its schedulers, and puts `slo_middleware` before its app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kairos.engine import compat, features
from sglang_kairos.engine.hooks import slo_middleware
from sglang_kairos.engine.installed import MISSING, active_config
from sglang_kairos.engine.state.metrics import header_counter
from sglang_kairos.slo.limits import MOST_SAMPLES, RequestLimits


def run_http_server(
    original: Callable[..., Any],
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: list[dict[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Seam of SGLang's HTTP server start: check the schedulers, put the SLO middleware in front."""
    refuse_to_serve(server_args, scheduler_infos)
    from sglang.srt.entrypoints.http_server import app

    token_ids = compat.finalizes_input_logprobs()
    facts = facts_of(server_args, tokenizer_manager, scheduler_infos, token_ids)
    count = header_counter(server_args) if getattr(server_args, "enable_metrics", False) else None
    slo_middleware.install(app, active_config().slo_table(), facts, count)
    return original(
        server_args,
        tokenizer_manager,
        template_manager,
        port_args,
        scheduler_infos,
        *args,
        **kwargs,
    )


def refuse_to_serve(server_args: Any, scheduler_infos: list[dict[str, Any]]) -> None:
    """Raises SystemExit where a scheduler came up without Kairos, or the server would drop SLOs."""
    without = sum("kairos" not in info for info in scheduler_infos)
    if without and "Scheduler.get_init_info" not in MISSING:
        raise SystemExit(
            f"Kairos refuses to serve: {without} of {len(scheduler_infos)} scheduler processes came "
            "up without it, so they would schedule as stock SGLang. Look for the plugin's message in "
            "the log above; start with --kairos off for stock scheduling."
        )
    if refused := features.why_not("serve", server_args):
        raise SystemExit(refused)


def facts_of(
    server_args: Any,
    tokenizer_manager: Any,
    scheduler_infos: list[dict[str, Any]],
    token_ids: bool = True,
) -> slo_middleware.ServerFacts:
    """Returns what the middleware needs to know of this server; what SGLang does not say stays unknown.

    `token_ids`: whether log probabilities of chosen token ids may be asked for.
    """

    def told(owner: Any, name: str, fallback: Any = None) -> Any:
        return getattr(owner, name, fallback)

    role = told(server_args, "disaggregation_mode", "null")
    decodes = role == "decode"
    fixed = not told(server_args, "enable_pd_role_switch", False)
    bounded = not told(server_args, "allow_auto_truncate", False)
    own_memory = decodes and fixed and not told(server_args, "enable_hisparse", False)
    kv_tokens = scheduler_infos[0].get("max_total_num_tokens") if scheduler_infos else None
    preferred = told(tokenizer_manager, "preferred_sampling_params") or {}
    limits = RequestLimits(
        vocabulary=told(told(tokenizer_manager, "model_config"), "vocab_size"),
        context_tokens=told(tokenizer_manager, "context_len") if bounded else None,
        kv_tokens=kv_tokens if bounded and own_memory else None,
        reserved_tokens=told(server_args, "num_reserved_decode_tokens", 0),
        page_tokens=told(server_args, "page_size") or 1,
        # SGLang gives all samples of a prompt one bootstrap room, and none of them ever ends.
        samples=MOST_SAMPLES if role == "null" else 1,
        token_ids_logprob=token_ids,
    )
    return slo_middleware.ServerFacts(
        limits=limits,
        preferred=preferred.get("custom_params") or {},
        needs_bootstrap=decodes and fixed and server_args.disaggregation_transfer_backend != "fake",
    )
