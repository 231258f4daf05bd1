"""What one scheduler process knows: configuration, predictors, paused prefills, counters."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from sglang_kairos.config import KairosConfig
from sglang_kairos.engine.chaos import Chaos
from sglang_kairos.engine.plugin import INSTALLED, active_config
from sglang_kairos.policy.urgency import LateShare, PrefillPlan
from sglang_kairos.predict.prefill_time import PrefillTimeModel
from sglang_kairos.predict.step_time import StepTimeModel
from sglang_kairos.slo import WIRE_KEY, Slo, SloError, SloTable, from_wire

logger = logging.getLogger("sglang_kairos")

Decision = TypeVar("Decision")
LOGGED_ERRORS = 5  # the rest is only counted, or a broken step would fill the disk


@dataclass(slots=True)
class Promise:
    """What Kairos keeps for one request. Times are `time.perf_counter` seconds of this process."""

    slo: Slo
    arrival_s: float
    matched_at_plan: int = -1_000_000
    first_token_s: float | None = None
    starving: bool = False

    @property
    def ttft_due_s(self) -> float:
        return self.arrival_s + self.slo.ttft_ms / 1e3


@dataclass(slots=True)
class Paused:
    """A half-done chunked prefill that sits out; its KV stays where it is."""

    req: Any
    since_s: float
    aborted: bool = False


class KairosState:
    """The state of one scheduler. `mode` is prefill, decode or null (unified serving)."""

    def __init__(self, scheduler: Any, config: KairosConfig) -> None:
        self.config = config
        self.table: SloTable = config.slo_table()
        self.mode: str = scheduler.disaggregation_mode.value
        self.prefill_time = PrefillTimeModel.generic()
        self.step_time = StepTimeModel.generic(_captured_sizes(scheduler))
        self.late_share = LateShare(config.late_share)
        self.paused: list[Paused] = []
        self.plan: PrefillPlan | None = None
        self.plan_rank: dict[Any, int] = {}
        self.plans = 0
        # A CPU runs the forward inside the launch; a GPU's launch returns at once.
        self.synchronous: bool = scheduler.device == "cpu"
        self.launched: Any = None
        self.deciding = False
        self.subset: Any = None
        self.scheduler = scheduler
        self.last_step: tuple[float, int, float] | None = None
        self.counters: Counter[str] = Counter()
        self.logged: set[str] = set()
        self.last_request: dict[str, Any] = {}
        self.chaos = Chaos(config.chaos_seed) if config.chaos_seed >= 0 else None
        self._log: TextIO | None = open(config.decision_log, "a") if config.decision_log else None  # noqa: SIM115
        self._agree: Callable[[Any], Any] = _agreement(scheduler)

    def now(self) -> float:
        """The clock of SGLang's request time stats, seconds."""
        return time.perf_counter()

    def agree(self, decision: Any) -> Any:
        """Rank 0's `decision` on every tensor-parallel rank; clocks differ, decisions must not.

        Must be reached by all ranks alike: call it only behind conditions on the queues' contents.
        """
        return self._agree(decision)

    def promise(self, req: Any) -> Promise:
        """The SLO and arrival of a request; a malformed SLO falls back to the server's default."""
        found: Promise | None = getattr(req, "_kairos", None)
        if found is None:
            wire = getattr(req.sampling_params, "custom_params", None)
            try:
                asked = from_wire(
                    wire.get(WIRE_KEY) if isinstance(wire, dict) else None, self.table
                )
            except SloError as error:
                self.log_once(
                    f"slo:{error.field}", f"ignored an SLO that came unvalidated: {error}"
                )
                asked = from_wire(None, self.table)
            arrival = req.time_stats.scheduler_recv_time or self.now()
            found = Promise(asked.slo, arrival - asked.age_ms / 1e3)
            req._kairos = found
            if not req.rid.startswith("HEALTH_CHECK"):
                self.counters["requests"] += 1
                self.last_request = {**dataclasses.asdict(asked.slo), "age_ms": asked.age_ms}
        return found

    def log_once(self, key: str, message: str) -> None:
        """A line that matters once, not once a step."""
        if key not in self.logged:
            self.logged.add(key)
            logger.warning("Kairos: %s", message)

    def guarded(self, what: str, decide: Callable[[], Decision], fallback: Decision) -> Decision:
        """`decide()`, or `fallback` (stock behaviour) when it raises: a server outlives our bugs."""
        try:
            return decide()
        except Exception:
            self.counters[f"{what}_errors"] += 1
            if self.counters[f"{what}_errors"] <= LOGGED_ERRORS:
                logger.exception("Kairos: %s failed, this step runs as stock SGLang's", what)
            return fallback

    def record(self, kind: str, **facts: Any) -> None:
        """Append one decision to the decision log, if there is one."""
        if self._log is not None:
            self._log.write(json.dumps({"kind": kind, **facts}) + "\n")
            self._log.flush()

    def report(self) -> dict[str, Any]:
        """Plain data for /server_info: predictors, their errors, counters."""
        report: dict[str, Any] = {
            "mode": self.mode,
            "ttft_ms": self.config.ttft_ms,
            "tpot_ms": self.config.tpot_ms,
            "counters": dict(self.counters),
            "last_request": self.last_request,
            "seams": dict(INSTALLED),
        }
        if self.mode == "decode":
            report["decode"] = self.step_time.coefficients
            report["decode_error"] = _error(self.step_time.error)
        else:
            report["prefill"] = self.prefill_time.coefficients
            report["prefill_error"] = _error(self.prefill_time.error)
            report["paused"] = len(self.paused)
        return report


