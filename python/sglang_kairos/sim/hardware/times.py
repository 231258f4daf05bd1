"""Step times and sizes of the servers in the simulated cluster.

`SYSTEMS` are the built-in ones: latency models fitted to step times of aiconfigurator-core and
stored in `data/systems.json`, which `scripts/fit_systems.py` writes. `systems.load_system` can use
the step times themselves instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any, Protocol

from sglang_kairos.predict.latency_model import DecodeLatency, PrefillLatency
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel

# SGLang v0.5.23's captured decode batches (arg_groups/cuda_graph_hook.py) up to 512.
CAPTURED_SIZES = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 513, 16))


class StepTimes(Protocol):
    """How fast a server really is, in seconds."""

    @property
    def captured_sizes(self) -> Sequence[int] | None:
        """Returns the batch sizes that a decode step is padded up to; None: it is not padded."""
        ...

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        """Returns the seconds of a prefill step: per request, new tokens after those already there."""
        ...

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """Returns the seconds of a decode step over `batch` requests with `kv_tokens` of context."""
        ...

    def prefill_model(self) -> PrefillTimeModel:
        """Returns a new predictor, calibrated on this hardware."""
        ...

    def decode_model(self) -> StepTimeModel:
        """Returns a new predictor, calibrated on this hardware."""
        ...


class LawTimes:
    """Step times that follow the predictors' own latency models exactly."""

    def __init__(
        self,
        prefill: PrefillLatency,
        decode: DecodeLatency,
        captured_sizes: Sequence[int] | None = CAPTURED_SIZES,
    ) -> None:
        self.captured_sizes = captured_sizes
        self.prefill_law, self.decode_law = prefill, decode
        most, padded = max(captured_sizes or (1024,)), self.decode_model().padded
        # The model is a straight line in the KV tokens. The rest depends on the batch: a table.
        self._fixed_s: list[float] = [decode.step_s(padded(size), 0.0) for size in range(most + 1)]

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        return self.prefill_law.step_s(new_tokens, prefix_tokens)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        if batch < len(self._fixed_s):
            return self._fixed_s[batch] + self.decode_law.c_s * kv_tokens
        return self.decode_law.step_s(batch, kv_tokens)

    def prefill_model(self) -> PrefillTimeModel:
        return PrefillTimeModel(*self.prefill_law)

    def decode_model(self) -> StepTimeModel:
        return StepTimeModel.of(self.decode_law, self.captured_sizes)


@dataclass(frozen=True)
class System:
    """One kind of server pair: speed and sizes.

    KV sizes are tokens. `reserved_tokens`: what a decode server keeps free per request when it
    reserves for the next (SGLang's --num-reserved-decode-tokens). KV travels over one link per
    prefill server: `kv_bytes` a token at `link_bytes_per_s`, and `link_latency_s` at the end.
    """

    times: StepTimes
    chunk_tokens: int = 8192
    prefill_kv_tokens: int = 1_000_000
    decode_kv_tokens: int = 1_000_000
    max_running: int = 512
    reserved_tokens: int = 512
    kv_bytes: float = 253_952.0
    link_bytes_per_s: float = 100e9
    link_latency_s: float = 5e-3
    notes: tuple[str, ...] = field(default=())


def captured_up_to(largest: int) -> tuple[int, ...]:
    """Returns SGLang's captured decode batches when told to stop at `largest`."""
    return tuple(size for size in CAPTURED_SIZES if size <= largest)


def built_in() -> dict[str, dict[str, Any]]:
    """Returns `data/systems.json`: name -> sizes, latency models, and where each came from."""
    text = files("sglang_kairos.sim.hardware").joinpath("data/systems.json").read_text("utf-8")
    entries: dict[str, dict[str, Any]] = json.loads(text)
    return entries


def system_of(entry: Mapping[str, Any], times: StepTimes, about_times: str) -> System:
    """Returns a System of an entry's sizes with these step times; its notes name the sources."""
    system = System(
        times,
        chunk_tokens=entry["chunk_tokens"],
        prefill_kv_tokens=entry["kv_tokens"],
        decode_kv_tokens=entry["kv_tokens"],
        max_running=entry["largest_captured"],
        kv_bytes=float(entry["kv_bytes"]),
    )
    notes = [
        f"step times: {about_times}",
        f"{entry['kv_tokens']:,} KV tokens a server: {entry['kv_tokens_from']}",
        f"{entry['kv_bytes']:,} bytes of KV a token: {entry['kv_bytes_from']}",
        f"assumed: {system.link_bytes_per_s / 1e9:g} GB/s and {system.link_latency_s * 1e3:g} ms "
        f"for the KV transfer, chunks of {system.chunk_tokens} tokens",
    ]
    return replace(system, notes=(*notes, *entry["remarks"]))


def law_of(entry: Mapping[str, Any]) -> LawTimes:
    """Returns the latency models stored with an entry."""
    prefill, decode = entry["prefill"]["coefficients"], entry["decode"]["coefficients"]
    return LawTimes(
        PrefillLatency(*prefill),
        DecodeLatency.of(decode),
        captured_up_to(entry["largest_captured"]),
    )


def origin(entry: Mapping[str, Any]) -> str:
    """Returns where an entry's step times come from, in words."""
    return (
        f"{entry['package']}, H200 SXM, SGLang {entry['database']} operator database, "
        f"{entry['model']} TP{entry['tp']}, KV cache in {entry['kv_cache']}"
    )


def law_note(entry: Mapping[str, Any]) -> str:
    """Returns how well an entry's latency models fit, in words."""
    parts = [
        f"{phase} {law['points']} points, mean error {law['mean_error']:.1%}, "
        f"largest {law['max_error']:.1%}"
        for phase, law in (("prefill", entry["prefill"]), ("decode", entry["decode"]))
    ]
    return "; ".join(parts)


SYSTEMS: dict[str, System] = {
    name: system_of(entry, law_of(entry), f"laws fitted to {origin(entry)} ({law_note(entry)})")
    for name, entry in built_in().items()
}
MINIMAX_M25_H200_TP4 = SYSTEMS["minimax-m2.5-h200-tp4"]
