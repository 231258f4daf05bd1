"""Plans the next action of a prefill server. SGLang's scheduler and the simulator call the same code.

The caller (*host*) describes the moment in columns (`PrefillView`), carries the plan out, and
reports what ran. Which requests a step computes is in `policy.prefill_step`, their order in
`policy.urgency`.

Rules that need more than one moment live here:
    starvation   A request older than ``--kairos-max-wait`` TTFT targets goes first, within the
    token
                 budget of ``--kairos-late-share``.
    pauses       A prefill that was paused for ``--kairos-max-pause-ms`` in all runs to its end.
    look-ups     Which prompts to look up in the prefix cache for this plan.
    margin       Predicted work is multiplied by 1 + ``--kairos-margin``.
    hand-off     Deadlines are earlier by ``--kairos-handoff-ms``, for what follows prefill.
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
from sglang_kairos.predict.online_prefill import PrefillTimeModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A look-up walks the radix cache, so not every request is looked up at every step.
LOOK_UP_EVERY_PLANS = 16
LOOK_UPS_PER_PLAN = 32
NEVER = -(1 << 40)


@dataclass(frozen=True, slots=True)
class PrefillView:
    """A prefill server at a scheduling point. Times are seconds of any one clock, lengths are tokens.

    Columns have shape (n,): first the waiting requests, then the begun ones, and of these the one
    in the chunk slot first, then the paused.
    `tokens`: prompt tokens left to compute. `prefix`: tokens before them, computed or expected in
    the prefix cache. `paused_s`, one per begun request: how long it has sat out in all.
    `in_slot`: the first begun request is in the chunk slot. `pinned`: it must stay there.
    `free_tokens`: KV, of which `evictable_tokens` belong to cached prefixes.
    `max_paused`: most prefills that may sit paused. `weight`: of the SLO class; None: all are
    equal. `work_factor` (n,): factors on predicted work, by which a simulation makes predictions
    wrong.
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
        """Returns the number of waiting requests; the others have begun."""
        return len(self.tokens) - len(self.paused_s)

    @property
    def slot(self) -> int:
        """Returns the index of the request in the chunk slot; -1: nobody."""
        return self.waiting if self.in_slot else -1


class PrefillPlanner:
    """The rules of one prefill server; the module's text lists them."""

    def __init__(self, config: KairosConfig) -> None:
        self.config = config
        self.late_share = LateShare(config.late_share)
        self.plans = 0

    def to_look_up(self, looked_up_at: Ints) -> list[int]:
        """Begins a plan, and returns the waiting indices to look up in the prefix cache for it.

        `looked_up_at` (n,): the value of `plans` at each request's last look-up, NEVER at first. A
        short queue is looked up whole. Of a long one, look-ups that are LOOK_UP_EVERY_PLANS old are
        renewed, the stalest first. Plans are counted, not time, so that all ranks of a server look
        up the same requests.
        """
        self.plans += 1
        short = len(looked_up_at) <= LOOK_UPS_PER_PLAN
        age = self.plans - looked_up_at
        stale = np.flatnonzero(age >= (1 if short else LOOK_UP_EVERY_PLANS))
        if stale.size > LOOK_UPS_PER_PLAN:
            stale = stale[np.argsort(-age[stale], kind="stable")[:LOOK_UPS_PER_PLAN]]
        return stale.tolist()

    def plan(self, view: PrefillView, times: PrefillTimeModel) -> PrefillPlan:
        """Returns the plan of the next step. Raises ValueError if it would lose a waiting request."""
        fixed_s = times.law.a_s * (1 + self.config.margin)
        least_tokens = 0
        if view.paused_s:
            # A small chunk has to reread the prefix of its request, which sets its least size.
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
        """Returns all waiting indices, the most urgent first, for a host that fills the step itself.

        There prefill and decode are one server: nobody is paused, and no hand-off comes between.
        """
        return urgency_order(self._work_s(view, times), _due_s(view), view.weight).order

    def ran(self, tokens: int, of_starving: int) -> None:
        """Notes a launched step of `tokens`, `of_starving` of them for a request the plan called so."""
        self.late_share.ran(tokens, of_starving)

    def settings(self) -> dict[str, float]:
        """Returns what a plan depends on beside view and times; the same settings plan the same."""
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
        """Returns the oldest request past the starvation bound; -1: none, or the late share is spent."""
        past = np.flatnonzero(view.arrival_s + self.config.max_wait * view.ttft_s < view.now_s)
        if past.size == 0 or not self.late_share.may_spend():
            return -1
        return int(past[np.argmin(view.arrival_s[past])])

    def _overdue(self, view: PrefillView) -> int:
        """Returns the first begun request that was paused for `max_pause_ms` in all; -1: none."""
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
        """Returns any order, slot and chunk share within the limits that `plan_prefill` keeps.

        One limit is left out: requests that fit a step are offered whatever KV they take. The seam
        of `add_one_req` must be enough to keep the KV that begun prefills need.
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
        if begun and slot < 0:  # one that begins beside them must find a place and KV for all
            full = view.max_paused < len(begun)
            headroom = view.free_tokens - sum(tokens[index] for index in begun)
            long = [index for index in waiting if tokens[index] > view.chunk_tokens // 4]
            hold.update(index for index in long if full or tokens[index] > headroom)
        if waiting and draw.random() < 0.1:
            hold.add(draw.choice(waiting))
        order = [index for index in waiting if index not in hold]
        limit = draw.choice([None, max(1, view.chunk_tokens // 2)]) if slot >= 0 else None
        return PrefillPlan(order, slot, limit, 0, sorted(hold))


def prefill_planner(config: KairosConfig) -> PrefillPlanner:
    """Returns the planner that these settings ask for."""
    return ChaosPrefillPlanner(config) if config.chaos_seed >= 0 else PrefillPlanner(config)


def names_all(plan: PrefillPlan, waiting: int) -> bool:
    """Returns whether every waiting index is either ordered or held back, once."""
    named = [*plan.order, *plan.hold]
    # `waiting` different indices below `waiting` have this sum only if none is negative.
    whole = len(named) == len(set(named)) == waiting
    return whole and (
        not waiting or (max(named) < waiting and 2 * sum(named) == waiting * (waiting - 1))
    )


def _due_s(view: PrefillView) -> Floats:
    """Returns the time left until each first token is due, in seconds, (n,)."""
    return view.arrival_s + view.ttft_s - view.now_s
