"""What a prefill step is taken to last, in each SGLang, by the seam that the table has for it.

On a CPU a step is timed otherwise (`learn_from_synchronous_step`), so no real pair here shows it: the
counters run as SGLang's own function counts them, on a clock of the test's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fake_scheduler import built, make_state
from helpers.trees import TESTED_VERSIONS
from helpers.upstream import upstream_function
from sglang_kairos.engine.hooks import step_timing
from sglang_kairos.engine.seams.table import SEAMS
from sglang_kairos.engine.state import scheduler_state

FILE, COUNTERS = "managers/scheduler.py", "Scheduler._record_step_counters"

# Launches and ends, in seconds. The second overlaps the first, the fourth comes after a gap.
STEPS = [(10.0, 10.4), (10.1, 10.9), (10.5, 11.1), (20.0, 20.25)]
LAST = [0.4, 0.5, 0.2, 0.25]  # from the end of the one before, if that was later than the launch


class Steps:
    """A scheduler's life as far as its steps are timed."""

    def __init__(self, version: str, clock: Any) -> None:
        self.scheduler = SimpleNamespace(
            total_prefill_busy_us=0,
            total_prefill_uncached_tokens=0,
            _prev_step=None,
            _prev_prefill_end_ts=None,
            _prev_decode_launch_ts=None,
            _pause_intervals=[],
            _pause_started_at=None,
        )
        self._clock = clock
        self._version = version
        self.wrapped = {seam.qualname for seam in SEAMS if version in seam.fingerprints}

    def _batch(self, launched_s: float, number: int, gap: bool) -> Any:
        mode = SimpleNamespace(
            is_extend_without_speculative=lambda: True, is_split_prefill=lambda: False
        )
        batch = built([512], [0])
        batch.forward_mode, batch.reqs = mode, [object()]
        batch.launch_ts, batch.forward_iter, batch.after_idle_gap = launched_s, number, gap
        batch.extend_num_tokens = 512
        return batch

    def _count(self, *args: Any) -> None:
        """SGLang's own counters."""
        names = {
            "time": self._clock,
            "is_health_check_generate_req": lambda req: False,
            "STEP_MAX_US": 2_000_000,
        }
        upstream_function(self._version, FILE, COUNTERS, names)(*args)

    def run(self) -> None:
        for number, (launched_s, ended_s) in enumerate(STEPS):
            batch, result = self._batch(launched_s, number, number == 3), SimpleNamespace()
            self._clock.now = launched_s
            if "Scheduler.run_batch" in self.wrapped:
                step_timing.run_batch(lambda *a, result=result: result, self.scheduler, batch)
            self._clock.now = ended_s
            if COUNTERS in self.wrapped:
                step_timing.record_step_counters(self._count, self.scheduler, batch, result)
            if "Scheduler.process_batch_result" in self.wrapped:
                step_timing.process_batch_result(lambda *a: None, self.scheduler, batch, result)


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a server that is no CPU learns of its steps, in seconds."""
    made = make_state()
    made.synchronous = False
    monkeypatch.setattr(scheduler_state, "CURRENT", made)
    seconds: list[float] = []
    monkeypatch.setattr(made.prefill_time, "observe", lambda new, old, s: seconds.append(s))
    return seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that stands where the test puts it, for SGLang's function and for ours."""
    made = SimpleNamespace(now=0.0)
    made.monotonic = lambda: made.now
    monkeypatch.setattr(step_timing, "time", made)
    return made


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_a_step_lasts_from_its_launch_or_the_end_of_the_one_before(
    version: str, clock: Any, learnt: list[float]
) -> None:
    Steps(version, clock).run()
    assert learnt == pytest.approx(LAST, abs=1e-5)


@pytest.mark.parametrize("version", [v for v in TESTED_VERSIONS if "0.5.17" <= v <= "0.5.20"])
def test_the_counters_of_the_versions_between_would_teach_something_else(
    version: str, clock: Any, learnt: list[float]
) -> None:
    life = Steps(version, clock)
    life.wrapped = {COUNTERS}
    life.run()
    assert learnt != pytest.approx(LAST, abs=1e-5)
