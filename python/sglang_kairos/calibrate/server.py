"""Measures prefill and decode steps of a running server, over HTTP, with its own model.

A Kairos server reports its latest steps in ``/server_info`` (`engine/state/recent_steps.py`). Its
own predictors learn from them, and they hold no HTTP time. Other servers are timed from outside, by
the time to a first token and the cadence of streams. So is a unified server while it decodes.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_kairos.calibrate.fit import DecodeRow, PrefillRow, medians
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Job, Outcome, Result, make_jobs, replay, run
from sglang_kairos.local_http import open_url
from sglang_kairos.predict.learnt_file import Key

# SGLang takes made-up KV for a request with this bootstrap host, on either side of a pair.
FAKE_HOST = "2.2.2.2"
RELAXED_MS = 1e5  # targets so long that no request is parked or shed for them
NEW = (16, 64, 256, 512, 1024, 2048, 4096, 8192)
PREFIX = (0, 512, 2048, 8192, 32_768)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = (64, 512, 2048, 8192, 32_768)
REPEATS, STEPS = 3, 40


class ProfileFailed(RuntimeError):
    """The server cannot be measured; the text says why."""


@dataclass
class MeasuredServer:
    """A running server: its address, and what it reports of itself."""

    url: str
    headers: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)

    def refresh(self) -> dict[str, Any]:
        """Returns Kairos' entry of /server_info; empty on a stock server.

        Raises ProfileFailed if the server does not answer.
        """
        request = urllib.request.Request(self.url + "/server_info", headers=self.headers)
        try:
            with open_url(request, timeout=30) as answer:
                self.info = json.load(answer)
            states = self.info["internal_states"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProfileFailed(f"{self.url}/server_info: {error}") from None
        return dict(states[0].get("kairos") or {}) if states else {}

    @property
    def mode(self) -> str:
        """Returns null (unified), prefill or decode."""
        return str(self.info.get("disaggregation_mode") or "null")

    @property
    def chunk(self) -> int:
        """Returns the most new tokens in a prefill step."""
        size = self.info.get("chunked_prefill_size") or 0
        return int(size) if size > 0 else int(self.info.get("max_prefill_tokens") or 8192)

    @property
    def capacity(self) -> int:
        """Returns the KV tokens that the server holds; 65,536 if it does not say."""
        state = (self.info.get("internal_states") or [{}])[0]
        memory = state.get("memory_usage") or {}
        tokens = self.info.get("max_total_num_tokens") or memory.get("token_capacity")
        return int(tokens or 65_536)

    @property
    def longest(self) -> int:
        """Returns the longest prompt that the server takes, in tokens."""
        limit = self.info.get("context_length") or self.info.get("max_req_input_len") or 32_000
        return int(limit) - 2 * STEPS

    @property
    def most_running(self) -> int:
        state = (self.info.get("internal_states") or [{}])[0]
        most = state.get("effective_max_running_requests_per_dp")
        return int(most or self.info.get("max_running_requests") or 256)


def key_of(server: MeasuredServer, report: Mapping[str, Any], gpu: str = "") -> Key:
    """Returns the key by which the server looks its latency model up. A Kairos server reports it.

    `gpu`: name of the GPU, for a server that does not. Raises ProfileFailed if it is missing.
    """
    # Servers of the release before report it by the second name.
    told = report.get("latency_model_key", report.get("profile_key"))
    if isinstance(told, dict):
        return Key(**told)
    if not gpu:
        raise ProfileFailed("a server without Kairos does not report its GPU; name it with --gpu")
    return Key.of_server(server.info.get, gpu, int(server.info.get("tp_size") or 1))


class Measurement:
    """One session of measuring, at most `budget_s` seconds of it."""

    def __init__(
        self, server: MeasuredServer, budget_s: float, say: Callable[[str], None], seed: int
    ) -> None:
        self.server, self.say, self.seed = server, say, seed
        self._ends_s = time.monotonic() + budget_s
        self._draws = itertools.count(seed * 10_000)
        self.source = "the server's own steps"

    @property
    def _caches(self) -> bool:
        """Returns whether prompts stay in the prefix cache; with made-up KV they do not."""
        return self.server.mode == "null"

    def left_s(self) -> float:
        return self._ends_s - time.monotonic()

    def prefill(self, until_s: float) -> list[PrefillRow]:
        """Returns rows over the grid, fewest tokens first, until `until_s` of the budget are left.

        The first cell behind a prefix is taken as soon as the budget allows one. Without any, the
        latency model has no attention term.
        """
        server, rows = self.server, list[PrefillRow]()
        self._send([self._job(32, 1), self._job(300, 1)])
        sizes = {min(new, server.chunk) for new in NEW}
        prefixes = PREFIX if self._caches else (0, *(server.chunk * k for k in (1, 2, 4)))
        limit = min(server.longest, server.capacity // 2)
        cells = [(prefix, new) for prefix in prefixes for new in sizes if prefix + new <= limit]
        cells.sort(key=lambda cell: (sum(cell), cell))
        while fits := [cell for cell in cells if self._affords(rows, cell, until_s)]:
            wanted = bool(rows) and not any(cached for cached, *_ in rows)
            behind = [cell for cell in fits if cell[0]] if wanted else []
            cell = (behind or fits)[0]
            cells.remove(cell)
            rows += self._prefill_cell(*cell)
        return rows

    def _affords(self, rows: Sequence[PrefillRow], cell: tuple[int, int], until_s: float) -> bool:
        whole, new = sum(cell), cell[1]
        repeats = self._estimate(rows, new if self._caches else whole)
        cost = REPEATS * repeats + (self._estimate(rows, whole) if self._caches else 0.0)
        return self.left_s() - 1.5 * cost > until_s

    def decode(self) -> list[DecodeRow]:
        """Returns rows over the grid, small batches with short contexts first, while the budget lasts."""
        server, rows = self.server, list[tuple[float, float, float]]()
        self._send([self._job(32, 8)])
        cells = [(batch, context) for batch in BATCH for context in CONTEXT]
        limit = 0.9 * server.capacity
        took: dict[int, float] = {}
        for batch, context in sorted(cells, key=lambda cell: cell[0] * (cell[1] + 1000)):
            fits = batch * (context + STEPS + 1) <= limit and context <= server.longest
            if batch > server.most_running or not fits:
                continue
            # What a cell takes grows no faster than its tokens.
            size = batch * (context + 1000)
            guess = max((s * size / known for known, s in took.items()), default=1.0)
            if guess > self.left_s():
                continue
            begun = time.monotonic()
            rows += self._decode_cell(batch, context)
            took = {size: time.monotonic() - begun}
        return [(int(b), tokens, seconds) for b, tokens, seconds in medians(rows)]

    def _prefill_cell(self, prefix: int, new: int) -> list[PrefillRow]:
        """Measures `new` tokens behind `prefix` cached ones, or behind chunks of that size."""
        group = next(self._draws)
        size = prefix + new
        shared = (group,) if prefix and self._caches else None
        rows = [traces.Request(0.0, prefix, 1, shared, prefix)] if shared else []
        rows += [traces.Request(0.0, size, 1, shared, max(1, prefix))] * REPEATS
        jobs = self._jobs(rows, group)
        if shared:
            self._send(jobs[:1])
        seen = self._seen()
        result = self._send(jobs[-REPEATS:])
        if (steps := self._fresh(seen)) is not None:
            found = [(float(cached), float(n), s) for n, cached, s in steps]
        else:
            self.source = "HTTP times"
            times = [outcome.ttft_ms / 1e3 for outcome in result.outcomes if outcome.ok]
            found = [(float(prefix), float(new), seconds) for seconds in times]
        # Without a cache hit, or in pieces, another cell ran. So rows take what the server reports.
        grouped: dict[tuple[float, float], list[float]] = {}
        for cached, n, seconds in found:
            grouped.setdefault((cached, n), []).append(seconds)
        return [(cached, n, float(np.median(s))) for (cached, n), s in grouped.items()]

    def _decode_cell(self, batch: int, context: int) -> list[tuple[float, float, float]]:
        """Returns rows (batch, KV tokens, seconds) of `batch` streams over contexts of that length."""
        row = traces.Request(0.0, context, STEPS)
        seen = self._seen()
        result = self._send(self._jobs([row] * batch, next(self._draws)), abreast=batch)
        if self.server.mode == "decode" and (steps := self._fresh(seen)) is not None:
            return [(float(b), float(tokens), s) for b, tokens, s in steps]
        self.source = "HTTP times"
        step_s = cadence(result.outcomes)
        return [] if step_s is None else [(float(batch), batch * (context + STEPS / 2), step_s)]

    def _estimate(self, rows: Sequence[PrefillRow], tokens: float) -> float:
        """Returns an upper bound in seconds for so many new tokens: quadratic beyond each measured cell.

        Most of what the cheapest cell takes is there at any size; at least a quarter grows.
        """
        known = [(new, seconds) for _, new, seconds in rows if new > 0]
        floor = min((seconds for _, seconds in known), default=0.0)
        guesses = []
        for new, seconds in known:
            grows = max(seconds - floor, 0.25 * seconds)
            guesses.append(seconds + grows * (max(1.0, tokens / new) ** 2 - 1.0))
        return min(guesses, default=0.2)

    def _job(self, tokens: int, output: int) -> Job:
        return self._jobs([traces.Request(0.0, tokens, output)], next(self._draws))[0]

    def _jobs(self, rows: Sequence[traces.Request], seed: int) -> list[Job]:
        fake = {"bootstrap_host": FAKE_HOST, "bootstrap_room": 0}
        extra = fake if self.server.mode != "null" else None
        return make_jobs(rows, RELAXED_MS, RELAXED_MS, seed=seed, extra=extra)

    def _send(self, jobs: Sequence[Job], abreast: int = 1) -> Result:
        timeout_s = max(10.0, self.left_s() + 10.0)
        sending = replay(
            self.server.url,
            jobs,
            concurrency=abreast,
            timeout_s=timeout_s,
            headers=self.server.headers,
        )
        result = run(sending)
        bad = [outcome for outcome in result.outcomes if not outcome.ok]
        if bad:
            raise ProfileFailed(f"a request failed: {bad[0].status} {bad[0].error}")
        return result

    def _steps(self) -> dict[str, Any]:
        steps = self.server.refresh().get("steps")
        return steps if isinstance(steps, dict) else {}

    def _seen(self) -> int:
        return int(self._steps().get("seen", 0))

    def _fresh(self, seen: int) -> list[tuple[float, float, float]] | None:
        """Returns the steps that ran since `seen`; None where the server did not note any."""
        steps = self._steps()
        count = int(steps.get("seen", 0)) - seen
        latest = steps.get("latest") or []
        rows = [(a, b, s) for a, b, s in latest[max(0, len(latest) - count) :] if s > 0]
        return rows if count > 0 and rows else None


def cadence(outcomes: Sequence[Outcome]) -> float | None:
    """Returns the seconds between tokens while all streams ran; None if none had three tokens then."""
    streams = [
        outcome.first_token_s + np.concatenate([[0.0], np.cumsum(outcome.itls_ms) / 1e3])
        for outcome in outcomes
        if outcome.ok
    ]
    if not streams:
        return None
    start, end = max(s[0] for s in streams), min(s[-1] for s in streams)
    gaps = []
    for stream in streams:
        inside = stream[(stream >= start) & (stream <= end)]
        if len(inside) >= 3:
            gaps.append((inside[-1] - inside[0]) / (len(inside) - 1))
    return float(np.median(gaps)) if gaps else None
