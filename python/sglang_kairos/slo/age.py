"""How long ago the first gateway saw a request, read from the headers that gateways set.

``x-request-start`` (older name: ``x-queue-start``) holds the time at which a gateway took the
request, since 1970. It is in seconds (nginx: ``t=${msec}``, as in ``t=1512379167.574``),
milliseconds (Heroku), microseconds (Apache: ``%t``) or nanoseconds. The size tells which; ``t=`` is
optional. Gateways in a row append values with commas, and the earliest counts.

``traceparent`` (W3C) has no time of its own, but two kinds of trace ids begin with one. Those in
the manner of AWS X-Ray have 8 hexadecimal digits of seconds, UUIDs of version 7 have 12 digits of
milliseconds. A random id passes for one of the last 30 s in 7 of 10^9 cases. Yet a trace may have
begun long before this request, as with one of an agent's calls. So the header is read only when the
configuration says so.

Clocks of different machines are compared here. A time a second ahead of our clock, or older than
the rule allows, is ignored: that clock is wrong, or the unit is unknown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

# Notes on headers that were not taken as written, such as "x-slo-ttft-ms clamped".
HeaderNotes = list[str]

START_HEADERS = ("x-request-start", "x-queue-start")
TRACE_HEADER = "traceparent"
AGE_HEADERS = (*START_HEADERS, TRACE_HEADER)

# Units by size, seconds: a time of this century is below 1e11 in seconds only, and so on.
_UNITS = ((1e11, 1.0), (1e14, 1e-3), (1e17, 1e-6), (1e20, 1e-9))
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_AHEAD_MS = 1000.0  # clocks that are kept in step differ by less
_MOST_VALUES = 16  # read of one header; nobody has more gateways in a row


@dataclass(frozen=True, slots=True)
class AgeRule:
    """The headers (lower-case names) that may say when a request came, and the oldest age in ms."""

    headers: tuple[str, ...] = ()
    most_ms: float = 30_000.0

    def age_ms(self, headers: Mapping[str, str], now_s: float, notes: HeaderNotes) -> float:
        """Returns the milliseconds since the first gateway that says so; 0 if none does.

        `now_s`: this machine's time since 1970. A header whose time is not believed is noted,
        except ``traceparent``, since most have no time.
        """
        oldest = 0.0
        for name in self.headers:
            text = headers.get(name)
            if text is None:
                continue
            starts = _trace_start(text) if name == TRACE_HEADER else _starts(text)
            ages = [1e3 * (now_s - start) for start in starts]
            believed = [age for age in ages if -_AHEAD_MS <= age <= self.most_ms]
            if believed:
                oldest = max(oldest, *believed)
            elif name != TRACE_HEADER:
                notes.append(f"{name} ignored")
        return oldest


NO_AGE = AgeRule()


def _starts(text: str) -> list[float]:
    """Returns the times that an ``x-request-start`` names, in seconds since 1970."""
    found = []
    for part in text.split(",")[:_MOST_VALUES]:
        try:
            number = float(part.strip().removeprefix("t=").strip())
        except ValueError:
            continue
        if not math.isfinite(number) or number < 0:
            continue
        unit = next((unit for most, unit in _UNITS if number < most), None)
        if unit is not None:
            found.append(number * unit)
    return found


def _trace_start(text: str) -> list[float]:
    """Returns the times that a trace id may begin with, in seconds since 1970.

    `age_ms` judges them.
    """
    found = _TRACE.fullmatch(text.strip().lower())
    if found is None:
        return []
    trace = found[1]
    if trace[12] == "7" and trace[16] in "89ab":
        return [int(trace[:12], 16) / 1e3]
    # Only the second is known: taking its end makes no request older than it is.
    return [int(trace[:8], 16) + 1.0]
