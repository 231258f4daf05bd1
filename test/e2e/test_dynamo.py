"""NVIDIA Dynamo's workers with Kairos: same tokens, and a request's targets decide its turn.

`make test-dynamo` installs Dynamo and runs this; docs/dynamo.md says what a user does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pd_client import trouble_in

from helpers.dynamo import FOLDER, MODEL, SGLANG, Dynamo, dynamo
from helpers.front_ends import (
    AGE_MS,
    CHAT,
    CLASSES,
    COMPLETIONS,
    DEFAULT_MS,
    DEFAULT_TPOT_MS,
    DYNAMO,
    GENERATE,
    PAGE,
    PRIORITY_CLASSES,
    WAYS,
    Table,
    Way,
    cell,
    renew,
    table_of,
)
from helpers.trees import sglang_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ARGS = ("--chunked-prefill-size", "256")
BLOCKER = 5000  # tokens of a prompt behind which others queue: seconds
Send = tuple[str, dict[str, Any]]


def body_of(path: str, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    if path == GENERATE:
        ids = [10 + ord(letter) for letter in prompt]
        return {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": tokens},
            "stream": True,
            **more,
        }
    body = {"model": MODEL, "max_tokens": tokens, "temperature": 0, **more}
    if path == COMPLETIONS:
        return {"prompt": prompt, **body}
    return {"messages": [{"role": "user", "content": prompt}], **body}


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    send: Send,
    first: Callable[[], None] | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, str]:
    """The status and the text of an answer; `first` is called at the first event of a stream."""
    path, body = send
    async with session.post(url + path, json=body, headers=headers) as answer:
        lines = []
        async for line in answer.content:
            if first is not None and line.startswith(b"data:"):
                first()
                first = None
            lines.append(line.decode())
        return answer.status, "".join(lines)


def ask_all(
    url: str, sends: list[Send], headers: dict[str, str] | None = None
) -> list[tuple[int, str]]:
    async def run() -> list[tuple[int, str]]:
        limits = aiohttp.ClientTimeout(total=240.0)
        async with aiohttp.ClientSession(timeout=limits) as session:
            going = (ask(session, url, send, headers=headers) for send in sends)
            return list(await asyncio.gather(*going))

    return asyncio.run(run())


def ask_one(
    url: str, path: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, str]:
    return ask_all(url, [(path, body)], headers)[0]


def tokens_of(path: str, text: str) -> Any:
    """What a model said: of a native stream the token ids, else the text."""
    if path == GENERATE:
        events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        return [token for event in events for token in json.loads(event)["output_ids"]]
    (choice,) = json.loads(text)["choices"]
    return choice["message"]["content"] if path == CHAT else choice["text"]


def sample(count: int) -> list[Send]:
    """Greedy requests of every kind and many lengths, some with targets."""
    rng = random.Random(4)
    sends = []
    for place in range(count):
        path = (GENERATE, COMPLETIONS, CHAT)[place % 3]
        prompt = "".join(rng.choice("abcdefgh ") for _ in range(rng.choice((5, 40, 300, 1200))))
        body = body_of(path, prompt, rng.randrange(2, 40))
        if path == GENERATE:
            body["sampling_params"]["temperature"] = 0
        elif place % 2:
            targets = {"ttft_target": rng.randrange(200, 9000), "itl_target": rng.randrange(5, 90)}
            body["nvext"] = {"router": targets}
        sends.append((path, body))
    return sends


SAMPLE = sample(36)


@pytest.fixture(scope="module")
def sglang() -> Path:
    if not (FOLDER / "dynamo").is_dir():
        pytest.skip(f"Dynamo is not in {FOLDER}: make test-dynamo installs it")
    return sglang_folder(SGLANG)


@pytest.fixture(scope="module")
def stock(sglang: Path, tiny_model: str, out_dir: Path) -> list[Any]:
    """What Dynamo answers without Kairos."""
    logs = out_dir / "dynamo-stock"
    with dynamo(sglang, tiny_model, logs, env={"KAIROS": "off"}, args=ARGS) as running:
        assert running.kairos() == [{}, {}]
        answers = ask_all(running.url, SAMPLE)
    assert {status for status, _ in answers} == {200}
    return [tokens_of(path, text) for (path, _), (_, text) in zip(SAMPLE, answers, strict=True)]


@pytest.fixture(scope="module")
def running(
    stock: list[Any],
    sglang: Path,
    tiny_model: str,
    out_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Dynamo]:
    classes = tmp_path_factory.mktemp("dynamo") / "classes.json"
    classes.write_text(json.dumps(CLASSES))
    env = {
        "KAIROS_TTFT_MS": str(DEFAULT_MS),
        "KAIROS_TPOT_MS": str(DEFAULT_TPOT_MS),
        "KAIROS_SLO_CLASSES": str(classes),
        "KAIROS_PRIORITY_CLASSES": PRIORITY_CLASSES,
        "KAIROS_AGE_HEADERS": "x-request-start,traceparent",
        "KAIROS_MAX_AGE_MS": str(2 * AGE_MS),
    }
    logs = out_dir / "dynamo"
    with dynamo(sglang, tiny_model, logs, env=env, args=ARGS) as found:
        yield found
        assert not trouble_in(dict(found.logs))


def test_every_worker_has_kairos_and_no_token_changes(stock: list[Any], running: Dynamo) -> None:
    for report, mode in zip(running.kairos(), ("prefill", "decode"), strict=True):
        assert report["mode"] == mode
        assert report["seams"]["hooks"] > 20 and report["seams"]["tree"] == 0
    answers = ask_all(running.url, SAMPLE)
    assert {status for status, _ in answers} == {200}
    found = [tokens_of(path, text) for (path, _), (_, text) in zip(SAMPLE, answers, strict=True)]
    assert found == stock


def test_what_arrives_is_what_the_page_says(running: Dynamo) -> None:
    """docs/front_ends.md has a column; with KAIROS_WRITE_TABLES=1 it is written."""

    def arrives(way: Way, path: str) -> bool:
        more, headers = way.say(path)
        body = body_of(path, "Once upon", 2)
        for key, value in more.items():
            body[key] = {**body[key], **value} if key == "sampling_params" else value
        status, text = ask_one(running.url, path, body, headers)
        assert status in (200, 400), (way.name, path, text)
        return status == 200 and all(way.arrived(last) for last in running.last_requests())

    found = {way: {path: arrives(way, path) for path in DYNAMO.paths} for way in WAYS}
    column = {way.name: cell(DYNAMO, found[way]) for way in WAYS}
    if os.environ.get("KAIROS_WRITE_TABLES"):
        renew(PAGE, DYNAMO.title, column)
    assert column == Table.read(table_of(PAGE.read_text("utf-8"))).cells[DYNAMO.title]


BODY = {"ttft_ms": 130_000, "tpot_ms": 1300}
WIRE = {"custom_params": {"kairos": {"ttft_ms": 150_000}}}


@pytest.mark.parametrize(
    ("path", "more", "said"),
    [
        (CHAT, BODY, "ttft_ms"),  # Dynamo's own: it knows no such field
        (CHAT, WIRE, "custom_params"),
        (CHAT, {"nvext": {"router": {"ttft_target": 0}}}, "nvext.router.ttft_target"),
        (CHAT, {"nvext": {"router": {"itl_target": 1e9}}}, "nvext.router.itl_target"),
        (GENERATE, {"ttft_ms": 0}, "ttft_ms"),
    ],
)
def test_what_cannot_be_honoured_is_answered_400(
    running: Dynamo, path: str, more: dict[str, Any], said: str
) -> None:
    status, text = ask_one(running.url, path, body_of(path, "Once upon", 2, **more))
    assert status == 400 and said in text, text
    assert ask_one(running.url, path, body_of(path, "Once upon", 2))[0] == 200


def test_the_tighter_target_is_served_first(running: Dynamo) -> None:
    """Sent last behind a long prompt it comes first, and does not where both are alike."""

    async def run(first_ms: float, second_ms: float, blockers: int) -> list[str] | None:
        order: list[str] = []
        limits = aiohttp.ClientTimeout(total=240.0)
        async with aiohttp.ClientSession(timeout=limits) as session:

            def start(send: Send, name: str = "") -> asyncio.Task[tuple[int, str]]:
                seen = (lambda: order.append(name)) if name else None
                return asyncio.create_task(ask(session, running.url, send, seen))

            going = []
            for _ in range(blockers):
                ids = [random.randrange(10, 500) for _ in range(BLOCKER)]
                body = body_of(GENERATE, "", 1, ttft_ms=60_000)
                going.append(start((GENERATE, {**body, "input_ids": ids})))
            await asyncio.sleep(0.3)
            for name, ttft_ms in (("first", first_ms), ("second", second_ms)):
                prompt = f"{random.random()} " + "word " * 300
                more = {"nvext": {"router": {"ttft_target": ttft_ms}}, "stream": True}
                going.append(start((CHAT, body_of(CHAT, prompt, 1, **more)), name))
                await asyncio.sleep(0.2)
            early = bool(order)
            answers = await asyncio.gather(*going)
        assert {status for status, _ in answers} == {200}, answers
        return None if early else order

    def order(first_ms: float, second_ms: float) -> list[str]:
        for blockers in (1, 2, 4, 8):
            if found := asyncio.run(run(first_ms, second_ms, blockers)):
                return found
        pytest.fail("the queue was empty before both were sent")

    assert order(600_000, 120_000) == ["second", "first"]
    assert order(300_000, 300_000) == ["first", "second"]


def test_each_worker_counts_kept_and_missed_promises(running: Dynamo) -> None:
    def counted() -> tuple[float, float]:
        """Requests by class that met and that missed TTFT, on the decode worker."""
        shown = running.metrics(1)
        found = {
            met: sum(
                value
                for name, value in shown.items()
                if name.startswith("kairos_slo_total{")
                and f'met="{met}"' in name
                and 'target="ttft"' in name
                and 'slo_class="default"' in name
            )
            for met in ("true", "false")
        }
        return found["true"], found["false"]

    before = counted()
    kept = body_of(CHAT, "Once upon", 4, nvext={"router": {"ttft_target": 3_000_000}})
    missed = body_of(CHAT, "Once upon", 4, nvext={"router": {"ttft_target": 1}})
    answers = ask_all(running.url, [(CHAT, kept)] * 3 + [(CHAT, missed)] * 2)
    assert {status for status, _ in answers} == {200}
    deadline = time.monotonic() + 10
    while (now := counted()) != (before[0] + 3, before[1] + 2):
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.2)
    roles = [
        {role for role in ("prefill", "decode") if any(f'role="{role}"' in name for name in shown)}
        for shown in (running.metrics(0), running.metrics(1))
    ]
    assert roles == [{"prefill"}, {"decode"}]
