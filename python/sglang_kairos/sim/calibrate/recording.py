"""A recording of a replay on one prefill and one decode server, step by step.

Times are seconds of one clock, CLOCK_MONOTONIC of the machine. Only the client's count from
`Recording.begun_s`.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sglang_kairos.loads.replay import Outcome


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """A prefill step. `rooms` names the requests; `new`, `prefix` and `prompt` are their tokens."""

    start_s: float
    end_s: float
    idle: bool
    rooms: tuple[int, ...]
    new: tuple[int, ...]
    prefix: tuple[int, ...]
    prompt: tuple[int, ...]
    queued_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A decode step over the requests `rooms` with `kv` tokens of context in all."""

    start_s: float
    end_s: float
    idle: bool
    rooms: tuple[int, ...]
    kv: int


Step = PrefillStep | DecodeStep


@dataclass(frozen=True)
class Recording:
    """One replay. `outcomes` count their times from `begun_s`."""

    prefill: list[PrefillStep]
    decode: list[DecodeStep]
    outcomes: list[Outcome]
    begun_s: float


def read_record(record: Mapping[str, Any]) -> Step:
    """Returns one line of the step recorder. Raises KeyError or TypeError if it is none."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name != "kind"
    }
    if record["kind"] == "decode":
        return DecodeStep(**values)
    return PrefillStep(**values)


def read(folder: Path, outcomes: list[Outcome], begun_s: float) -> Recording:
    """Returns what the step recorder left in `folder`, without what came before `begun_s`."""
    steps = {
        mode: [
            step
            for line in (folder / f"{mode}.jsonl").read_text(encoding="utf-8").splitlines()
            if (step := read_record(json.loads(line))).start_s >= begun_s
        ]
        for mode in ("prefill", "decode")
    }
    prefill = [step for step in steps["prefill"] if isinstance(step, PrefillStep)]
    decode = [step for step in steps["decode"] if isinstance(step, DecodeStep)]
    return Recording(prefill, decode, outcomes, begun_s)


def cycles(steps: Sequence[Step]) -> list[float]:
    """Returns how long each step occupied the server, in seconds, shape (len(steps),).

    A step lasts until the next one starts if that follows without idling. Otherwise what comes
    after the forward is not seen, so it lasts until its end and the usual gap.
    """
    gaps = [b.start_s - a.end_s for a, b in itertools.pairwise(steps) if not b.idle]
    usual = median(gaps) if gaps else 0.0
    taken = [step.end_s - step.start_s + usual for step in steps]
    for at, (step, after) in enumerate(itertools.pairwise(steps)):
        if not after.idle:
            taken[at] = after.start_s - step.start_s
    return taken


def sent_rooms(recording: Recording) -> dict[int, Outcome]:
    """Returns which request each room was: the same prompt length, in the order they came."""
    queued = {
        room: (length, at)
        for step in reversed(recording.prefill)
        for room, length, at in zip(step.rooms, step.prompt, step.queued_s, strict=True)
    }
    rooms: defaultdict[int, list[int]] = defaultdict(list)
    for room, (length, _) in sorted(queued.items(), key=lambda item: item[1][1]):
        rooms[length].append(room)
    sent: defaultdict[int, list[Outcome]] = defaultdict(list)
    for outcome in sorted(recording.outcomes, key=lambda outcome: outcome.sent_s):
        sent[outcome.input_tokens].append(outcome)
    return {
        room: outcome
        for length, found in rooms.items()
        for room, outcome in zip(found, sent[length], strict=False)
    }


@dataclass(frozen=True)
class Delays:
    """Samples in seconds.

    `front`: client's sending to the prefill queue, where prefill was idle. `handoff`: prefill's
    result to the first decode step, where decode was idle. `delivery`: that step's start to the
    client's first token; may be negative.
    """

    front: list[float]
    handoff: list[float]
    delivery: list[float]


def delays(recording: Recording, late_results: bool) -> Delays:
    """Returns the delays around the steps of a replay; `late_results` as in `calibrate.Calibration`."""
    request, begun = sent_rooms(recording), recording.begun_s
    found = Delays([], [], [])
    result_s: dict[int, float] = {}
    seen: set[int] = set()
    admitted: set[int] = set()
    for step, after in zip(recording.prefill, [*recording.prefill[1:], None], strict=True):
        follows = late_results and after is not None and not after.idle
        ready_s = after.end_s if follows and after is not None else step.end_s
        for room, new, prefix, prompt, queued_s in zip(
            step.rooms, step.new, step.prefix, step.prompt, step.queued_s, strict=True
        ):
            if step.idle and room not in seen and room in request:
                found.front.append(queued_s - begun - request[room].sent_s)
            seen.add(room)
            if prefix + new == prompt:
                result_s[room] = ready_s
    for forward in recording.decode:
        for room in forward.rooms:
            if room in admitted:
                continue
            admitted.add(room)
            if room in result_s and forward.idle:
                found.handoff.append(forward.start_s - result_s[room])
            if room in request and request[room].output_tokens:
                found.delivery.append(begun + request[room].first_token_s - forward.start_s)
    return found