CURRENT: KairosState | None = None


def current() -> KairosState | None:
    """This process' state; None before the scheduler runs."""
    return CURRENT


def run_event_loop(original: Callable[..., Any], scheduler: Any) -> Any:
    """Seam of Scheduler.run_event_loop: set Kairos up, then serve."""
    global CURRENT
    config = active_config()
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().pp_size > 1:
        raise RuntimeError(
            "Kairos does not support pipeline parallelism (--pp-size > 1); start with --kairos off"
        )
    CURRENT = KairosState(scheduler, config)
    logger.info(
        "Kairos is on: mode=%s, default SLO ttft=%g ms tpot=%g ms, order=%s pause=%s park=%s%s",
        CURRENT.mode,
        config.ttft_ms,
        config.tpot_ms,
        config.order,
        config.pause,
        config.park,
        "" if config.chaos_seed < 0 else f", CHAOS seed {config.chaos_seed}",
    )
    if CURRENT.mode == "null":
        logger.info(
            "Kairos: unified serving: the urgency order applies, pausing and decode packing are off "
            "(they need --disaggregation-mode prefill|decode)"
        )
    return original(scheduler)


def get_init_info(original: Callable[..., Any], scheduler: Any) -> Any:
    """Seam of Scheduler.get_init_info: tell the launcher that this scheduler has Kairos."""
    return {**original(scheduler), "kairos": dict(INSTALLED)}


def get_internal_state(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """Seam of the /server_info readback: add Kairos' own entry."""
    output = original(controller, recv_req)
    if CURRENT is not None:
        output.internal_state["kairos"] = CURRENT.report()
    return output


def _error(error: Any) -> dict[str, float]:
    return {"mape": float(error.mape), "p90": float(error.p90), "samples": int(error.samples)}


def _captured_sizes(scheduler: Any) -> list[int] | None:
    """Batch sizes of the decode CUDA graphs, or None where none were captured."""
    sizes = scheduler.tp_worker.get_decode_cuda_graph_bs()
    return [int(size) for size in sizes] if sizes else None


def _agreement(scheduler: Any) -> Callable[[Any], Any]:
    if scheduler.tp_size == 1:
        return lambda decision: decision
    import torch.distributed as dist

    group = scheduler.attn_tp_cpu_group
    leader = dist.get_global_rank(group, 0)
    if dist.get_world_size(group) == 1:
        return lambda decision: decision

    def broadcast(decision: Any) -> Any:
        box = [decision]
        dist.broadcast_object_list(box, src=leader, group=group)
        return box[0]

    return broadcast
