"""As much of SGLang's prefill scheduler as the glue looks at."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.hooks import prefill
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.predict.prefill_latency import PrefillTimeModel


class Req:
    """A request; `done` tokens of `length` are computed. `age_ms`: how long ago it came."""

    def __init__(
        self,
        rid: str,
        length: int,
        ttft_ms: float,
        done: int = 0,
        age_ms: float = 0,
        weight: float = 1.0,
    ) -> None:
        self.rid = rid
        self.origin_input_ids = [0] * length
        self.output_ids: list[int] = []
        self.extend_end = done or None
        self.prefix_len = done
        self.num_matched_prefix_tokens = 0
        self.pending_bootstrap = False
        self.seqlen = length
        self.finished_reason: Any = None
        self.kv = SimpleNamespace(req_pool_idx=0)
        wire = {"kairos": {"ttft_ms": ttft_ms, "tpot_ms": 50.0, "age_ms": age_ms, "weight": weight}}
        self.sampling_params = SimpleNamespace(custom_params=wire)
        self.time_stats = SimpleNamespace(scheduler_recv_time=time.perf_counter())

    def finished(self) -> bool:
        return self.finished_reason is not None

    def __repr__(self) -> str:
        return self.rid


def make_scheduler(waiting: list[Req], chunked: Req | None, mode: str = "prefill") -> Any:
    """A scheduler with 512-token chunks and plenty of memory."""
    return SimpleNamespace(
        waiting_queue=list(waiting),
        chunked_req=chunked,
        _pending_chunked_abort_req=None,
        chunked_prefill_size=512,
        max_prefill_tokens=16384,
        page_size=1,
        tp_size=1,
        device="cpu",
        tree_cache=SimpleNamespace(disable=True, evictable_size=lambda: 0),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 100_000),
        disaggregation_mode=SimpleNamespace(value=mode),
        tp_worker=SimpleNamespace(get_decode_cuda_graph_bs=list),
    )


def make_state(config: KairosConfig | None = None) -> scheduler_state.KairosState:
    """A prefill state whose predictor knows 100 us a token."""
    made = scheduler_state.KairosState(make_scheduler([], None), config or KairosConfig())
    made.prefill_time = PrefillTimeModel(1e-3, 1e-4, 0.0)
    return made


def pause(made: scheduler_state.KairosState, *reqs: Any, since_s: float | None = None) -> None:
    """These half-done prefills sit out, since now if not said otherwise."""
    for req in reqs:
        made.promise(req).pause(made.now() if since_s is None else since_s)
        made.paused.append(req)


def built(extend: list[int], prefix: list[int] | None = None, reqs: list[Req] | None = None) -> Any:
    """A launched batch."""
    return SimpleNamespace(
        reqs=reqs or [],
        extend_lens=extend,
        prefix_lens=prefix or [0] * len(extend),
        launch_ts=time.monotonic(),
    )


def build(result: Any = SimpleNamespace(extend_lens=None)) -> Any:  # noqa: B008
    """An upstream get_new_batch_prefill that notes what it was given."""

    def original(scheduler: Any, running_batch: Any) -> Any:
        prefill.calc_priority(lambda *a: None, None, scheduler.waiting_queue)
        original.calls.append((scheduler.chunked_req, list(scheduler.waiting_queue)))
        return SimpleNamespace(batch_to_run=result, running_batch=running_batch)

    original.calls = []
    return original
