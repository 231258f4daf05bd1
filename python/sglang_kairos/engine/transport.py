"""How an SLO gets from an HTTP request into SGLang: an ASGI middleware in front of its app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kairos.engine import http_slo
from sglang_kairos.engine.plugin import active_config


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
    without = sum("kairos" not in info for info in scheduler_infos)
    if without and active_config().strict:
        raise SystemExit(
            f"Kairos refuses to serve: {without} of {len(scheduler_infos)} scheduler processes came "
            "up without it, so they would schedule as stock SGLang. Look for the plugin's message in "
            "the log above; start with --kairos off for stock scheduling."
        )
    if getattr(server_args, "tokenizer_worker_num", 1) > 1:
        raise SystemExit(
            "Kairos does not support --tokenizer-worker-num > 1: those worker processes load no "
            "plugins, so SLOs would be dropped silently. Use 1, or start with --kairos off."
        )
    from sglang.srt.entrypoints.http_server import app

    http_slo.install(app, active_config().slo_table())
    return original(
        server_args,
        tokenizer_manager,
        template_manager,
        port_args,
        scheduler_infos,
        *args,
        **kwargs,
    )
