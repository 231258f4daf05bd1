"""Decides what a prefill server does next. SGLang's scheduler and the simulator both host it.

A host describes the moment in columns (`PrefillView`), carries the plan out, and reports what ran.
Rules that need more than one moment live here:
- which request starves, and whether the late share pays for it;
- which request was paused for too long;
- which prompts to look up in the prefix cache;
- the margin on predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from sglang_kairos.config import KairosConfig
from sglang_kairos.policy.prefill_step import PrefillPlan, PrefillQueue, plan_prefill
from sglang_kairos.policy.urgency import LateShare, urgency_order
from sglang_kairos.predict.prefill_latency import PrefillTimeModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Looking a prompt up in the radix cache walks it: not every request at every step.
LOOK_UP_EVERY_PLANS = 16
LOOK_UPS_PER_PLAN = 32
NEVER = -(1 << 40)


@dataclass(frozen=True, slots=True)
class PrefillView:
    """A prefill server at a scheduling point: columns of shape (n,), tokens, seconds of any clock.

    Columns list the waiting requests first, then the begun ones: the one in the chunk slot, then
    the paused. `tokens`: prompt tokens left to compute. `prefix`: tokens before those, computed or
    expected in the prefix cache. `paused_s`: one entry per begun request, how long it was paused in
    all. `in_slot`: whether the first begun request is in the chunk slot; `pinned`: whether it must
    stay there. `free_tokens`: KV tokens, of which `evictable_tokens` belong to cached prefixes.
    `work_factor` (n,): factor on predicted work, for simulations of wrong predictions.
    """

    now_s: float
    arrival_s: Floats
    ttft_s: Floats
    tokens: Ints
    prefix: Ints
    chunk_tokens: int
    paused_s: Sequence[float] = ()
    in_slot: bool = False
    pinned: bool = False
    free_tokens: int = 0
    evictable_tokens: int = 0
    max_paused: int = 0
    weight: Floats | None = None
    page_size: int = 1
    work_factor: Floats | None = None

    @property
    def waiting(self) -> int:
        """The number of waiting requests; the others have begun."""
        return len(self.tokens) - len(self.paused_s)

    @property
    def slot(self) -> int:
        """Index of the request in the chunk slot, -1 for none."""
        return self.waiting if self.in_slot else -1


class PrefillPlanner:
    """The rules of one prefill server; see the module's docstring."""

    def __init__(self, config: KairosConfig) -> None:
        self.config = config
        self.late_share = LateShare(config.late_share)
        self.plans = 0

    def to_look_up(self, looked_up_at: Ints) -> list[int]:
        """Begins a plan and returns the waiting requests to look up in the prefix cache, by index.

        `looked_up_at` (n,): the value of `plans` at the last look-up, NEVER at first. A short queue
        is looked up whole. Of a long one, those whose look-up is LOOK_UP_EVERY_PLANS old, the
        stalest first. Plans are counted instead of time, so that all ranks of a server look up the
        same ones.
        """
        self.plans += 1
        short = len(looked_up_at) <= LOOK_UPS_PER_PLAN
        age = self.plans - looked_up_at
        stale = np.flatnonzero(age >= (1 if short else LOOK_UP_EVERY_PLANS))
        if stale.size > LOOK_UPS_PER_PLAN:
            stale = stale[np.argsort(-age[stale], kind="stable")[:LOOK_UPS_PER_PLAN]]
        return stale.tolist()

    def plan(self, view: PrefillView, times: PrefillTimeModel) -> PrefillPlan:
        """Returns the next step. Raises ValueError if the plan would lose a waiting request."""
        fixed_s = times.law.a_s * (1 + self.config.margin)
        least_tokens = 0
        if view.paused_s:
            # A small share of a chunk rereads the whole prefix of the begun one: that sets its price.
            reread = float(view.prefix[view.waiting :].max())
            least_tokens = times.worthwhile_tokens(reread, view.chunk_tokens)
        starving = self._starving(view)
        plan = plan_prefill(
            PrefillQueue(
                work_s=self._work_s(view, times),
                deadline_s=_due_s(view) - self.config.handoff_ms / 1e3,
                tokens=view.tokens,
                partial=np.arange(len(view.tokens)) >= view.waiting,
                weight=view.weight,
                starving=None if starving < 0 else np.arange(len(view.tokens)) == starving,
                fixed_s=fixed_s,
                cached=view.prefix,
            ),
            chunk_tokens=view.chunk_tokens,
            current=view.slot,
            free_tokens=view.free_tokens,
            evictable_tokens=view.evictable_tokens,
            max_paused=view.max_paused,
            page_size=view.page_size,
            forced=view.slot if view.pinned else self._overdue(view),
            least_tokens=least_tokens,
        )
        if not names_all(plan, view.waiting):
            raise ValueError(f"a plan over {view.waiting} waiting requests loses some")
        return replace(plan, starving=starving)

    def order(self, view: PrefillView, times: PrefillTimeModel) -> list[int]:
        """Returns all waiting requests, the most urgent first, for hosts that fill the steps.

        This is for a server that does both prefill and decode: nobody is paused, and no hand-off
        follows.
        """
        return urgency_order(self._work_s(view, times), _due_s(view), view.weight).order

    def ran(self, tokens: int, of_starving: int) -> None:
        """Records a step of `tokens`, `of_starving` of them for the request that starved."""
        self.late_share.ran(tokens, of_starving)

    def settings(self) -> dict[str, float]:
        """Returns what a plan depends on besides view and times: equal settings plan the same."""
        config = self.config
        return {
            "margin": config.margin,
            "handoff_ms": config.handoff_ms,
            "max_wait": config.max_wait,
            "late_share": config.late_share if self.late_share.may_spend() else 0.0,
            "max_pause_ms": config.max_pause_ms,
        }

    def _work_s(self, view: PrefillView, times: PrefillTimeModel) -> Floats:
        work = times.remaining_s(view.tokens, view.prefix, view.chunk_tokens)
        work *= 1 + self.config.margin
        return work if view.work_factor is None else work * view.work_factor

    def _starving(self, view: PrefillView) -> int:
        """Index of the oldest request past the starvation bound if the late share allows; or -1."""
        past = np.flatnonzero(view.arrival_s + self.config.max_wait * view.ttft_s < view.now_s)
        if past.size == 0 or not self.late_share.may_spend():
            return -1
        return int(past[np.argmin(view.arrival_s[past])])

    def _overdue(self, view: PrefillView) -> int:
        """Index of the first begun request paused for more than `max_pause_ms` in all; else -1."""
        limit_s = self.config.max_pause_ms / 1e3
        begun = enumerate(view.paused_s, start=view.waiting)
        return next((index for index, paused_s in begun if paused_s > limit_s), -1)


