"""A request on its way through the simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_kairos.loads.replay import OK, Outcome
from sglang_kairos.loads.traces import Request
from sglang_kairos.policy.prefill_planner import NEVER


@dataclass(slots=True, eq=False)
class SimRequest:
    """A trace's row, its targets, and its progress. Times are seconds, lengths are tokens.

    `blocks`: the full cache blocks of the prompt. `work_error`, `priority` (lower first): what the
    servers believe of it. `done`: prompt tokens computed or found in the cache, of which `hit` were
    in the cache. `matched`: the hit expected while it waits. `emitted`: output tokens so far.
    """

    index: int
    row: Request
    ttft_s: float
    tpot_s: float
    blocks: tuple[int, ...] = ()
    work_error: float = 1.0
    priority: float = 0.0
    prefill: int = 0
    decode: int = 0
    matched: int = 0
    matched_at_plan: int = NEVER
    arrival_processed_tokens: int = 0
    paused_since_s: float = 0.0
    paused_s: float = 0.0
    hit: int = 0
    held: int = 0
    done: int = 0
    computed: int = 0
    emitted: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    ended_s: float = 0.0
    status: str = "error"
    error: str = ""

    @property
    def arrival_s(self) -> float:
        return self.row.arrival_s

    @property
    def prompt(self) -> int:
        return self.row.input_tokens

    @property
    def output(self) -> int:
        return self.row.output_tokens

    @property
    def due_s(self) -> float:
        """Returns when the first token is due."""
        return self.row.arrival_s + self.ttft_s

    @property
    def context(self) -> int:
        """Returns its KV tokens once it runs: the prompt and every output token but the latest."""
        return self.row.input_tokens + max(0, self.emitted - 1)

    def finish(self, now_s: float) -> None:
        """Notes that its last token came now."""
        self.status, self.last_token_s, self.ended_s = OK, now_s, now_s

    def refuse(self, now_s: float, why: str) -> None:
        """Notes that it will never be served."""
        self.status, self.error, self.ended_s = "aborted", why, now_s

    def outcome(self) -> Outcome:
        """Returns it in the terms of `loads.replay`, so that the same code measures both."""
        return Outcome(
            index=self.index,
            planned_s=self.arrival_s,
            sent_s=self.arrival_s,
            input_tokens=self.prompt,
            asked_tokens=self.output,
            ttft_slo_ms=self.ttft_s * 1e3,
            tpot_slo_ms=self.tpot_s * 1e3,
            status=self.status,
            error=self.error,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            ended_s=self.ended_s,
            output_tokens=self.emitted,
        )
