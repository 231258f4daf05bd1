"""One server each: what it owes or holds, how fast it is, whether it is there.

All on one event loop; times are seconds of the router's clock (`router.clock`).
Only `fleet.reservation` writes the books: `enqueue` and `dequeue`, `admit` and `release`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from sglang_kairos.policy.backlog import EMPTY, Backlog
from sglang_kairos.policy.placement import UNTOLD_DECODE, DecodeState, PrefillState
from sglang_kairos.predict.latency_model import GENERIC_PREFILL, PrefillLatency
from sglang_kairos.router.cancellation import Cancellation
from sglang_kairos.router.clock import SYSTEM_CLOCK
from sglang_kairos.router.fleet.estimators import Pace, SpeedEstimate
from sglang_kairos.router.fleet.health import Health
from sglang_kairos.router.fleet.prefix_index import BLOCK_TOKENS, MOST_BLOCKS, Blocks, PrefixIndex
from sglang_kairos.router.fleet.server_info import (
    ENOUGH_SAMPLES,
    Load,
    decode_law,
    kairos_reports,
    misplaced,
    number,
    prefill_law,
    request_limits,
    roles,
    settled,
)
from sglang_kairos.router.health_rules import HealthRules
from sglang_kairos.slo.limits import NO_LIMITS, RequestLimits

DEFAULT_BOOTSTRAP_PORT = 8998
DEFAULT_CHUNK_TOKENS = 8192
# A load report older than this says nothing about now.
FRESH_S = 5.0
# A plan is made anew when the server has fallen this far behind it.
_LAG_S = 0.05


@dataclass(slots=True)
class QueuedPrompt:
    """A prompt that a prefill server has to prefill. `tokens`: those not in its cache.

    `work_s`: as predicted when it was sent, `pace` times what the server's own model said.
    """

    tokens: float
    deadline_s: float
    work_s: float
    sent_s: float
    weight: float = 1.0
    pace: float = 1.0


class Server:
    """One SGLang server, as far as both roles have it in common."""

    role: ClassVar[str] = ""

    def __init__(
        self,
        url: str,
        rules: HealthRules | None = None,
        now_s: Callable[[], float] = SYSTEM_CLOCK.now_s,
    ) -> None:
        self.url = url
        self._now_s = now_s
        self.health = Health(rules or HealthRules())
        self.kairos = False
        self.draining = False
        # Whether streams of the OpenAI endpoints end with their usage unasked; None: not known.
        self.usage_by_default: bool | None = None
        # Whether a probe has ever been answered: until then nothing is known, its role included.
        self.looked_at = False
        # What it says of itself, and when; None before it has said anything.
        self.info: Mapping[str, Any] | None = None
        self.info_at_s = float("-inf")
        # Why it gets no requests although it is there; why the router cannot look at it.
        self.misplaced: str | None = None
        self.denied: str | None = None
        # How to interrupt each request that waits for this server.
        self.attempts: set[Cancellation] = set()
        self.limits: RequestLimits = NO_LIMITS
        self._load: Load | None = None
        self._load_at_s = float("-inf")

    @property
    def up(self) -> bool:
        """Whether it gets new requests if there is a choice."""
        takes = self.health.takes_requests(self._now_s())
        return takes and not self.draining and not self.misplaced

    @property
    def standing(self) -> str:
        """draining, misplaced, or as its health says."""
        if self.draining:
            return "draining"
        return "misplaced" if self.misplaced else self.health.state(self._now_s())

    @property
    def problem(self) -> str | None:
        """What somebody should mend, in words."""
        return self.misplaced or self.denied

    @property
    def there(self) -> bool:
        """Whether it answers probes and is not being removed."""
        return not self.draining and not self.misplaced and not self.health.gone

    def cut(self, cause: Exception) -> None:
        """It is gone: whoever waits for it need not wait any longer."""
        for cancellation in list(self.attempts):
            cancellation.interrupt(cause)
        self.forget()

    def forget(self) -> None:
        """What was known of its contents holds no more."""
        self._load = None

    def learn(self, info: Mapping[str, Any]) -> None:
        """Take what /server_info tells; anything missing or odd is ignored."""
        self.kairos = any(True for _ in kairos_reports(info))
        self.limits = request_limits(info)
        self.usage_by_default = bool(info.get("stream_response_default_include_usage"))
        self.info, self.info_at_s = info, self._now_s()
        self.misplaced = misplaced(self.role, roles(info))

    def learn_load(self, load: Load | None, now_s: float) -> None:
        """Take what /v1/loads told at `now_s`; None: nothing."""
        self._load, self._load_at_s = load, now_s

    def _fresh_load(self, now_s: float) -> Load | None:
        return self._load if now_s - self._load_at_s <= FRESH_S else None

    def describe(self) -> dict[str, Any]:
        """For the router's own /server_info and the admin calls."""
        return {
            "url": self.url,
            "role": self.role,
            "up": self.up,
            "state": self.standing,
            "problem": self.problem,
            "kairos": self.kairos,
            "in_flight": len(self.attempts),
        }


