"""When a server gets no requests: thresholds that `fleet.health` keeps to, and flags set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthRules:
    """Thresholds count consecutive events; times in seconds."""

    probe_failures: int = 3
    request_failures: int = 5
    eject_s: float = 5.0
    longest_eject_s: float = 60.0
