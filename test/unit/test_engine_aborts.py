"""An abort ends what it names: SGLang's own abort_request runs inside, on its own queues."""

from __future__ import annotations

import logging
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import Req, Scheduler, make_state, pause
from helpers.trees import TESTED_VERSIONS
from helpers.upstream import upstream_function
from sglang_kairos.engine.hooks import pausing
from sglang_kairos.engine.hooks.aborts import ids_named
from sglang_kairos.engine.state import scheduler_state

PLACES = {
    "prefill": ("slot", "waiting", "grammar", "bootstrap", "inflight", "paused", "running", "last"),
    "decode": ("waiting", "grammar", "prealloc", "transfer", "retracted", "running", "last"),
}


class Aborted(Req):
    """A request in one of the scheduler's places; `ended` is what upstream told of its end."""

    def __init__(self, rid: str, ended: set[str]) -> None:
        super().__init__(rid, pending=True)
        self._ended = ended
        self.disagg_kv_sender = self.kv_receiver = SimpleNamespace(
            abort=self.abort, kv_mgr=SimpleNamespace(enable_deferred_decode_kv_release=False)
        )
        self.req, self.host_staged = self, False
        self.mamba_pool_idx = self.kv_cache_cpu = None
        self.kv = SimpleNamespace(req_pool_idx=0, holds_kv=False, holds_mamba=False)

    def abort(self) -> None:
        self._ended.add(self.rid)

    def set_finish_with_abort(self, message: str) -> None:
        self.abort()

    def finished(self) -> bool:
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "to_finish":
            self.abort()


def upstream(version: str, name: str, file: str = "managers/scheduler.py") -> Any:
    modes = SimpleNamespace(PREFILL="prefill", DECODE="decode")
    nothing = lambda *args, **kwargs: None  # noqa: E731
    policy = SimpleNamespace(
        disaggregation_decode_host_receive_threshold=1, disaggregation_decode_retraction_backup=""
    )
    names = {
        "DisaggregationMode": modes,
        "HTTPStatus": HTTPStatus,
        "AbortReq": SimpleNamespace,
        "FINISH_ABORT": lambda *args: "aborted",
        "_make_abort_req": lambda req, **more: SimpleNamespace(rid=req.rid),
        "get_disagg": lambda: policy,
        "get_parallel": lambda: SimpleNamespace(pp_size=1),
        "logger": logging.getLogger("test"),
        "futures": SimpleNamespace(Future=SimpleNamespace),
    }
    for helper in (
        "release_kv_cache",
        "prepare_abort",
        "discard_kv_cache_backup",
        "retraction_discard",
        "maybe_release_metadata_buffer",
    ):
        names[helper] = nothing
    return upstream_function(version, file, name, names)


class Aborting(Scheduler):
    """What abort_request touches beside that, with one request per id in every place."""

    def __init__(self, version: str, mode: str, ids: list[str], workers: int | None) -> None:
        self.ended: set[str] = set()
        made = {
            place: [Aborted(f"{rid}", self.ended) for rid in ids]
            for place in (*PLACES["prefill"], *PLACES["decode"])
        }
        told = lambda output, req=None: self.ended.add(req.rid)  # noqa: E731
        grammar = SimpleNamespace(grammar_queue=made["grammar"])
        aborts = upstream(
            version, "GrammarManager.abort_requests", "constrained/grammar_manager.py"
        )
        grammar.abort_requests = lambda recv_req: aborts(grammar, recv_req)
        nothing = lambda *args, **kwargs: None  # noqa: E731
        super().__init__(
            mode,
            made=made,
            mm_receiver=None,
            dllm_config=None,
            enable_hicache_storage=False,
            enable_hisparse=False,
            disaggregation_mode=mode,
            server_args=None if workers is None else SimpleNamespace(tokenizer_worker_num=workers),
            ps=SimpleNamespace(pp_size=1),
            tree_cache=None,
            req_to_metadata_buffer_idx_allocator=None,
            beam_coordinator=SimpleNamespace(retire_group=nothing),
            send_abort_output=told,
            ipc_channels=SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=told)),
            _release_aborted_request=nothing,
            release_aborted_prefill_waiting_req=nothing,
            _pending_chunked_abort_req=None,
            grammar_manager=grammar,
            waiting_queue=made["waiting"],
            running_batch=SimpleNamespace(reqs=made["running"]),
            last_batch=SimpleNamespace(reqs=made["last"]),
            disagg_prefill_bootstrap_queue=SimpleNamespace(queue=made["bootstrap"]),
            disagg_prefill_inflight_queue=made["inflight"],
            disagg_decode_prealloc_queue=SimpleNamespace(
                queue=made["prealloc"], retracted_queue=made["retracted"]
            ),
            disagg_decode_transfer_queue=SimpleNamespace(queue=made["transfer"]),
        )

    def collect_inflight_reqs(self) -> set[Any]:
        batches = [self.running_batch, self.last_batch]
        return {req for batch in batches for req in batch.reqs}


