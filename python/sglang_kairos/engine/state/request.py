"""Kairos' state of one request: a single object on SGLang's request, as ``req._kairos``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_kairos.engine import compat
from sglang_kairos.slo.targets import Slo


@dataclass(slots=True, eq=False)
class RequestState:
    """The state of one request. Times are `time.perf_counter` seconds of this process; None: not yet.

    Of a chunked prefill:
        paused_s         seconds paused in all, without the present pause
        paused_since_s   when the present pause began
        aborted          it was aborted while paused, and is to be torn down
    Of decode:
        ready_s          when it had shaken hands
        reserved_s       when its KV was reserved
        kept             its KV was reserved to keep it on pace (`policy.admission`)
        fits             the server has KV for it at all
    Of its stream, for `slo.attainment.Silences`:
        first_token_s, last_token_s   when it got its first and its latest token
        silent_s         its longest wait for a token after the first
        retractions      how many of its retractions were seen
    `counted`: its end is in the server's attainment, or must not be.
    """

    slo: Slo
    arrival_s: float
    first_token_s: float | None = None
    paused_s: float = 0.0
    paused_since_s: float | None = None
    aborted: bool = False
    ready_s: float | None = None
    reserved_s: float | None = None
    kept: bool = True
    fits: bool = False
    last_token_s: float | None = None
    silent_s: float = 0.0
    retractions: int = 0
    counted: bool = False

    @property
    def ttft_due_s(self) -> float:
        return self.arrival_s + self.slo.ttft_ms / 1e3

    def pause(self, now_s: float) -> None:
        """Notes that its prefill is paused from now on."""
        self.paused_since_s, self.aborted = now_s, False

    def resume(self, now_s: float) -> None:
        """Notes that its prefill goes on."""
        self.paused_s, self.paused_since_s = self.sat_out_s(now_s), None

    def sat_out_s(self, now_s: float) -> float:
        """Returns the seconds that its prefill was paused in all, the present pause included."""
        since_s = self.paused_since_s
        return self.paused_s if since_s is None else self.paused_s + now_s - since_s


def tokens_left(req: Any) -> int:
    """Returns the prompt tokens of a begun chunked prefill that no launched chunk covers yet."""
    end = compat.extend_end(req)
    return max(1, len(req.origin_input_ids) - (compat.prefix_len(req) if end is None else end))


def kv_tokens(req: Any) -> int:
    """Returns the prompt tokens of a begun chunked prefill that are computed, whose KV it keeps."""
    return int(compat.extend_end(req) or compat.prefix_len(req))
