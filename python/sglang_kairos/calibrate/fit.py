"""Fits the entry of a ``--kairos-latency-model`` file to measured steps. Pure numerics.

Rows are as the models take them. Prefill: (prefix tokens, new tokens, seconds). Decode: (batch, KV
tokens, seconds). The latency models are the predictors' own, fitted by non-negative least squares
of relative errors. What such a model leaves over goes into the predictor's state, which observes
the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_kairos.predict.learnt_file import Key
from sglang_kairos.predict.online_decode import StepTimeModel
from sglang_kairos.predict.online_prefill import PrefillTimeModel
from sglang_kairos.predict.shipped_models import Seed

PrefillRow = tuple[float, float, float]
DecodeRow = tuple[int, float, float]

LEAST_ROWS = 8
HOLD_OUT_EVERY = 4
PASSES = 3


@dataclass(frozen=True)
class Fit:
    """A fitted predictor. `rows`: how many rows it was fitted to.

    `held_out_error`: mean relative error on rows it had not seen; None: too few rows to hold any
    out.
    """

    model: Any
    held_out_error: float | None
    rows: int


def fit_prefill(rows: Sequence[PrefillRow]) -> Fit | None:
    """Returns the fit of prefill rows; None when there are fewer than LEAST_ROWS rows."""

    def build(some: Sequence[PrefillRow]) -> PrefillTimeModel:
        model = PrefillTimeModel.fit(some)
        for _ in range(PASSES):
            for prefix, new, seconds in some:
                model.observe([new], [prefix], seconds)
        return model

    return _fitted(rows, build, lambda model, row: model.step_s([row[1]], [row[0]]))


def fit_decode(rows: Sequence[DecodeRow], captured: Sequence[int] | None = None) -> Fit | None:
    """Returns the fit of decode rows; None when there are fewer than LEAST_ROWS rows.

    `captured`: the server's CUDA graph sizes.
    """

    def build(some: Sequence[DecodeRow]) -> StepTimeModel:
        model = StepTimeModel.fit(some, captured)
        for _ in range(PASSES):
            for batch, tokens, seconds in some:
                model.observe(int(batch), tokens, seconds)
        return model

    return _fitted(rows, build, lambda model, row: model.step_s(int(row[0]), row[1]))


def entry(
    key: Key,
    prefill: Fit | None,
    decode: Fit | None,
    *,
    provenance: str,
    old: Seed | None = None,
) -> Seed:
    """Returns the file's entry. A part that was not measured is taken from the `old` one."""
    laws: dict[str, Any] = {
        "prefill": old and old.prefill,
        "prefill_state": old and old.prefill_state,
        "decode": old and old.decode,
        "decode_state": old and old.decode_state,
    }
    if prefill is not None:
        laws["prefill"] = prefill.model.law
        laws["prefill_state"] = prefill.model.snapshot()
    if decode is not None:
        laws["decode"] = decode.model.law
        laws["decode_state"] = decode.model.snapshot()
    return Seed(key.model, key.gpu, key.tp, backends=key.backends, provenance=provenance, **laws)


def medians(rows: Iterable[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Returns one median row per first value and quarter octave of the second: hiccups drop out."""
    groups: dict[tuple[float, int], list[tuple[float, float, float]]] = {}
    for row in rows:
        groups.setdefault((row[0], round(4 * np.log2(max(row[1], 1.0)))), []).append(row)
    merged = []
    for (first, _), some in sorted(groups.items()):
        _, second, seconds = np.median(np.array(some, float), axis=0)
        merged.append((first, float(second), float(seconds)))
    return merged


def _fitted(
    rows: Sequence[Any], build: Callable[[Any], Any], predict: Callable[[Any, Any], float]
) -> Fit | None:
    usable = [row for row in rows if row[2] > 0]
    if len(usable) < LEAST_ROWS:
        return None
    held = usable[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY]
    known = [row for row in usable if row not in held]
    error = None
    if len(known) >= LEAST_ROWS and held:
        trial = build(known)
        error = float(np.mean([abs(predict(trial, row) / row[2] - 1.0) for row in held]))
    return Fit(build(usable), error, len(usable))
