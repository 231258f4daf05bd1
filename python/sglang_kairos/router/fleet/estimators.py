"""What the router learns from what it sees: prefill speed, hand-off time, bytes per token.

All of it is a prior that observations move; none of it needs a Kairos server.
"""

from __future__ import annotations

from sglang_kairos.predict.latency_model import PrefillLatency
from sglang_kairos.predict.least_squares import Rls

# Completions this close together (seconds) came out of one batch.
_BATCH_GAP_S = 3e-3


class SpeedEstimate:
    """Prefill speed of one server from the completion times of what it was sent.

    A server works without pause while anything waits there. So the work between two completions took
    the time between them, or since the request was sent, if that is later.
    `chunk_tokens`: prompt tokens the server takes in one step; <= 0: all of a prompt.
    """

    def __init__(self, prior: PrefillLatency, chunk_tokens: int) -> None:
        # c stays the prior: whole requests behind a prefix cache do not tell it apart from b.
        self._rls = Rls((prior.a_s, prior.b_s), (1.0, 1e3))
        self._c_s = prior.c_s
        self.chunk_tokens = chunk_tokens
        self._tokens: list[float] = []
        self._started_s = 0.0
        self._ended_s = float("-inf")
        self.batches = 0

    def finished(self, tokens: float, sent_s: float, now_s: float) -> None:
        """A prompt of `tokens` tokens, sent at `sent_s`, was prefilled by `now_s` (seconds)."""
        if self._tokens and now_s - self._ended_s > _BATCH_GAP_S:
            self._observe()
        if not self._tokens:
            self._started_s = max(self._ended_s, sent_s)
        self._tokens.append(tokens)
        self._ended_s = now_s

    def law(self) -> PrefillLatency:
        """The estimate as of the last batch that is certainly complete."""
        a, b = self._rls.theta
        return PrefillLatency(a, b, self._c_s)

    def _observe(self) -> None:
        size = self.chunk_tokens
        chunks = sum(max(1.0, -(-n // size)) if size > 0 else 1.0 for n in self._tokens)
        seconds = self._ended_s - self._started_s
        seconds -= sum(self._c_s * n * n / 2 for n in self._tokens)
        self._rls.observe((chunks, sum(self._tokens)), seconds)
        self._tokens = []
        self.batches += 1


class Pace:
    """How much longer a server takes than its own law says: busy time over predicted work.

    The law covers the server's steps; what lies between them (tokenizing, transfer, a busy CPU) it
    does not. While a server owes anything it works, in whatever order, so the time between two
    completions adds up to the work completed. Old observations fade; bounded either way.
    """

    def __init__(self) -> None:
        self._busy_s = self._work_s = 0.5

    @property
    def factor(self) -> float:
        """1 when the law is right."""
        return min(max(self._busy_s / self._work_s, 0.5), 3.0)

    def observe(self, busy_s: float, work_s: float) -> None:
        """`work_s` by the law took `busy_s` since the last completion."""
        if work_s > 0.0:
            self._busy_s = 0.98 * self._busy_s + min(busy_s, 10.0 * work_s)
            self._work_s = 0.98 * self._work_s + work_s


class Average:
    """Exponentially weighted mean of positive observations, starting from a guess."""

    def __init__(self, guess: float, weight: float = 0.05) -> None:
        self.value = guess
        self._weight = weight

    def observe(self, value: float) -> None:
        """Move the mean towards `value`; an outlier counts as at most four times the mean."""
        bounded = min(value, 4.0 * self.value)
        self.value += self._weight * (bounded - self.value)


class Margin:
    """How much a prediction falls short of what happens, in seconds: its `quantile`.

    Stochastic gradient descent follows it: up a lot when it was exceeded, down a little when not.
    """

    def __init__(self, quantile: float = 0.9, most_s: float = 60.0) -> None:
        self.value_s = 0.0
        self._quantile = quantile
        self._most_s = most_s
        self._scale_s = 0.01

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Seconds; an early answer is a negative miss."""
        miss = actual_s - predicted_s
        self._scale_s += 0.05 * (min(abs(miss), 10.0 * self._scale_s + 0.01) - self._scale_s)
        step = 0.2 * self._scale_s
        up = self._quantile if miss > self.value_s else self._quantile - 1.0
        self.value_s = min(max(0.0, self.value_s + step * up), self._most_s)