class PrefillServer(Server):
    """`bootstrap_port` None means: as the server reports it."""

    role = "prefill"

    def __init__(
        self,
        url: str,
        bootstrap_port: int | None,
        rules: HealthRules | None = None,
        now_s: Callable[[], float] = SYSTEM_CLOCK.now_s,
    ) -> None:
        super().__init__(url, rules, now_s)
        self.host = urlsplit(url).hostname or ""
        self.prefix = PrefixIndex()
        self._given_port = bootstrap_port
        self._reported_port = DEFAULT_BOOTSTRAP_PORT
        self._estimate = SpeedEstimate(GENERIC_PREFILL, DEFAULT_CHUNK_TOKENS)
        self._said: PrefillLatency | None = None
        self._said_settled = False
        self._pace = Pace()
        self._law = GENERIC_PREFILL
        self._busy_since_s = 0.0
        self._foreign_tokens = 0.0
        self._owed_tokens = 0.0
        # Parallel lists, by deadline: `policy.placement` reads them as they are.
        self._queue: list[QueuedPrompt] = []
        self._deadlines: list[float] = []
        self._works: list[float] = []
        self._plan: Backlog | None = None

    @property
    def bootstrap_port(self) -> int:
        """Port of the server's bootstrap service."""
        return self._given_port or self._reported_port

    @property
    def owed(self) -> int:
        """Requests sent to it that have not been prefilled."""
        return len(self._queue)

    @property
    def owed_s(self) -> float:
        """Predicted seconds of all of it, progress not counted."""
        return sum(self._works)

    @property
    def known(self) -> bool:
        """Whether its speed has been observed, by itself or by this router."""
        return self._said_settled or self._estimate.batches >= ENOUGH_SAMPLES

    def enqueue(
        self,
        tokens: float,
        deadline_s: float,
        now_s: float,
        cached: float = 0.0,
        weight: float = 1.0,
    ) -> QueuedPrompt:
        """The server was just sent a prompt, `cached` tokens of which its cache should hold."""
        fresh, work = self._law.prompt_s(tokens, cached, self._estimate.chunk_tokens)
        pace = self._pace.factor if self._said is not None else 1.0
        prompt = QueuedPrompt(fresh, deadline_s, work, now_s, weight, pace)
        if not self._queue:
            self._busy_since_s = now_s
        place = bisect_right(self._deadlines, deadline_s)
        self._queue.insert(place, prompt)
        self._deadlines.insert(place, deadline_s)
        self._works.insert(place, prompt.work_s)
        self._owed_tokens += prompt.tokens
        self._plan = None
        return prompt

    def dequeue(self, prompt: QueuedPrompt, now_s: float, served: bool) -> None:
        """The prompt is prefilled (`served`) or gone. A second time does nothing."""
        place = bisect_left(self._deadlines, prompt.deadline_s)
        while place < len(self._queue) and self._queue[place] is not prompt:
            place += 1
        if place == len(self._queue):
            return
        del self._queue[place], self._deadlines[place], self._works[place]
        self._owed_tokens = self._owed_tokens - prompt.tokens if self._queue else 0.0
        self._plan = None
        if served:
            if self._said is not None:
                work = prompt.work_s / prompt.pace
                self._pace.observe(now_s - self._busy_since_s, work)
            if not self._said_settled:
                self._estimate.finished(prompt.tokens, prompt.sent_s, now_s)
            self._busy_since_s = now_s
            self._set_law()

    def state(
        self, now_s: float, handoff_s: float = 0.0, blocks: Blocks | None = None
    ) -> PrefillState:
        """As `policy.placement` sees it now, for a request with that prompt."""
        progress = min(now_s - self._busy_since_s, self._works[0]) if self._works else 0.0
        plan = self._plan
        if not self._works:
            plan = EMPTY
        elif plan is None or now_s - progress + handoff_s - plan.began_s > _LAG_S:
            weights = [prompt.weight for prompt in self._queue]
            plan = self._plan = Backlog.of(
                self._deadlines,
                self._works,
                now_s - progress + handoff_s,
                weights if any(weight != 1.0 for weight in weights) else None,
            )
        foreign = self._foreign_tokens if self._fresh_load(now_s) else 0.0
        return PrefillState(
            self._law,
            self._estimate.chunk_tokens,
            self._deadlines,
            self._works,
            progress,
            self.kairos,
            foreign * self._law.b_s,
            self.prefix.cached_tokens(blocks) if blocks is not None else 0.0,
            plan,
        )

    def learn(self, info: Mapping[str, Any]) -> None:
        """Also: bootstrap port, chunk and KV size and, from a Kairos server, its own speed."""
        super().learn(info)
        self._reported_port = int(
            number(info, "disaggregation_bootstrap_port", 1, 65535) or self._reported_port
        )
        chunk = number(info, "chunked_prefill_size", -1, 1e9)
        if chunk is not None:
            self._estimate.chunk_tokens = int(chunk)
        capacity = number(info, "max_total_num_tokens", 1, 1e15)
        if info.get("disable_radix_cache") is True:
            self.prefix.limit(0)
        elif capacity:
            self.prefix.limit(int(min(MOST_BLOCKS, capacity / BLOCK_TOKENS)))
        for report in kairos_reports(info):
            law = prefill_law(report)
            if law:
                self._said, self._said_settled = law, settled(report, "prefill_error")
        self._set_law()

    def learn_load(self, load: Load | None, now_s: float) -> None:
        """Also: what it has to prefill beyond what this router sent it."""
        super().learn_load(load, now_s)
        self._foreign_tokens = (
            0.0 if load is None else max(0.0, load.waiting_tokens - self._owed_tokens)
        )

    def forget(self) -> None:
        """Also: its prefix cache."""
        super().forget()
        self.prefix.clear()

    def _set_law(self) -> None:
        if self._said is not None:
            self._law = self._said.scaled(self._pace.factor)
        else:
            self._law = self._estimate.law()

    def describe(self) -> dict[str, Any]:
        """For the router's own /server_info and the admin calls."""
        return {
            **super().describe(),
            "bootstrap_port": self.bootstrap_port,
            "owed_requests": len(self._queue),
            "owed_s": round(self.owed_s, 6),
            "foreign_tokens": round(self._foreign_tokens),
            "speed": list(self._law[:5]),
            "speed_known": self.known,
            "pace": round(self._pace.factor, 3),
            "prefix_blocks": len(self.prefix),
        }


