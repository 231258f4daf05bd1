"""What the router learns from what it sees: prefill speed, hand-off time, bytes per token.

All of it is a prior that observations move; none of it needs a Kairos server.
"""

from __future__ import annotations

from sglang_kairos.policy.placement import PrefillSpeed
from sglang_kairos.predict.rls import Rls

# Completions this close together (seconds) came out of one batch.
_BATCH_GAP_S = 3e-3


class SpeedEstimate:
    """Prefill speed of one server from the completion times of what it was sent.

    A server works without pause while it owes anything, so the time between two completions (or
    since the request was sent, if that is later) is what the work in between took.
    """

    def __init__(self, prior: PrefillSpeed) -> None:
        # c stays the prior: whole requests behind a prefix cache do not tell it apart from b.
        self._rls = Rls((prior.a_s, prior.b_s), (1.0, 1e3))
        self._c_s = prior.c_s
        self._chunk = prior.chunk_tokens
        self._tokens: list[float] = []
        self._started_s = 0.0
        self._ended_s = float("-inf")

    def set_chunk(self, tokens: int) -> None:
        """Prompt tokens the server takes in one step."""
        self._chunk = max(1, tokens)

    def finished(self, tokens: float, sent_s: float, now_s: float) -> None:
        """A prompt of `tokens` tokens, sent at `sent_s`, was prefilled by `now_s` (seconds)."""
        if self._tokens and now_s - self._ended_s > _BATCH_GAP_S:
            self._observe()
        if not self._tokens:
            self._started_s = max(self._ended_s, sent_s)
        self._tokens.append(tokens)
        self._ended_s = now_s

    def speed(self) -> PrefillSpeed:
        """The estimate as of the last batch that is certainly complete."""
        a, b = self._rls.theta
        return PrefillSpeed(a, b, self._c_s, self._chunk)

    def _observe(self) -> None:
        chunks = sum(max(1.0, -(-n // self._chunk)) for n in self._tokens)
        seconds = self._ended_s - self._started_s
        seconds -= sum(self._c_s * n * n / 2 for n in self._tokens)
        self._rls.observe((chunks, sum(self._tokens)), seconds)
        self._tokens = []


class Average:
    """Exponentially weighted mean of positive observations, starting from a guess."""

    def __init__(self, guess: float, weight: float = 0.05) -> None:
        self.value = guess
        self._weight = weight

    def observe(self, value: float) -> None:
        """Move the mean towards `value`; an outlier counts as at most four times the mean."""
        bounded = min(value, 4.0 * self.value)
        self.value += self._weight * (bounded - self.value)
