"""Kairos inside a worker of NVIDIA Dynamo, ``python -m dynamo.sglang``.

Such a worker runs SGLang in its own process (`sgl.Engine`), so there is no HTTP server of SGLang's
and no middleware. SGLang still loads its plugins there when the engine is made. Kairos then does
three things in the prefill and in the decode worker:
- it takes the SLO of each request from what Dynamo's frontend says (`slo.dynamo`);
- it checks that every scheduler has Kairos;
- it shows ``kairos_…`` metrics on the worker's own port.

Dynamo's functions are known by their source text, like SGLang's: an unknown one stops the start.
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import compat
from sglang_kairos.engine.hooks import http
from sglang_kairos.engine.hooks.slo_middleware import UNKNOWN, ServerFacts
from sglang_kairos.engine.seams.callees import Callee
from sglang_kairos.engine.survey import fingerprint
from sglang_kairos.slo.body import GENERATE
from sglang_kairos.slo.dynamo import custom_params, native_body
from sglang_kairos.slo.limits import RequestError, check_request
from sglang_kairos.slo.targets import SloError, SloTable

logger = logging.getLogger(__name__)

INIT_MODULE = "dynamo.sglang.init_llm"
_HANDLERS = "dynamo.sglang.request_handlers.llm"
DECODE_MODULE, PREFILL_MODULE = f"{_HANDLERS}.decode_handler", f"{_HANDLERS}.prefill_handler"


# Completes "requests …", for a Dynamo that is unknown.
_LOST = "all have the default SLO, and Kairos' metrics are missing"


def _known(target: str, taken: str, **fingerprints: str) -> Callee:
    known = {version[1:].replace("_", "."): text for version, text in fingerprints.items()}
    return Callee(target, taken, known=known)


FUNCTIONS = (
    _known(
        f"{DECODE_MODULE}:DecodeWorkerHandler._build_sampling_params",
        "returns what its module's apply_thinking_budget makes of the request and its parameters",
        v1_6_1="593ac416f5d8eebd",
    ),
    _known(
        f"{DECODE_MODULE}:DecodeWorkerHandler.generate",
        "sends what _build_sampling_params returns, or what its module's native_generate_payload does",
        v1_6_1="3d0dc83a9445a899",
    ),
    _known(
        f"{PREFILL_MODULE}:PrefillWorkerHandler.generate",
        "sends what its module's apply_thinking_budget returns, or native_generate_payload",
        v1_6_1="065d3351c688ebd2",
    ),
    _known(
        "dynamo.sglang.thinking_budget:apply_thinking_budget",
        "is given the request and returns sampling parameters of its own, custom_params merged",
        v1_6_1="a6b1ab75bc6551df",
    ),
    _known(
        "dynamo.sglang.engine_generate:native_generate_payload",
        "returns the body of a native request, else None",
        v1_6_1="b312c3b292cad16d",
    ),
    _known(
        "dynamo.sglang.engine_generate:build_native_generate_request",
        "passes custom_params on as the body has them",
        v1_6_1="9b4114f1beaa2bb1",
    ),
    _known(
        f"{INIT_MODULE}:init_prefill",
        "makes the engine, then awaits its module's setup_sgl_metrics, then serves",
        v1_6_1="a1bf72c5370f0fef",
    ),
    _known(f"{INIT_MODULE}:init_decode", "the same", v1_6_1="0370d732d0caa6c0"),
    _known(
        "dynamo.sglang.publisher:setup_prometheus_registry",
        "shows the metrics of SGLang's processes whose names begin with sglang:",
        v1_6_1="dc8c1d92300cada8",
    ),
    _known(
        "dynamo.common.utils.prometheus:register_engine_metrics_callback",
        "shows the metrics of a registry whose names begin with a prefix",
        v1_6_1="01cd8c2172585b60",
    ),
)


def unknown_texts() -> list[str]:
    """Returns one sentence for each of `FUNCTIONS` that is not as known.

    They must be importable.
    """
    found = []
    for function in FUNCTIONS:
        text = _text(function)
        if text not in function.fingerprints.values():
            versions = ", ".join(function.fingerprints)
            what = f"unknown source {text}" if text else "there is no such function"
            found.append(f"{function.target}: {what}; Kairos knows ai-dynamo {versions}")
    return found


def _text(function: Callee) -> str:
    try:
        path = importlib.import_module(function.module).__file__
    except ImportError:
        path = None
    source = Path(path).read_text(encoding="utf-8") if path else ""
    return fingerprint(source, function.qualname) or ""


def install(config: KairosConfig) -> None:
    """Installs Kairos in this worker. Raises SystemExit if Dynamo is not one that it knows."""
    if not config.dynamo:
        logger.warning("Kairos: Dynamo's requests all have the default SLO (--kairos-dynamo off)")
        return
    if problems := unknown_texts():
        listed = "\n".join(f"  - {problem}" for problem in problems)
        if config.strict == "on":
            raise SystemExit(
                "Kairos refuses to start: the installed Dynamo is not what it was checked against.\n"
                f"{listed}\nWay out: install ai-dynamo 1.6.1, or set KAIROS_STRICT=seam: requests then "
                f"{_LOST}."
            )
        logger.warning("Kairos leaves this Dynamo alone, requests %s:\n%s", _LOST, listed)
        return
    worker = Worker(config.slo_table())
    for module in (DECODE_MODULE, PREFILL_MODULE):
        _replace(module, "apply_thinking_budget", worker.sampling_params)
        _replace(module, "native_generate_payload", worker.native_payload)
    _replace(INIT_MODULE, "setup_sgl_metrics", worker.start)
    logger.info("Kairos takes the SLOs of Dynamo's requests")


def _replace(module: str, name: str, handler: Callable[..., Any]) -> None:
    owner = importlib.import_module(module)
    setattr(owner, name, functools.partial(handler, getattr(owner, name)))


class Worker:
    """One Dynamo worker's handlers; each is given the function of Dynamo that it wraps."""

    def __init__(
        self, table: SloTable, clock: Callable[[], float] = time.time, facts: ServerFacts = UNKNOWN
    ) -> None:
        self._table, self._clock, self._facts = table, clock, facts
        self._failed: Counter[str] = Counter()

    async def start(
        self,
        original: Callable[..., Awaitable[Any]],
        engine: Any,
        config: Any,
        endpoint: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Checks the schedulers and shows metrics, once the engine exists and before it serves."""
        schedulers = engine._scheduler_init_result.scheduler_infos
        http.refuse_to_serve(engine.server_args, schedulers)
        self._facts = http.facts_of(
            engine.server_args,
            engine.tokenizer_manager,
            schedulers,
            compat.finalizes_input_logprobs(),
        )
        result = await original(engine, config, endpoint, *args, **kwargs)
        if engine.server_args.enable_metrics:
            _show_metrics(engine, config, endpoint)
        return result

    def sampling_params(
        self,
        original: Callable[..., dict[str, Any]],
        request: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns what Dynamo makes of a request, with its SLO."""
        result = original(request, *args, **kwargs)

        def with_slo() -> dict[str, Any]:
            given = result.get("custom_params")
            now_ms = 1e3 * self._clock()
            params = custom_params(request, given, self._table, now_ms, self._facts.preferred)
            return result if params is None else {**result, "custom_params": params}

        return self._guarded("request", with_slo, result)

    def native_payload(
        self, original: Callable[..., Mapping[str, Any] | None], request: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """Returns the body of a native request with its SLO, checked as an HTTP server would."""
        payload = original(request)
        if payload is None:
            return None

        def with_slo() -> Mapping[str, Any]:
            check_request(payload, GENERATE, self._facts.limits)
            now_ms = 1e3 * self._clock()
            return native_body(request, payload, self._table, now_ms, self._facts.preferred)

        return self._guarded("native request", with_slo, payload)

    def _guarded(self, what: str, made: Callable[[], Any], fallback: Any) -> Any:
        """Returns `made()`, or `fallback` on an error of ours.

        A client's mistake is answered with 400.
        """
        try:
            return made()
        except (SloError, RequestError) as error:
            from dynamo.llm.exceptions import InvalidArgument

            raise InvalidArgument(str(error)) from None
        except Exception:
            self._failed[what] += 1
            if self._failed[what] == 1:
                logger.exception("Kairos: no SLO was taken from a %s; said once", what)
            return fallback


def _show_metrics(engine: Any, config: Any, endpoint: Any) -> None:
    """Shows Kairos' counts where Dynamo shows SGLang's, which it picks by prefix."""
    from dynamo.common.utils.prometheus import register_engine_metrics_callback
    from prometheus_client import CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    names = config.dynamo_args
    register_engine_metrics_callback(
        endpoint=endpoint,
        registry=registry,
        metric_prefix_filters=["kairos_"],
        namespace_name=names.namespace,
        component_name=names.component,
        endpoint_name=names.endpoint,
        model_name=engine.server_args.served_model_name,
    )
