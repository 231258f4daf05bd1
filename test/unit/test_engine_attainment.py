"""How SGLang's requests reach the server's attainment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import Req, make_scheduler, make_state
from sglang_kairos.engine.hooks import attainment, pausing
from sglang_kairos.engine.hooks import decode as engine_decode
from sglang_kairos.engine.state import scheduler_state
from sglang_kairos.slo.attainment import Attainment
from sglang_kairos.slo.targets import Slo, SloTable

TABLE = SloTable(Slo(1000.0, 50.0), {"chat": Slo(1000.0, 50.0, "chat")})


class Ended:
    """A finish reason. `status` None with `kind` abort: somebody left."""

    def __init__(self, kind: str, status: int | None = None) -> None:
        self._json = {"type": kind, "status_code": status} if kind == "abort" else {"type": kind}

    def to_json(self) -> dict[str, Any]:
        return self._json


class Server:
    """A scheduler whose clock stands at `now_s` until told otherwise."""

    def __init__(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = make_state()
        self.state.scheduler.disaggregation_mode.value = mode
        self.state.table, self.now_s = TABLE, 50.0
        self.state.attainment = Attainment(TABLE.classes)
        monkeypatch.setattr(self.state, "now", lambda: self.now_s)
        monkeypatch.setattr(scheduler_state, "CURRENT", self.state)
        self.streamed: list[list[Any]] = []

    def req(self, rid: str = "r", name: str = "chat", age_ms: float = 0.0, **facts: Any) -> Any:
        made = Req(rid, 10, 1000.0)
        made.sampling_params.custom_params = {"kairos": {"class": name, "age_ms": age_ms}}
        made.time_stats.scheduler_recv_time = self.now_s
        made.time_stats.prefill_finished_time = 0.0
        made.retraction_count, made.bootstrap_room = 0, 7  # type: ignore[attr-defined]
        for fact, value in facts.items():
            setattr(made, fact, value)
        return made

    def step(self, *reqs: Any, after_s: float = 0.04, ends: Any = (), skip: Any = None) -> None:
        """Each gets a token but `skip`; `ends` are done with it."""
        self.now_s += after_s
        for req in reqs:
            if req is not skip:
                req.output_ids.append(1)
        for req in ends:
            req.finished_reason = Ended("length")
        attainment.stream_output(self._original, None, list(reqs), False, skip)

    def shows(self, *reqs: Any, after_s: float) -> None:
        """Upstream shows these although they have no new token."""
        self.now_s += after_s
        attainment.stream_output(self._original, None, list(reqs), False)

    def end(self, req: Any, reason: Ended) -> None:
        req.finished_reason = reason
        attainment.stream_output(self._original, None, [req], False)

    def _original(self, streamer: Any, reqs: list[Any], logprob: bool, skip: Any = None) -> None:
        self.streamed.append(reqs)

    @property
    def report(self) -> dict[str, Any]:
        assert not self.state.counters["attainment_errors"]
        found: dict[str, Any] = self.state.report()["attainment"]
        return found

    def met(self, name: str = "chat") -> dict[str, bool]:
        """By target, whether the only request so far met it."""
        tally = self.report["classes"][name]
        assert sum(tally["met"].values()) + sum(tally["missed"].values()) == len(
            {*tally["met"], *tally["missed"]}
        )
        return {**dict.fromkeys(tally["met"], True), **dict.fromkeys(tally["missed"], False)}


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server("decode", monkeypatch)


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server("prefill", monkeypatch)


@pytest.mark.parametrize(
    ("waits_s", "age_ms", "gap_s", "met"),
    [
        (0.9, 0.0, 0.04, {"ttft": True, "tpot": True, "both": True}),
        (0.9, 200.0, 0.04, {"ttft": False, "tpot": True, "both": False}),
        (1.1, 0.0, 0.04, {"ttft": False, "tpot": True, "both": False}),
        (0.9, 0.0, 0.06, {"ttft": True, "tpot": False, "both": False}),
    ],
)
def test_a_decode_server_judges_the_whole_request(
    decode: Server, waits_s: float, age_ms: float, gap_s: float, met: dict[str, bool]
) -> None:
    req = decode.req(age_ms=age_ms)
    decode.step(req, after_s=waits_s)
    for _ in range(9):
        decode.step(req, after_s=gap_s)
    decode.step(req, after_s=gap_s, ends=[req])
    assert decode.met() == met
    tally = decode.report["classes"]["chat"]
    assert tally["ttft"]["sum_s"] == pytest.approx(waits_s + age_ms / 1e3)
    assert tally["tpot"]["sum_s"] == pytest.approx(gap_s)
    assert decode.report["longest_silence_s"] == pytest.approx(gap_s)
    assert decode.report["requests"] == {"served": 1}


def test_a_single_token_meets_its_tpot(decode: Server) -> None:
    req = decode.req(name="made-up")
    decode.step(req, after_s=0.5, ends=[req])
    assert decode.met("other") == {"ttft": True, "tpot": True, "both": True}


def test_each_counts_once_though_overlapped_steps_show_it_again(decode: Server) -> None:
    first, second = decode.req("a"), decode.req("b")
    decode.step(first, second)
    decode.step(first, second, ends=[first])
    for _ in range(3):
        decode.step(first, second)
    decode.step(first, second, ends=[second])
    decode.step(first, second)
    assert decode.report["requests"] == {"served": 2}
    assert decode.state.counters["requests"] == 2
    assert len(decode.streamed) == 7, "upstream streams whatever is counted"


def test_who_sits_steps_out_is_silent_meanwhile(decode: Server) -> None:
    runs, parked = decode.req("runs"), decode.req("parked")
    decode.step(runs, parked)
    for _ in range(4):
        decode.step(runs, after_s=0.05)
    newcomer = decode.req("new")
    decode.step(newcomer, after_s=0.01)
    decode.step(runs, parked, newcomer, after_s=0.05, ends=[runs, parked, newcomer])
    assert decode.report["longest_silence_s"] == pytest.approx(0.26)
    assert decode.state.promise(runs).silent_s == pytest.approx(0.06)
    assert decode.state.promise(newcomer).silent_s == pytest.approx(0.05)


def test_one_that_lost_its_kv_is_told_apart_and_keeps_its_first_token(decode: Server) -> None:
    req = decode.req()
    decode.step(req, after_s=0.5)
    decode.step(req)
    req.retraction_count = 1
    decode.step(decode.req("other"), after_s=2.0)
    decode.shows(req, after_s=0.3)  # it runs again, and has no new token yet
    decode.step(req, after_s=1.0)
    decode.step(req, ends=[req])
    assert decode.report["requests"] == {"served_after_retraction": 1}
    assert decode.met() == {"ttft": True, "tpot": False, "both": False}
    assert decode.report["longest_silence_s"] == pytest.approx(3.3)


@pytest.mark.parametrize("done_s", [0.9, 1.1])
def test_a_prefill_server_judges_the_prefill_alone(prefill: Server, done_s: float) -> None:
    req = prefill.req()
    req.time_stats.prefill_finished_time = prefill.now_s + done_s
    prefill.step(req, after_s=5.0, ends=[req])  # the transfer takes as long as it takes
    assert prefill.met() == {"ttft": done_s < 1.0}
    assert prefill.report["classes"]["chat"]["tpot"]["count"] == 0
    again = prefill.req()
    prefill.step(again, ends=[again])
    other = prefill.req(bootstrap_room=8)
    prefill.step(other, ends=[other])
    assert prefill.report["requests"] == {"served": 2, "prefilled_again": 1}
    assert prefill.report["classes"]["chat"]["ttft"]["count"] == 2


def test_unified_serving_counts_and_a_chunk_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("null", monkeypatch)
    runs, chunked = server.req("runs"), server.req("chunked")
    server.step(runs, chunked, skip=chunked)
    assert server.state.promise(chunked).first_token_s is None
    chunked.output_ids = [1]  # retracted before, and computed again in chunks
    server.step(runs, chunked, skip=chunked)
    assert server.state.promise(chunked).first_token_s is None
    server.step(runs, chunked, ends=[runs, chunked])
    assert server.report["requests"] == {"served": 2}


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (Ended("abort"), "aborted"),
        (Ended("abort", 400), "refused"),
        (Ended("abort", 500), "failed"),
        (Ended("abort", 503), "failed"),
    ],
)
@pytest.mark.parametrize("mode", ["prefill", "decode", "null"])
def test_what_was_not_served_is_told_apart_and_judged_by_nobody(
    monkeypatch: pytest.MonkeyPatch, mode: str, reason: Ended, outcome: str
) -> None:
    server = Server(mode, monkeypatch)
    waits, talks = server.req("waits"), server.req("talks")
    if mode != "prefill":
        server.step(talks)
    for req in (waits, talks):
        server.end(req, reason)
        server.end(req, reason)
    assert server.report["requests"] == {outcome: 2}
    assert server.report["classes"] == {}


def test_health_checks_are_nobodys_requests(decode: Server) -> None:
    check = decode.req("HEALTH_CHECK_1")
    decode.step(check, ends=[check])
    assert decode.report["requests"] == {} == decode.report["classes"]


@pytest.mark.parametrize("everybody", [False, True])
def test_an_abort_counts_whom_it_names_once_wherever_they_are(
    prefill: Server, everybody: bool
) -> None:
    waiting, slot, paused = (prefill.req(rid) for rid in ("job", "job_1", "paused"))
    scheduler: Any = make_scheduler([waiting], slot)
    scheduler.running_batch = SimpleNamespace(reqs=[])
    prefill.state.promise(paused).pause(0.0)
    prefill.state.paused.append(paused)

    def upstream(scheduler: Any, asked: Any) -> None:
        scheduler.waiting_queue.remove(waiting)  # and never shows it again

    asked = SimpleNamespace(rid="job", abort_all=everybody)
    pausing.abort_request(upstream, scheduler, asked)
    named = [waiting, slot, paused] if everybody else [waiting]
    assert prefill.report["requests"] == {"aborted": len(named)}
    assert prefill.state.promise(paused).aborted is everybody
    for req in named:
        prefill.end(req, Ended("abort", 500))  # of one whose sender was told, say
    assert prefill.report["requests"] == {"aborted": len(named)}


def test_an_error_in_counting_ends_no_stream(decode: Server) -> None:
    odd = decode.req()
    odd.finished_reason, odd.output_ids = SimpleNamespace(), [1]
    attainment.stream_output(decode._original, None, [odd], False)
    assert decode.streamed == [[odd]]
    assert decode.state.counters["attainment_errors"] == 1


def test_nobody_who_has_left_is_kept(decode: Server) -> None:
    req = decode.req()
    decode.step(req)
    decode.step(req, ends=[req])
    assert decode.state.talking == []


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [(None, "aborted"), ({"type": "abort", "status_code": 503}, "failed"), ({}, "aborted")],
)
def test_an_abort_counts_as_what_it_says_it_is(decode: Server, reason: Any, outcome: str) -> None:
    decode.step(req := decode.req())
    image_on_its_way = SimpleNamespace(rid="not a request yet")
    attainment.count_ended(decode.state, [image_on_its_way, req], reason)
    assert decode.report["requests"] == {outcome: 1}
    assert not decode.state.counters["attainment_errors"]


def test_whom_memory_runs_out_for_is_counted_where_upstream_ends_it(
    decode: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode.step(req := decode.req())
    monkeypatch.setattr(scheduler_state, "CURRENT", decode.state)
    batch = SimpleNamespace(reqs=[req])
    assert engine_decode.retract_decode(lambda batch: ([], 0.5, [req]), batch)[2] == [req]
    assert engine_decode.retract_decode(lambda batch: ([req], 0.5), batch) == ([req], 0.5)
    assert decode.report["requests"] == {"failed": 1}


def test_nobody_who_has_left_is_kept_alive(decode: Server) -> None:
    decode.step(req := decode.req())
    attainment.count_ended(decode.state, [req])
    decode.end(req, Ended("abort"))
    assert decode.state.talking == []
