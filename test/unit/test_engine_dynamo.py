"""Kairos in a Dynamo worker: on modules that look like Dynamo's."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import prometheus_client  # noqa: F401 (asks once, here and now, whether processes share metrics)
import pytest

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import dynamo, plugin
from sglang_kairos.engine.seams.callees import Callee

pytestmark = pytest.mark.anyio

SOURCE = """
class InvalidArgument(Exception):
    pass
def apply_thinking_budget(request, sampling_params, server_args, *, engine=None):
    return dict(sampling_params)
def native_generate_payload(request):
    return request.get("native")
async def setup_sgl_metrics(engine, config, endpoint):
    return "publisher"
def register_engine_metrics_callback(**named):
    SHOWN.append(named)
SHOWN = []
"""
MODULES = (
    dynamo.DECODE_MODULE,
    dynamo.PREFILL_MODULE,
    dynamo.INIT_MODULE,
    "dynamo.llm.exceptions",
    "dynamo.common.utils.prometheus",
)
CLOCK = 1.8e9
SURVEY = SimpleNamespace(problems=[], usable=[], findings=[], vouched_for=[])


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    """A Dynamo of that source, known to Kairos."""
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = {}
    for name in MODULES:
        found[name] = ModuleType(name)
        found[name].__file__ = str(path)
        exec(SOURCE, found[name].__dict__)
        monkeypatch.setitem(sys.modules, name, found[name])
    text = dynamo.fingerprint(SOURCE, "native_generate_payload")
    target = f"{dynamo.DECODE_MODULE}:native_generate_payload"
    monkeypatch.setattr(dynamo, "FUNCTIONS", (Callee(target, "", known={"1.6.1": text or ""}),))
    monkeypatch.setattr(dynamo.compat, "finalizes_input_logprobs", lambda: True)
    return found


def worker(table: Any = None) -> dynamo.Worker:
    return dynamo.Worker(table or KairosConfig().slo_table(), lambda: CLOCK)


def engine(infos: list[dict[str, Any]], **named: Any) -> Any:
    told = {"enable_metrics": False, "tokenizer_worker_num": 1, "served_model_name": "m"}
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**told, **named}),
        tokenizer_manager=SimpleNamespace(
            preferred_sampling_params={"custom_params": {"own": 1}}, context_len=100
        ),
        _scheduler_init_result=SimpleNamespace(scheduler_infos=infos),
    )


def test_both_handlers_carry_the_slo_of_a_request(there: dict[str, ModuleType]) -> None:
    dynamo.install(KairosConfig())
    request = {"router": {"ttft_target": 700}, "native": {"sampling_params": {}, "tpot_ms": 30}}
    for name in (dynamo.DECODE_MODULE, dynamo.PREFILL_MODULE):
        made = there[name].apply_thinking_budget(request, {"n": 1}, None, engine=None)
        assert made["n"] == 1 and made["custom_params"]["kairos"]["ttft_ms"] == 700.0
        native = there[name].native_generate_payload(request)
        assert native["sampling_params"]["custom_params"]["kairos"]["tpot_ms"] == 30.0
        assert there[name].native_generate_payload({}) is None


@pytest.mark.parametrize("native", [None, {"sampling_params": {}, "n": "x", "ttft_ms": -1}])
def test_a_mistake_of_the_client_is_dynamos_invalid_argument(
    there: dict[str, ModuleType], native: Mapping[str, Any] | None
) -> None:
    dynamo.install(KairosConfig())
    request = {"router": {"ttft_target": -1}, "native": native}
    decode = there[dynamo.DECODE_MODULE]

    def read() -> None:
        if native is None:
            decode.apply_thinking_budget(request, {}, None)
        decode.native_generate_payload(request)

    with pytest.raises(there["dynamo.llm.exceptions"].InvalidArgument, match="ttft"):
        read()


def test_a_fault_of_ours_costs_the_slo_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = worker(SimpleNamespace())
    for _ in range(3):
        made = broken.sampling_params(
            lambda request, params: params, {"router": {"ttft_target": 700}}, {"n": 1}
        )
        assert made == {"n": 1}
    assert len(caplog.records) == 1


async def test_the_metrics_of_the_schedulers_are_shown_beside_sglangs(
    there: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    here = worker()
    original = there[dynamo.INIT_MODULE].setup_sgl_metrics
    config = SimpleNamespace(
        dynamo_args=SimpleNamespace(namespace="n", component="c", endpoint="e")
    )
    shown = there["dynamo.common.utils.prometheus"].SHOWN
    for on in (False, True):
        model = engine([{"kairos": {}}], enable_metrics=on)
        assert await here.start(original, model, config, "endpoint") == "publisher"
        assert len(shown) == on
    assert shown[0]["metric_prefix_filters"] == ["kairos_"] and shown[0]["endpoint"] == "endpoint"
    # The server's own custom_params are known from now on.
    made = here.sampling_params(lambda request: {}, {"router": {"ttft_target": 700}})
    assert made["custom_params"]["own"] == 1


@pytest.mark.parametrize(
    ("infos", "named", "why"),
    [
        ([{"kairos": {}}, {}], {}, "1 of 2 scheduler processes"),
        ([{"kairos": {}}], {"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
    ],
)
async def test_a_worker_that_would_drop_slos_does_not_serve(
    infos: list[dict[str, Any]], named: dict[str, Any], why: str
) -> None:

    async def never(*_: Any) -> None:
        raise AssertionError("must not be reached")

    with pytest.raises(SystemExit, match=why):
        await worker().start(never, engine(infos, **named), None, None)


def test_an_unknown_dynamo_stops_the_start_or_is_left_alone(
    there: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"{dynamo.DECODE_MODULE}:native_generate_payload"
    gone = f"{dynamo.DECODE_MODULE}:no_such_function"
    functions = [Callee(name, "", known={"1.6.1": "0" * 16}) for name in (target, gone)]
    monkeypatch.setattr(dynamo, "FUNCTIONS", functions)
    before = there[dynamo.DECODE_MODULE].native_generate_payload
    with pytest.raises(SystemExit) as caught:
        dynamo.install(KairosConfig())
    text = str(caught.value)
    assert target in text and f"{gone}: there is no such function" in text
    assert "KAIROS_STRICT=seam" in text
    for config in (KairosConfig(strict="seam"), KairosConfig(dynamo=False)):
        dynamo.install(config)
    assert there[dynamo.DECODE_MODULE].native_generate_payload is before


def test_the_plugin_waits_for_dynamos_worker(
    there: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: dict[str, Any] = {}
    monkeypatch.setattr(plugin, "when_imported", waited.__setitem__)
    monkeypatch.setattr(plugin, "active_config", KairosConfig)
    monkeypatch.setattr(plugin, "survey", lambda: SURVEY)
    plugin.install()
    decode = there[dynamo.DECODE_MODULE]
    before = decode.apply_thinking_budget
    waited[dynamo.INIT_MODULE]()
    assert decode.apply_thinking_budget is not before


def test_every_function_has_a_text_and_says_what_is_taken_for_granted() -> None:
    for function in dynamo.FUNCTIONS:
        assert set(function.fingerprints) == {"1.6.1"} and function.taken
        assert all(len(text) == 16 for text in function.fingerprints.values())
