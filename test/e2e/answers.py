"""Sends jobs to a router, and compares what they were answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

Rows = list[dict[str, Any]]

# The parts of `meta_info` that must not depend on how a request was scheduled.
COMPARED = (
    *("finish_reason", "prompt_tokens", "completion_tokens"),
    *("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"),
    *("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs"),
)


async def send(url: str, timed: Sequence[tuple[float, dict[str, Any]]]) -> list[tuple[Rows, int]]:
    """Posts each (seconds from now, /generate body); its final rows (one per sample) and events."""
    limits = aiohttp.ClientTimeout(total=120.0)
    async with aiohttp.ClientSession(timeout=limits) as session:
        return await asyncio.gather(*(_one(session, url, at_s, body) for at_s, body in timed))


async def _one(
    session: aiohttp.ClientSession, url: str, at_s: float, body: dict[str, Any]
) -> tuple[Rows, int]:
    await asyncio.sleep(at_s)
    async with session.post(url + "/generate", json=body) as response:
        text = await response.text()
        assert response.status == 200, text[:500]
    if not body.get("stream"):
        found = json.loads(text)
        return (found if isinstance(found, list) else [found]), 1
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(events[-2])], len(events) - 1


def difference(got: dict[str, Any], want: dict[str, Any]) -> dict[str, Any]:
    """What two rows say differently, log probabilities by more than 1e-4: name → (got, want)."""
    mine, stocks = _essence(got), _essence(want)
    return {
        name: (mine.get(name), stocks.get(name))
        for name in mine.keys() | stocks.keys()
        if _differs(mine.get(name), stocks.get(name))
    }


def _essence(row: dict[str, Any]) -> dict[str, Any]:
    meta = {name: row["meta_info"][name] for name in COMPARED if name in row["meta_info"]}
    return {"text": row["text"], "output_ids": row["output_ids"], **meta}


def _differs(got: Any, want: Any) -> bool:
    if isinstance(got, float) and isinstance(want, float):
        return abs(got - want) > 1e-4
    if isinstance(got, list) and isinstance(want, list):
        return len(got) != len(want) or any(map(_differs, got, want))
    return bool(got != want)