def aborted(
    version: str,
    mode: str,
    asked: str,
    ids: list[str],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    workers: int | None = 1,
    abort_all: bool = False,
) -> set[str]:
    """The ids of those in `place` that end when `asked` is aborted; nobody else is anywhere."""
    kairos = make_state()
    monkeypatch.setattr(scheduler_state, "CURRENT", kairos)
    scheduler = Aborting(version, mode, ids, workers)
    reqs = scheduler.made[place]
    for name, others in scheduler.made.items():
        if name != place:
            others.clear()
    if place == "paused":
        pause(kairos, *reqs)
    request = SimpleNamespace(
        rid=asked, abort_all=abort_all, abort_message=None, finished_reason=None
    )
    stock = upstream(version, "Scheduler.abort_request")
    if place == "slot":  # there is one: each id has its turn
        for req in reqs:
            scheduler.chunked_req = req
            pausing.abort_request(stock, scheduler, request)
            if scheduler._pending_chunked_abort_req is req:
                scheduler.ended.add(req.rid)
    else:
        pausing.abort_request(stock, scheduler, request)
    assert [req.rid for req in reqs if req.rid.startswith("\0")] == [], "left with another id"
    return scheduler.ended | {req.rid for req in kairos.paused if kairos.promise(req).aborted}


CASES = [
    (version, mode, place)
    for version in TESTED_VERSIONS
    for mode, places in PLACES.items()
    for place in places
]
every_place = pytest.mark.parametrize(("version", "mode", "place"), CASES)


@every_place
def test_an_abort_of_job_1_leaves_job_10_alone(
    version: str, mode: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["job-1", "job-10", "job-1-2", "job-1_0", "job", "other"]
    for workers in (1, 2):
        got = aborted(version, mode, "job-1", ids, place, monkeypatch, workers=workers)
        # In the slot each is alone: of two tokenizers' ids job-1_0 is then a part of the batch job-1.
        alone = place == "slot" and workers == 2
        assert got == ({"job-1", "job-1_0"} if alone else {"job-1"})


@every_place
def test_an_abort_of_all_ends_all(
    version: str, mode: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["job-1", "job-10", "other"]
    assert aborted(version, mode, "", ids, place, monkeypatch, abort_all=True) == set(ids)


@every_place
def test_an_abort_of_a_batch_by_its_own_id_ends_all_its_parts(
    version: str, mode: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ["job_0", "job_1", "job_10", "job_x", "job_01", "jobs", "job_"]
    got = aborted(version, mode, "job", ids, place, monkeypatch, workers=2)
    assert got == {"job_0", "job_1", "job_10"}


@every_place
def test_an_abort_without_a_name_ends_nobody(
    version: str, mode: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert aborted(version, mode, "", ["a", "b"], place, monkeypatch) == set()


def test_of_one_tokenizer_an_id_that_has_left_is_no_batch() -> None:
    assert ids_named("job", ["job_0", "job_1"], batches=False) == set()


def test_upstreams_own_comparison_would_have_ended_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in TESTED_VERSIONS:
        scheduler = Aborting(version, "prefill", ["job-1", "job-10"], 1)
        request = SimpleNamespace(
            rid="job-1", abort_all=False, abort_message=None, finished_reason=None
        )
        upstream(version, "Scheduler.abort_request")(scheduler, request)
        assert scheduler.ended == {"job-1", "job-10"}
