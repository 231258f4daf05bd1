"""How long steps really take in the simulated cluster, and how big its servers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sglang_kairos.predict.prefill_time import PrefillTimeModel
from sglang_kairos.predict.step_time import StepTimeModel

# SGLang v0.5.23's captured decode batches (arg_groups/cuda_graph_hook.py) up to 512.
CAPTURED_SIZES = (1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 513, 16))


class StepTimes(Protocol):
    """The truth about a server's speed, in seconds."""

    @property
    def captured_sizes(self) -> Sequence[int] | None:
        """Batch sizes that a decode step is padded up to; None: it is not."""
        ...

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        """A prefill step: per request, new tokens after those already there."""
        ...

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        """A decode step over `batch` requests with `kv_tokens` of context in all."""
        ...

    def prefill_model(self) -> PrefillTimeModel:
        """A new predictor, calibrated on this hardware."""
        ...

    def decode_model(self) -> StepTimeModel:
        """A new predictor, calibrated on this hardware."""
        ...


class LawTimes:
    """Step times that follow the predictors' own laws exactly.

    `prefill`: a, b, c, d of `predict.prefill_time`. `decode`: a, b, the knees' d_j and c of
    `predict.step_time`.
    """

    def __init__(
        self,
        prefill: tuple[float, float, float, float],
        decode: tuple[float, float, float, float, float],
        captured_sizes: Sequence[int] | None = CAPTURED_SIZES,
    ) -> None:
        self.captured_sizes = captured_sizes
        self._coefficients = prefill, decode
        self._prefill, law = self.prefill_model(), self.decode_model()
        most = max(captured_sizes or (1024,))
        # The law is a straight line in the KV tokens: what it adds to is looked up.
        self._decode, self._fixed_s = law, [law.step_s(size, 0.0) for size in range(most + 1)]
        self._kv_token_s = decode[-1]

    def prefill_s(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        return self._prefill.step_s(new_tokens, prefix_tokens)

    def decode_s(self, batch: int, kv_tokens: int) -> float:
        if batch < len(self._fixed_s):
            return self._fixed_s[batch] + self._kv_token_s * kv_tokens
        return float(self._decode.step_s(batch, kv_tokens))

    def prefill_model(self) -> PrefillTimeModel:
        return PrefillTimeModel(*self._coefficients[0])

    def decode_model(self) -> StepTimeModel:
        a, b, near, far, c = self._coefficients[1]
        return StepTimeModel(a, b, c, self.captured_sizes, (near, far))


@dataclass(frozen=True)
class System:
    """One kind of server pair: speed and sizes.

    KV sizes in tokens; `reserved_tokens` is what a decode server keeps free per request when it
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


# MiniMax-M2.5, TP4 on H200 SXM, SGLang. The laws are `predict.*.fit` of step times computed with
# aiconfigurator-core 0.12.0 (SGLang 0.5.14 operator database): 81 prefill points (prefix up to
# 131,072, 64 to 16,384 new tokens), mean error 2.3 %; 180 decode points (batch 1 to 512, context
# 256 to 131,072 each), mean error 1.8 %, largest 6.6 %.
MINIMAX_M25_H200_TP4 = System(
    LawTimes(
        (1.9055697686809907e-2, 1.405754143434806e-5, 5.675340609602099e-10, 0.0),
        (
            4.487385074560402e-3,
            1.932787008939443e-5,
            3.623066603439634e-4,
            1.511747182655648e-4,
            1.2688752266510454e-8,
        ),
    ),
    notes=(
        "step times: laws fitted to aiconfigurator-core 0.12.0, H200 SXM, SGLang 0.5.14, TP4",
        "assumed: 1,000,000 KV tokens a server, 253,952 bytes a token (62 layers x 2 x 8 heads x "
        "128 in bf16), 100 GB/s and 5 ms for the KV transfer",
    ),
)

SYSTEMS = {"minimax-m2.5-h200-tp4": MINIMAX_M25_H200_TP4}
