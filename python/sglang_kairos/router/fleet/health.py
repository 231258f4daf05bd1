"""Whether a server gets requests: probes say if it is there, requests say if it works.

    gone      nobody answers there: the last probes failed (one is enough when the connection is
              refused), until a probe succeeds
    ejected   it answers probes but fails requests (outlier): out for `eject_s`, doubled each time
              in a row up to `longest_eject_s`, then on probation: one more failure ejects it again,
              one success clears it

No clock in here: times are seconds of one monotonic clock, passed in.
"""

from __future__ import annotations

from sglang_kairos.router.health_rules import HealthRules


class Health:
    """The state of one server. A new one is taken to be there, so that a router can start first."""

    def __init__(self, rules: HealthRules) -> None:
        self.gone = False
        self.ejections = 0
        self._rules = rules
        self._probe_failures = 0
        self._request_failures = 0
        self._in_a_row = 0
        self._ejected_until_s = float("-inf")

    def takes_requests(self, now_s: float) -> bool:
        """Neither gone nor ejected."""
        return not self.gone and now_s >= self._ejected_until_s

    def state(self, now_s: float) -> str:
        """up, probation, ejected or gone."""
        if self.gone:
            return "gone"
        if now_s < self._ejected_until_s:
            return "ejected"
        return "probation" if self._in_a_row else "up"

    def probe_answered(self) -> None:
        """A probe got an answer."""
        self.gone = False
        self._probe_failures = 0

    def probe_failed(self, refused: bool) -> bool:
        """No answer to a probe, or nobody to connect to (`refused`). True if it is gone by this."""
        self._probe_failures += 1
        enough = refused or self._probe_failures >= self._rules.probe_failures
        left, self.gone = not self.gone and enough, self.gone or enough
        return left

    def request_answered(self) -> None:
        """It did what it was asked; a client's mistake counts as that, too."""
        self._request_failures = self._in_a_row = 0

    def request_refused(self) -> bool:
        """Nobody to connect to: gone until a probe says otherwise. True if it is gone by this."""
        left, self.gone = not self.gone, True
        return left

    def request_failed(self, now_s: float) -> bool:
        """It broke a request off or answered 5xx. True if it is ejected for it."""
        if now_s < self._ejected_until_s:
            return False  # of what was sent before
        self._request_failures += 1
        if self._in_a_row == 0 and self._request_failures < self._rules.request_failures:
            return False
        rules = self._rules
        length = min(rules.eject_s * 2.0**self._in_a_row, rules.longest_eject_s)
        self._ejected_until_s = now_s + length
        self._request_failures = 0
        self._in_a_row = min(self._in_a_row + 1, 30)
        self.ejections += 1
        return True
