"""The state of one scheduler process: configuration, predictors, paused prefills, counters."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from sglang_kairos import names
from sglang_kairos.config import KairosConfig
from sglang_kairos.engine import features
from sglang_kairos.engine.installed import INSTALLED, MISSING, VOUCHED_FOR
from sglang_kairos.engine.seams import losses
from sglang_kairos.engine.state.decision_log import DecisionLog
from sglang_kairos.engine.state.graph_sizes import captured_sizes
from sglang_kairos.engine.state.latency_models import Profile
from sglang_kairos.engine.state.metrics import SchedulerMetrics
from sglang_kairos.engine.state.recent_steps import LatestSteps
from sglang_kairos.engine.state.request import RequestState, kv_tokens
from sglang_kairos.engine.state.tp_sync import SharedClock, agreement
from sglang_kairos.engine.state.waiting_table import Roster
from sglang_kairos.policy.prefill_planner import prefill_planner
from sglang_kairos.policy.prefill_step import PrefillPlan
from sglang_kairos.slo.attainment import Attainment, Recent, Silences
from sglang_kairos.slo.targets import WIRE_KEY, RequestSlo, SloError, SloTable

logger = logging.getLogger("sglang_kairos")

Decision = TypeVar("Decision")
LOGGED_ERRORS = 5  # further ones are only counted, so that a broken step does not fill the disk


class KairosState:
    """The state of one scheduler."""

    def __init__(self, scheduler: Any, config: KairosConfig) -> None:
        self.config = config
        self.scheduler = scheduler
        self.table: SloTable = config.slo_table()
        self.profile = Profile(scheduler, config.latency_model)
        self.captured_sizes = captured_sizes(scheduler)
        self.prefill_time, self.step_time = self.profile.start(self.captured_sizes)
        self.steps = LatestSteps()
        self.paused: list[Any] = []
        self.held: list[Any] = []
        self.plan: PrefillPlan | None = None
        self.plan_order: list[Any] = []
        self.planner = prefill_planner(config)
        self.roster = Roster(self.promise)
        self.starving: Any = None
        reasons = [*features.reasons("pause", scheduler), *losses.cannot_pause(MISSING)]
        self.cannot_pause = ", ".join(reasons)
        # A CPU runs the forward inside the launch; a GPU's launch returns at once.
        self.synchronous: bool = scheduler.device == "cpu"
        self.launched: Any = None
        self.prefill_end_s = 0.0
        self.deciding = False
        self.subset: Any = None
        self.last_step: tuple[float, int, float] | None = None
        self.counters: Counter[str] = Counter()
        self.logged: set[str] = set()
        self.last_request: RequestSlo | None = None
        log = config.decision_log
        self._log = DecisionLog(log, scheduler, self.mode) if log else None
        self.attainment = Attainment(self.table.classes)
        self.silences = Silences()
        self.talking: list[Any] = []
        self.prefilled = Recent()
        self.clock = SharedClock(scheduler)
        self.metrics = self.guarded(
            "metrics", lambda: SchedulerMetrics.of(scheduler, self.mode), None
        )
        self._agree: Callable[[Any], Any] = agreement(scheduler, self.counters)

    @property
    def mode(self) -> str:
        """Returns prefill, decode or null (unified serving); SGLang can switch it while idle."""
        return str(self.scheduler.disaggregation_mode.value)

    @property
    def max_paused(self) -> int:
        """Returns how many prefills may be paused at once on this server."""
        return self.config.max_paused if self.config.pause and not self.cannot_pause else 0

    @property
    def logging(self) -> bool:
        """Returns whether `record` writes anything; its arguments may be costly to prepare."""
        return self._log is not None

    def now(self) -> float:
        """Returns seconds on the clock of SGLang's request time stats."""
        return self.clock.now()

    def agree(self, decision: Any) -> Any:
        """Returns rank 0's `decision` on every tensor-parallel rank; clocks differ, decisions must not.

        All ranks must reach it alike, so call it only behind conditions on the queues' contents.
        """
        return self._agree(decision)

    def promise(self, req: Any) -> RequestState:
        """Returns the state of a request; a malformed SLO falls back to the server's default."""
        found: RequestState | None = getattr(req, "_kairos", None)
        if found is None:
            wire = getattr(req.sampling_params, "custom_params", None)
            try:
                asked = self.table.read(wire.get(WIRE_KEY) if isinstance(wire, dict) else None)
            except SloError as error:
                self.log_once(
                    f"slo:{error.field}", f"ignored an SLO that came unvalidated: {error}"
                )
                asked = RequestSlo(self.table.default)
            arrival = req.time_stats.scheduler_recv_time or self.now()
            found = RequestState(asked.slo, arrival - asked.age_ms / 1e3)
            req._kairos = found
            found.counted = req.rid.startswith("HEALTH_CHECK")
            if not found.counted:
                self.counters["requests"] += 1
                self.last_request = asked
        return found

    def log_once(self, key: str, message: str) -> None:
        """Logs a line that matters once, not once a step."""
        if key not in self.logged:
            self.logged.add(key)
            logger.warning("Kairos: %s", message)

    def guarded(self, what: str, decide: Callable[[], Decision], fallback: Decision) -> Decision:
        """Returns `decide()`, or `fallback` (stock behaviour) if it raises: no bug ends a server."""
        try:
            return decide()
        except Exception:
            self.counters[f"{what}_errors"] += 1
            if self.counters[f"{what}_errors"] <= LOGGED_ERRORS:
                logger.exception("Kairos: %s failed, this step runs as stock SGLang's", what)
            return fallback

    def learnt(self) -> None:
        """Updates the metrics and saves the latency models, now and then, after an observed step."""
        self.tell_metrics()
        decode = self.mode == "decode"
        if self.profile.writes:
            self.profile.keep(
                self.now(),
                lambda: None if decode else self.prefill_time.snapshot(),
                lambda: self.step_time.snapshot() if decode else None,
            )

    def tell_metrics(self) -> None:
        """Updates Prometheus now and then, where SGLang exports metrics."""
        if self.metrics is None or not self.metrics.due(self.now()):
            return
        decode = self.mode == "decode"
        error = (self.step_time if decode else self.prefill_time).error
        tell = functools.partial(
            self.metrics.tell,
            error,
            breaker_open=decode and not error.trusted(self.config.max_step_error),
            paused=len(self.paused),
            counters=self.counters,
        )
        self.guarded("metrics", tell, None)  # its files may not be writable

    def record(self, kind: str, **facts: Any) -> None:
        """Appends one decision to this process' decision log, if there is one."""
        if self._log is not None:
            write = functools.partial(self._log.write, kind, self.mode, facts)
            self.guarded("decision_log", write, None)  # a full disk must not end a scheduler

    def report(self) -> dict[str, Any]:
        """Returns plain data for /server_info: predictors, their errors, counters."""
        report: dict[str, Any] = {
            "mode": self.mode,
            "ttft_ms": self.config.ttft_ms,
            "tpot_ms": self.config.tpot_ms,
            "counters": dict(self.counters),
            "last_request": {},
            "seams": dict(INSTALLED),
            "lost": dict(MISSING),
            "vouched_for": list(VOUCHED_FOR),
            "latency_model": self.profile.source,
            "latency_model_key": dataclasses.asdict(self.profile.key),
            "captured_sizes": self.captured_sizes,
            "steps": self.steps.report(),
            "attainment": self.attainment.report(),
        }
        model = getattr(self.scheduler, "model_config", None)
        if model is not None:
            report |= {"vocabulary": model.vocab_size, "context_tokens": model.context_len}
        if (last := self.last_request) is not None:
            report["last_request"] = {**dataclasses.asdict(last.slo), "age_ms": last.age_ms}
        if self.mode == "decode":
            report["decode"] = self.step_time.law.to_json()
            report["decode_error"] = dataclasses.asdict(self.step_time.error)
        else:
            report["prefill"] = self.prefill_time.law.to_json()
            report["prefill_error"] = dataclasses.asdict(self.prefill_time.error)
            report["paused"] = len(self.paused)
            report["paused_tokens"] = sum(map(kv_tokens, self.paused))
            report["cannot_pause"] = self.cannot_pause
        return names.with_old_keys("server_info", report)


CURRENT: KairosState | None = None


def current() -> KairosState | None:
    """Returns this process' state; None before the scheduler runs."""
    return CURRENT


def start(scheduler: Any, config: KairosConfig) -> KairosState:
    """Makes this process' state, which `current` returns from now on."""
    global CURRENT
    CURRENT = KairosState(scheduler, config)
    return CURRENT
