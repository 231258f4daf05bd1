"""A scheduler's life: its hand-shake with the launcher, its start, its report on /server_info."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_kairos.engine import features
from sglang_kairos.engine.installed import INSTALLED, MISSING, active_config
from sglang_kairos.engine.seams import losses
from sglang_kairos.engine.state.scheduler_state import current, start

logger = logging.getLogger("sglang_kairos")


def get_init_info(original: Callable[..., Any], scheduler: Any) -> Any:
    """Seam of Scheduler.get_init_info: tell the launcher that this scheduler has Kairos."""
    # Before the hand-shake: the server must not come up and die then.
    features.refuse_unsupported(scheduler)
    return {**original(scheduler), "kairos": dict(INSTALLED)}


def run_event_loop(original: Callable[..., Any], scheduler: Any) -> Any:
    """Seam of Scheduler.run_event_loop: set Kairos up, then serve."""
    config = losses.without(active_config(), MISSING)
    features.refuse_unsupported(scheduler)
    state = start(scheduler, config)
    logger.info(
        "Kairos is on: mode=%s, default SLO ttft=%g ms tpot=%g ms, order=%s pause=%s park=%s%s",
        state.mode,
        config.ttft_ms,
        config.tpot_ms,
        config.order,
        config.pause,
        config.park,
        "" if config.chaos_seed < 0 else f", CHAOS seed {config.chaos_seed}",
    )
    wanted: list[features.Action] = ["pause"] if config.pause else []
    wanted += ["park", "reserve"] if config.park else []
    for line in features.lost(state.mode, scheduler, wanted):
        logger.warning("Kairos: %s", line)
    if config.order and getattr(scheduler, "enable_priority_scheduling", False):
        logger.warning(
            "Kairos: urgency comes before SGLang's request priorities; use weights of SLO classes"
        )
    if state.mode == "null":
        logger.info(
            "Kairos: unified serving: the urgency order applies, pausing and decode packing are off "
            "(they need --disaggregation-mode prefill|decode)"
        )
    return original(scheduler)


def get_internal_state(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """Seam of the /server_info readback: add Kairos' own entry."""
    output = original(controller, recv_req)
    state = current()
    if state is not None:
        output.internal_state["kairos"] = state.report()
    return output
