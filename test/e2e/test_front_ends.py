"""Every way to say an SLO through every front end: what arrives at real servers, and what it changes.

docs/front_ends.md holds the table. Each column that can be run is measured and must be as written
there; with KAIROS_WRITE_TABLES=1 it is written. `make test-front-ends` has the gateways that are no
part of the development environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from front_client import BLOCKER, CHUNK, Front, body_of
from pd_client import PdClient, trouble_in

from helpers import gateways
from helpers.front_ends import (
    AGE_MS,
    CHAT,
    CLASSES,
    COMPLETIONS,
    DEFAULT_MS,
    DEFAULT_TPOT_MS,
    FRONT_ENDS,
    GENERATE,
    LITELLM,
    PAGE,
    PRIORITY_CLASSES,
    ROUTER,
    SGLANG_PD,
    SGLANG_PLAIN,
    SIDECAR,
    SMG_PD,
    SMG_PLAIN,
    STRAIGHT,
    WAYS,
    FrontEnd,
    Table,
    cell,
    renew,
    table_of,
)
from helpers.sidecar import sidecar
from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote


@pytest.fixture(scope="module")
def cluster(
    zygote: Zygote, tiny_model: str, out_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """One pair and Kairos' router for all front ends, with classes, priorities and all ages on."""
    classes = tmp_path_factory.mktemp("front-ends") / "classes.json"
    classes.write_text(json.dumps(CLASSES))
    settings = {
        "ttft_ms": DEFAULT_MS,
        "tpot_ms": DEFAULT_TPOT_MS,
        "slo_classes": str(classes),
        "priority_classes": PRIORITY_CLASSES,
        "age_headers": "x-request-start,traceparent",
        "max_age_ms": 2 * AGE_MS,
    }
    words = [
        word
        for name, value in settings.items()
        for word in ("--kairos-" + name.replace("_", "-"), str(value))
    ]
    spec = ClusterSpec(
        model_path=tiny_model,
        kairos=settings,
        server_args=("--served-model-name", "m"),  # smg knows workers by their models' names
        router_args=tuple(words),
        prefill_args=("--chunked-prefill-size", str(CHUNK)),
        log_dir=out_dir / "front-ends",
        zygote=zygote,
    )
    with Cluster(spec) as running:
        yield running
        assert running.dead() is None
        assert not trouble_in(running.logs)


Start = Callable[[Cluster, Path], contextlib.AbstractContextManager[str]]
STARTS: dict[FrontEnd, tuple[str, Start]] = {
    STRAIGHT: ("", lambda cluster, _: contextlib.nullcontext("")),
    ROUTER: ("", lambda cluster, _: contextlib.nullcontext(cluster.url)),
    SIDECAR: (
        "",
        lambda cluster, _: sidecar(
            cluster.prefill_urls[0], cluster.bootstrap_ports[0], cluster.decode_urls[0]
        ),
    ),
    SGLANG_PD: ("", lambda cluster, log: gateways.sglang_router(cluster, log, pd=True)),
    SGLANG_PLAIN: ("", lambda cluster, log: gateways.sglang_router(cluster, log, pd=False)),
    SMG_PD: ("smg", lambda cluster, log: gateways.smg(cluster, log, pd=True)),
    SMG_PLAIN: ("smg", lambda cluster, log: gateways.smg(cluster, log, pd=False)),
    LITELLM: ("litellm", gateways.litellm),
}


# What `make test` has the time for: the rest is for `make test-front-ends`.
QUICK = (STRAIGHT, ROUTER, SIDECAR, SGLANG_PD)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(front_end, marks=() if front_end in QUICK else pytest.mark.slow)
        for front_end in STARTS
    ],
    ids=lambda front_end: front_end.title,
)
def front(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Front]:
    """A front end that runs."""
    front_end: FrontEnd = request.param
    package, start = STARTS[front_end]
    if package and not gateways.program(package).exists():
        pytest.skip(f"{package} is not installed: make test-front-ends does it")
    log = Path(cluster.logs["router"]).with_name(f"{FRONT_ENDS.index(front_end)}-gateway.log")
    with start(cluster, log) as url:
        front = Front(front_end, cluster, url)
        front.waits_until_it_serves()
        yield front


def test_what_arrives_is_what_the_page_says_and_changes_the_order(front: Front) -> None:
    """The loosest is sent first; first tokens come by deadline."""
    title, paths = front.front_end.title, front.front_end.paths
    found = {way: {path: front.arrives(way, path) for path in paths} for way in WAYS}
    column = {way.name: cell(front.front_end, found[way]) for way in WAYS}
    if os.environ.get("KAIROS_WRITE_TABLES"):
        renew(PAGE, title, column)
    assert column == Table.read(table_of(PAGE.read_text("utf-8"))).cells[title]

    # One endpoint for all: gateways hold the first events of one longer than those of another.
    due = sorted((way for way in WAYS if found[way][COMPLETIONS]), key=lambda way: way.due_ms)
    moved: dict[str, int] | None = None
    for blockers in (1, 2, 4, 4):  # how long they queue depends on the machine
        order = asyncio.run(front.order(due[::-1], blockers))
        if order is not None:
            # A decode step or two apart they may change places; as sent, all would.
            places = {way.name: order.index(way) - place for place, way in enumerate(due)}
            moved = {name: by for name, by in places.items() if abs(by) > 2}
            if not moved:
                break
    assert moved is not None, "the queue was empty before all were there"
    assert moved == {}


