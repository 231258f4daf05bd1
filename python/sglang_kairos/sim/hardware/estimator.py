"""Computes step times with aiconfigurator-core (the extra `tables`).

aiconfigurator-core prices a step operator by operator. Its authors measured the operators' times on
the GPU and stored them per SGLang version. No further model of ours is in between. A model is
compiled with tensor parallelism alone: experts are sharded by TP, not EP, as is SGLang's default.

- Prefill: `run_static_per_op(mode="static_ctx")`. The sum over operators equals
  `predict_prefill_latency`. Operators whose time depends on the prefix are the attention.
- Decode: `predict_decode_latency(batch, context)`, all requests of one length.

`kv_cache` is "fp8" or "bfloat16", for the cache and for attention's arithmetic alike. SGLang's own
default (`--kv-cache-dtype auto`) is bfloat16 for all models here. aiconfigurator-core's is fp8
where the weights are.

How far `tables` is off, over the built-in systems (mean, then worst):

    steps of 2 to 32 equal requests, 8,192 new tokens at most   2 to 4 %, 8 to 12 %; DeepSeek-V3 23
    % single requests (most of it from `tables.monotone`)         1 %, 4 to 10 %
    decode steps                                                0.2 %, 3 %
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from sglang_kairos.sim.hardware.tables import Array, MeasuredSteps

PACKAGE = "aiconfigurator-core"
GPU, BACKEND = "h200_sxm", "sglang"
MEMORY_FRACTION = 0.85

# Knots of the table: four per octave of new tokens, two per octave of prefix and context.
NEW = np.unique(np.rint(2.0 ** np.arange(0, 15.01, 0.25)))
PREFIX = np.concatenate([[0.0], np.rint(2.0 ** np.arange(6, 18.01, 0.5))])
CONTEXT = np.unique(np.rint(2.0 ** np.arange(0, 18.01, 0.5)))


class Estimator:
    """One model on one kind of server. Raises ImportError without aiconfigurator-core."""

    def __init__(self, model: str, tp: int, kv_cache: str, database: str) -> None:
        # The package logs every table that it borrows from a neighbouring backend.
        logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
        from aiconfigurator_core import sdk

        self.package = f"{PACKAGE} {version(PACKAGE)}"
        self._identity = (model, GPU, BACKEND)
        self._options: dict[str, Any] = {
            "backend_version": database,
            "tp_size": tp,
            "moe_tp_size": tp,
            "moe_ep_size": 1,
            "kvcache_quant_mode": kv_cache,
            "fmha_quant_mode": kv_cache,
        }
        self._kv: Callable[..., Mapping[str, Any]] = sdk.estimate_kv_cache
        self._engine: Any = sdk.EngineHandle.compile(*self._identity, **self._options)
        near, far = self._operators(1024, 0), self._operators(1024, 8192)
        self._attention = {name for name, ms in near.items() if ms != far[name]}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Estimator:
        """Returns the estimator that an entry of `data/systems.json` was fitted to."""
        return cls(entry["model"], entry["tp"], entry["kv_cache"], entry["database"])

    def prefill_s(self, new: int, prefix: int, requests: int = 1) -> float:
        """Returns the seconds of a prefill step of this many equal requests."""
        ms = self._engine.predict_prefill_latency(requests, prefix + new, prefix)
        return float(ms) / 1e3

    def decode_s(self, batch: int, context: int) -> float:
        """Returns the seconds of a decode step over `batch` requests of `context` tokens each."""
        return float(self._engine.predict_decode_latency(batch, context)) / 1e3

    def kv_capacity(self, chunk_tokens: int, max_running: int) -> Mapping[str, Any]:
        """Returns `estimate_kv_cache` of one GPU: total_kv_size_tokens, memory_breakdown, …"""
        return self._kv(
            *self._identity,
            max_num_tokens=chunk_tokens,
            max_batch_size=max_running,
            memory_fraction_kind="of_total",
            memory_fraction_value=MEMORY_FRACTION,
            **self._options,
        )

    def table(self, sizes: Sequence[int]) -> MeasuredSteps:
        """Returns all that `TableTimes` needs: about 3,000 calls, 0.2 s."""
        attention, shared = zip(*(self._prefill_row(int(p)) for p in PREFIX), strict=True)
        decode = [[self.decode_s(size, int(each)) for each in CONTEXT] for size in sizes]
        return MeasuredSteps(
            new=NEW,
            prefix=PREFIX,
            shared_s=shared[0],
            attention_s=np.stack(attention),
            sizes=tuple(sizes),
            context=CONTEXT,
            decode_s=np.asarray(decode),
        )

    def _prefill_row(self, prefix: int) -> tuple[Array, Array]:
        attention, shared = np.zeros(len(NEW)), np.zeros(len(NEW))
        for index, new in enumerate(NEW):
            for name, ms in self._operators(int(new), prefix).items():
                row = attention if name in self._attention else shared
                row[index] += ms / 1e3
        return attention, shared

    def _operators(self, new: int, prefix: int) -> dict[str, float]:
        rows, _ = self._engine.run_static_per_op(
            batch_size=1, isl=prefix + new, osl=1, prefix=prefix, mode="static_ctx"
        )
        return {name: float(ms) for name, ms, *_ in rows}
