"""Fakes as much of SGLang's scheduler as the engine uses: a request, a batch, a scheduler, a state.

Layouts are those of the newest SGLang; `old_layout` makes a request of v0.5.16's shape.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.hooks import decode, prefill
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.predict.online_prefill import PrefillTimeModel

# What a batch keeps for each of its requests: tensors that are rebound, never changed in place.
LENGTHS = ("seq_lens", "orig_seq_lens", "seq_lens_cpu")


class Req:
    """A request that came `age_ms` ago; `done` tokens of its prompt of `length` are computed.

    `output_ids`: the tokens that it has so far. `pending`: decode has not reserved KV for it yet.
    """

    def __init__(
        self,
        rid: str,
        length: int = 10,
        ttft_ms: float = 1000.0,
        done: int = 0,
        age_ms: float = 0,
        weight: float = 1.0,
        *,
        tpot_ms: float = 50.0,
        output_ids: Sequence[int] = (),
        pending: bool = False,
    ) -> None:
        self.rid = rid
        self.origin_input_ids = [0] * length
        self.output_ids = list(output_ids)
        self.extend_end = done or None
        self.prefix_len = done
        self.num_matched_prefix_tokens = 0
        self.pending_bootstrap = pending
        self.seqlen = length
        self.beam_group = self.grammar = None
        self.finished_reason: Any = None
        self.kv = SimpleNamespace(req_pool_idx=0)
        wire = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "age_ms": age_ms, "weight": weight}
        self.sampling_params = SimpleNamespace(custom_params={"kairos": wire})
        now = time.perf_counter()
        self.time_stats = SimpleNamespace(
            scheduler_recv_time=now, decode_prebuilt_finish_time=now, last_decode_finish_time=now
        )
        self.disagg_kv_sender = SimpleNamespace(poll=lambda: None)

    def finished(self) -> bool:
        return self.finished_reason is not None

    def __repr__(self) -> str:
        return self.rid


def decoding(rid: str, tpot_ms: float, prompt: int = 10, ttft_ms: float = 1000.0) -> Req:
    """A request that decodes: it has two tokens."""
    return Req(rid, prompt, ttft_ms, tpot_ms=tpot_ms, output_ids=(1, 2))


def old_layout(req: Any) -> Any:
    """The same request with the attributes that it had in v0.5.16."""
    end = req.__dict__.pop("extend_end")
    req.prefix_indices = [0] * req.__dict__.pop("prefix_len")
    req.extend_range = None if end is None else SimpleNamespace(end=end)
    req.__dict__.pop("beam_group", None)
    return req


class Batch:
    """A running batch, with ScheduleBatch's way of rebinding its tensors."""

    def __init__(self, reqs: list[Req]) -> None:
        import torch

        count = len(reqs)
        self.reqs = reqs
        self.seq_lens = torch.arange(10, 10 + count)
        self.orig_seq_lens = torch.arange(10, 10 + count)
        self.seq_lens_cpu: Any = torch.arange(10, 10 + count)
        self.seq_lens_sum: int | None = 0
        self.out_cache_loc: Any = "old"
        self.input_ids: Any = "stale"
        self.forward_mode = "prebuilt"
        self.hisparse_coordinator: Any = None
        self.spec_algorithm = SimpleNamespace(is_none=lambda: True)
        self.model_config = SimpleNamespace(is_encoder_decoder=False)
        self.sampling_info = SimpleNamespace(
            penalizer_orchestrator=SimpleNamespace(is_required=False)
        )

    def filter_batch(self, keep_indices: list[int]) -> None:
        self.reqs = [self.reqs[i] for i in keep_indices]
        for name in LENGTHS:
            setattr(self, name, getattr(self, name)[keep_indices])


def upstream_prepare(batch: Batch) -> None:
    """SGLang's prepare_for_decode: one more token for everybody in the batch."""
    batch.forward_mode = "decode"
    for name in LENGTHS:
        lengths = getattr(batch, name)
        setattr(batch, name, None if lengths is None else lengths + 1)
    batch.out_cache_loc = f"new for {len(batch.reqs)}"


def decode_step(made: scheduler_state.KairosState, batch: Batch) -> Any:
    """One decision as the decode loop makes it; returns the batch to run."""

    def upstream(scheduler: Any, running_batch: Any) -> Any:
        decode.prepare_for_decode(upstream_prepare, running_batch)
        return SimpleNamespace(batch_to_run=running_batch, running_batch=running_batch)

    plan = decode.get_next_decode_batch(upstream, made.scheduler, batch)
    assert plan.running_batch is batch
    return plan.batch_to_run


class Scheduler(SimpleNamespace):
    """The queues and settings of a scheduler; `returned` is whom upstream has requeued."""

    def __init__(self, mode: str, **more: Any) -> None:
        facts = {
            "disaggregation_mode": SimpleNamespace(value=mode),
            "device": "cpu",
            "tp_size": 1,
            "tp_worker": SimpleNamespace(get_decode_cuda_graph_bs=list),
            "waiting_queue": [],
            "chunked_req": None,
            "last_batch": None,
            "req_to_token_pool": SimpleNamespace(),
            "returned": [],
        }
        super().__init__(**(facts | more))

    def has_bootstrapped_waiting_req(self) -> bool:
        return any(not req.pending_bootstrap for req in self.waiting_queue)

    def optimistic_release_and_requeue(self, req: Req) -> None:
        self.returned.append(req)


def make_scheduler(waiting: list[Req], chunked: Req | None, mode: str = "prefill") -> Scheduler:
    """A prefill scheduler with 512-token chunks and plenty of memory."""
    return Scheduler(
        mode,
        waiting_queue=list(waiting),
        chunked_req=chunked,
        _pending_chunked_abort_req=None,
        chunked_prefill_size=512,
        max_prefill_tokens=16384,
        page_size=1,
        tree_cache=SimpleNamespace(disable=True, evictable_size=lambda: 0),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 100_000),
        disagg_prefill_inflight_queue=[],
        disagg_prefill_bootstrap_queue=SimpleNamespace(queue=[]),
        req_to_metadata_buffer_idx_allocator=SimpleNamespace(available_size=lambda: 4),
        server_args=SimpleNamespace(disaggregation_decode_allocation_policy="early"),
    )


def make_decode_scheduler() -> Scheduler:
    """A decode scheduler with the overlap schedule on, and nothing in flight."""
    return Scheduler(
        "decode",
        enable_overlap=True,
        result_queue=[],
        require_mlp_sync=False,
        server_args=SimpleNamespace(retraction_policy="length"),
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
    """A launched batch of prefills."""
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