def test_an_slo_said_to_a_front_end_pauses_a_prefill(cluster: Cluster) -> None:
    """A long prompt without a target makes way at a chunk's end, and both are answered."""
    front = Front(ROUTER, cluster, cluster.url)

    async def run() -> list[str]:
        first: list[str] = []
        begun = front.counted("requests")

        def send(name: str, tokens: int, more: dict[str, Any]) -> asyncio.Task[int]:
            ids = [random.randrange(10, 500) for _ in range(tokens)]
            body = {"prompt": ids, "model": "m", "max_tokens": 1, "stream": True, **more}
            return asyncio.create_task(
                front.post(COMPLETIONS, body, None, lambda: first.append(name))
            )

        going = [send("long", BLOCKER, {})]
        while await asyncio.to_thread(front.counted, "requests") == begun:
            await asyncio.sleep(0.02)
        # Each fills a step: beside a smaller one the long prompt would go on.
        urgent = {"nvext": {"router": {"ttft_target": 60_000}}}
        going += [send("urgent", CHUNK, urgent) for _ in range(6)]
        assert await asyncio.gather(*going) == [200] * len(going)
        return first

    for _ in range(4):  # they may come too early or too late, as the machine has it
        pauses = front.counted("pauses")
        order = asyncio.run(run())
        if front.counted("pauses") > pauses and order[-1] == "long":
            return
    pytest.fail("nobody was paused")


@pytest.mark.slow
def test_a_tpot_said_to_a_front_end_packs_decode_steps(cluster: Cluster) -> None:
    """Those with a tight target run on, some of the others sit steps out."""
    front = Front(ROUTER, cluster, cluster.url)
    tight = {"x-slo-tpot-ms": f"{PdClient(cluster).contested_tpot_ms():.3f}"}

    async def run() -> None:
        body = body_of(GENERATE, "Once upon", 200)
        body["sampling_params"]["ignore_eos"] = True
        sent = [front.post(GENERATE, body, tight if i % 4 == 0 else None) for i in range(32)]
        assert await asyncio.gather(*sent) == [200] * 32

    before = front.reports()[1]["counters"].get("parked", 0)
    for _ in range(4):  # it depends on how they overlap, hence on the machine
        asyncio.run(run())
        if front.reports()[1]["counters"].get("parked", 0) > before:
            return
    pytest.fail("nobody was parked")


@pytest.mark.slow
def test_a_target_said_to_a_front_end_decides_whose_kv_is_reserved(
    zygote: Zygote, tiny_model: str, out_dir: Path
) -> None:
    """Decode has room for nobody more: the tightest of three headers gets it first, then the next."""
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        kairos=True,
        decode_args=("--max-total-tokens", "4096"),
        zygote=zygote,
        log_dir=out_dir / "front-ends-kv",
    )
    with Cluster(spec) as cluster:
        pair = cluster.prefill_urls[0], cluster.bootstrap_ports[0], cluster.decode_urls[0]
        with sidecar(*pair) as url:
            first = asyncio.run(_kv_order(Front(SIDECAR, cluster, url)))
        assert first == ["tight", "middle", "loose"]
        assert PdClient(cluster).settles()
        assert not trouble_in(cluster.logs)


async def _kv_order(front: Front) -> list[str]:
    """Sent loosest first, while two others hold decode's memory: names by their first tokens."""
    first: list[str] = []

    def send(name: str, tokens: int, ttft_ms: float) -> asyncio.Task[int]:
        ids = [random.randrange(10, 500) for _ in range(1400)]
        body = {"prompt": ids, "model": "m", "max_tokens": tokens, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        headers = {"x-llm-d-slo-ttft-ms": str(ttft_ms)}
        return asyncio.create_task(
            front.post(COMPLETIONS, body, headers, lambda: first.append(name))
        )

    going = [send(f"early{i}", 900, 1000) for i in range(2)]
    while len(first) < 2:
        await asyncio.sleep(0.02)
    for name, ttft_ms in (("loose", 3_000_000), ("middle", 300_000), ("tight", 30_000)):
        going.append(send(name, 40, ttft_ms))
        await asyncio.sleep(0.3)
    assert len(first) == 2, "decode had room: no pressure, nothing is proven"
    assert await asyncio.gather(*going) == [200] * len(going)
    return first[2:]


@pytest.mark.slow
def test_a_model_name_of_litellm_stands_for_a_class(cluster: Cluster) -> None:
    if not gateways.program("litellm").exists():
        pytest.skip("litellm is not installed: make test-front-ends does it")
    log = Path(cluster.logs["router"]).with_name("model-name-gateway.log")
    with gateways.litellm(cluster, log) as url:
        front = Front(LITELLM, cluster, url)
        body = body_of(CHAT, "Once upon", 1) | {"model": "m-in-class"}
        assert asyncio.run(front.post(CHAT, body)) == 200
        for report in front.reports():
            assert report["last_request"]["name"] == "by-model"
            assert report["last_request"]["ttft_ms"] == CLASSES["by-model"]["ttft_ms"]