class ChaosPrefillPlanner(PrefillPlanner):
    """Random but legal plans from a seed, to prove that no plan can change a token.

    Only ``--kairos-chaos-seed`` switches it on.
    """

    def __init__(self, config: KairosConfig) -> None:
        super().__init__(config)
        self._random = Random(config.chaos_seed)

    def plan(self, view: PrefillView, times: PrefillTimeModel) -> PrefillPlan:
        """Returns any order, slot and chunk share within all limits of `plan_prefill` but one.

        A request that fits the step is offered whatever KV it takes. The seam of `add_one_req`
        alone must keep the KV that begun prefills need.
        """
        if view.pinned:
            return super().plan(view, times)
        tokens: list[int] = view.tokens.tolist()
        waiting = list(range(view.waiting))
        begun = list(range(view.waiting, len(tokens)))
        draw = self._random
        draw.shuffle(waiting)
        slot = draw.choice([*begun, -1]) if begun else -1
        if len(begun) - (slot >= 0) > view.max_paused:
            slot = view.slot if view.in_slot else begun[0]
        hold: set[int] = set()
        if begun and slot < 0:  # who begins beside them must find a place and KV for all
            full = view.max_paused < len(begun)
            room = view.free_tokens - sum(tokens[index] for index in begun)
            long = [index for index in waiting if tokens[index] > view.chunk_tokens // 4]
            hold.update(index for index in long if full or tokens[index] > room)
        if waiting and draw.random() < 0.1:
            hold.add(draw.choice(waiting))
        order = [index for index in waiting if index not in hold]
        limit = draw.choice([None, max(1, view.chunk_tokens // 2)]) if slot >= 0 else None
        return PrefillPlan(order, slot, limit, 0, sorted(hold))


def prefill_planner(config: KairosConfig) -> PrefillPlanner:
    """Returns the planner that these settings ask for."""
    return ChaosPrefillPlanner(config) if config.chaos_seed >= 0 else PrefillPlanner(config)


def names_all(plan: PrefillPlan, waiting: int) -> bool:
    """Returns whether every waiting index is either ordered or held back, exactly once."""
    named = [*plan.order, *plan.hold]
    # So many different ones below `waiting` add up to this only if none is negative.
    whole = len(named) == len(set(named)) == waiting
    return whole and (
        not waiting or (max(named) < waiting and 2 * sum(named) == waiting * (waiting - 1))
    )


def _due_s(view: PrefillView) -> Floats:
    """Seconds left until each first token is due, (n,)."""
    return view.arrival_s + view.ttft_s - view.now_s