class DecodeServer(Server):
    """`running` and `tokens`: requests and KV tokens this router has in flight there."""

    role = "decode"

    def __init__(
        self,
        url: str,
        rules: HealthRules | None = None,
        now_s: Callable[[], float] = SYSTEM_CLOCK.now_s,
    ) -> None:
        super().__init__(url, rules, now_s)
        self.running = 0
        self.tokens = 0.0
        self.known = False
        self._law = UNTOLD_DECODE
        self._capacity = math.inf
        self._tpots: list[float] = []
        self._foreign = (0, 0.0)

    def admit(self, requests: int, tokens: float, tpot_s: float = math.inf) -> None:
        """Requests were just sent; `release` with the same numbers takes them out."""
        self.running += requests
        self.tokens += tokens
        insort(self._tpots, tpot_s)

    def release(self, requests: int, tokens: float, tpot_s: float = math.inf) -> None:
        """See `admit`."""
        self.running -= requests
        self.tokens = self.tokens - tokens if self.running else 0.0
        del self._tpots[bisect_left(self._tpots, tpot_s)]

    def state(self, now_s: float = float("-inf")) -> DecodeState:
        """As `policy.placement` sees it now."""
        requests, tokens = self._foreign if self._fresh_load(now_s) else (0, 0.0)
        return DecodeState(
            self._law, self.running + requests, self.tokens + tokens, self._capacity, self._tpots
        )

    def learn(self, info: Mapping[str, Any]) -> None:
        """Also: KV size and, from a Kairos server, its step cost."""
        super().learn(info)
        states = info.get("internal_states")
        ranks = len(states) if isinstance(states, list) else 1
        capacity = number(info, "max_total_num_tokens", 1, 1e15)
        if capacity:
            self._capacity = capacity * max(1, ranks)
        for report in kairos_reports(info):
            law = decode_law(report)
            if law:
                self._law, self.known = law, settled(report, "decode_error")

    def learn_load(self, load: Load | None, now_s: float) -> None:
        """Also: what it holds beyond what this router sent it."""
        super().learn_load(load, now_s)
        self._foreign = (
            (0, 0.0)
            if load is None
            else (max(0, load.requests - self.running), max(0.0, load.tokens - self.tokens))
        )

    def describe(self) -> dict[str, Any]:
        """For the router's own /server_info and the admin calls."""
        return {
            **super().describe(),
            "running": self.running,
            "tokens": round(self.tokens),
            "foreign": [self._foreign[0], round(self._foreign[1])],
            "step": list(self._law[:3]),
            "step_known": self.known,
        }
