"""A paused prefill on real servers: nothing that may happen to a request is lost on it.

One long prompt with all the time in the world begins, then a crowd of urgent prompts arrives, each
of which fills the chunk budget: the long one sits out with its KV until the crowd is through.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pd_client import (
    PdClient,
    doomed_jobs,
    long_tail_jobs,
    rounds_of,
    stock_outputs,
    trouble_in,
)

from sglang_kairos.cluster.layout import ClusterSpec
from sglang_kairos.cluster.run import Cluster
from sglang_kairos.cpu.zygote import Zygote

SIZES = ("--chunked-prefill-size", "512", "--max-total-tokens", "49152")
LONG_TOKENS, URGENT_TOKENS, CROWD = 7000, 500, 40
OUTPUT_TOKENS = 6
HOUR_MS = 3_600_000
GATHERING_S = 1.0


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 500) for _ in range(length)]


class Servers:
    """The pair's HTTP side."""

    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession) -> None:
        self.prefill, self.decode = cluster.prefill_urls[0], cluster.decode_urls[0]
        self._port, self._session = cluster.bootstrap_ports[0], session
        self._rooms = random.Random()

    async def call(self, method: str, url: str, **body: Any) -> tuple[int, Any]:
        """Status and decoded answer; status 0 when nobody answers."""
        sent = {"json": body} if method == "POST" else {}
        try:
            async with self._session.request(method, url, **sent) as answer:
                return answer.status, await answer.json(content_type=None)
        except (aiohttp.ClientError, ValueError) as error:
            found = answer.status if isinstance(error, ValueError) else 0
            return found, str(error)

    async def generate(
        self, rid: str, tokens: list[int], ttft_ms: float
    ) -> tuple[tuple[int, Any], tuple[int, Any]]:
        """What prefill and decode answer to one greedy request."""
        body = {
            "rid": rid,
            "input_ids": tokens,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": OUTPUT_TOKENS,
                "ignore_eos": True,
            },
            "ttft_ms": ttft_ms,
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self._port,
            "bootstrap_room": self._rooms.getrandbits(62),
        }
        one, two = await asyncio.gather(
            *(self.call("POST", url + "/generate", **body) for url in (self.prefill, self.decode))
        )
        return one, two

    async def abort(self, url: str, rid: str) -> None:
        await self.call("POST", url + "/abort_request", rid=rid)

    async def kairos(self) -> dict[str, Any]:
        """The prefill server's own report."""
        _, info = await self.call("GET", self.prefill + "/server_info")
        report: dict[str, Any] = info["internal_states"][0]["kairos"]
        return report

    async def until(
        self, what: str, holds: Callable[[dict[str, Any]], bool], timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """Waits until the prefill server's report says so."""
        deadline = time.monotonic() + timeout_s
        while not holds(report := await self.kairos()):
            assert time.monotonic() < deadline, f"never {what}: {report}"
            await asyncio.sleep(0.05)
        return report


class Scene:
    """The long request, paused, and the crowd that made it so."""

    def __init__(self, servers: Servers, seed: int, steps: int) -> None:
        self.servers, self._steps = servers, steps
        self.long_prompt = prompt(LONG_TOKENS, seed)
        self.rid = f"long{seed}"
        self.long = asyncio.create_task(servers.generate(self.rid, self.long_prompt, HOUR_MS))
        self.crowd: list[asyncio.Task[Any]] = []
        self._seed = seed

    async def pause(self, crowd: int) -> bool:
        """Whether the long request is paused; False when it was through before the crowd was in.

        The engine stands still while the crowd gathers: it comes in as one, however fast or slow
        this host is, so that the pause lasts as long as prefilling all of it takes.
        """
        servers = self.servers
        await servers.until("began", lambda r: r["prefill_error"]["samples"] > self._steps)
        await servers.call("POST", servers.prefill + "/pause_generation", mode="in_place")
        self._urge(crowd)
        await asyncio.sleep(GATHERING_S)
        await servers.call("POST", servers.prefill + "/continue_generation")

        def settled(report: dict[str, Any]) -> bool:
            return self.long.done() or report["paused"] == 1

        report = await servers.until("paused", settled)
        return bool(report["paused"] == 1)

    def _urge(self, more: int) -> None:
        for i in range(len(self.crowd), len(self.crowd) + more):
            tokens = prompt(URGENT_TOKENS, 1000 * self._seed + i)
            urgent = self.servers.generate(f"urgent{self._seed}-{i}", tokens, HOUR_MS / 60)
            self.crowd.append(asyncio.create_task(urgent))

    async def crowd_is_served(self) -> None:
        for (status, _), (decode_status, answer) in await asyncio.gather(*self.crowd):
            assert (status, decode_status) == (200, 200), answer
            assert len(answer["output_ids"]) == OUTPUT_TOKENS


@asynccontextmanager
async def paused_scene(cluster: Cluster, seed: int, crowd: int = CROWD) -> AsyncIterator[Scene]:
    limits = aiohttp.ClientTimeout(total=120)
    # SGLang closes idle connections after 5 s: on a slow machine a reused one is closed as we write.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=limits, connector=connector) as session:
        servers = Servers(cluster, session)
        # On a host that stalls the long one can be through first: that is a scene not yet set.
        for _ in range(4):
            steps = (await servers.kairos())["prefill_error"]["samples"]
            scene = Scene(servers, seed, steps)
            if await scene.pause(crowd):
                break
            (_, (status, answer)) = await scene.long
            assert status == 200, answer
            await scene.crowd_is_served()
            seed += 100
        else:
            pytest.fail("the crowd never came before the long request was through")
        try:
            yield scene
        finally:
            # A failed assertion must not leave the next test a busy server.
            left = [task for task in (scene.long, *scene.crowd) if not task.done()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


@pytest.fixture(scope="module")
def cluster(zygote: Zygote, tiny_model: str, out_dir: Path) -> Iterator[Cluster]:
    """A pair with Kairos on; nothing in its logs may speak of trouble at the end."""
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        server_args=SIZES,
        zygote=zygote,
        log_dir=out_dir / "pausing",
    )
    with Cluster(spec) as running:
        yield running
        assert not trouble_in(running.logs)


def play(
    cluster: Cluster, seed: int, act: Callable[[Scene], Awaitable[None]], crowd: int = CROWD
) -> None:
    """Run `act` while the long request is paused; afterwards the pair must be idle and leak-free."""

    async def run() -> None:
        async with paused_scene(cluster, seed, crowd) as scene:
            await act(scene)

    asyncio.run(run())
    client = PdClient(cluster)
    assert client.settles(), "a server did not become idle"
    assert client.kairos()[0]["paused"] == 0


def test_a_paused_request_shows_in_load_reports_and_its_cache_is_not_flushed(
    cluster: Cluster,
) -> None:
    async def act(scene: Scene) -> None:
        servers, most = scene.servers, 0
        status, _ = await servers.call("POST", servers.prefill + "/flush_cache")
        assert status == 400, "a flush would have freed the KV of the paused request"
        while (await servers.kairos())["paused"]:
            _, loads = await servers.call("GET", servers.prefill + "/v1/loads?include=all")
            (load,) = loads["loads"]
            # All others in the queue are short: what exceeds them is the long one's rest. How much
            # of it is left depends on when the crowd came in, at least a chunk.
            shorts = URGENT_TOKENS * (load["queues"]["waiting"] - 1)
            most = max(most, load["num_waiting_uncached_tokens"] - shorts)
        assert 512 < most < LONG_TOKENS
        (_, (status, _)) = await scene.long
        assert status == 200
        await scene.crowd_is_served()

    play(cluster, 1, act, crowd=3 * CROWD)


def test_an_abort_on_prefill_ends_a_paused_request(cluster: Cluster) -> None:
    async def act(scene: Scene) -> None:
        servers = scene.servers
        await servers.abort(servers.prefill, scene.rid)
        await servers.until("released", lambda r: r["paused"] == 0)
        assert not all(task.done() for task in scene.crowd), "released before its turn came"
        await servers.abort(servers.decode, scene.rid)  # as the router does: decode waits otherwise
        (_, answer), _ = await scene.long
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        await scene.crowd_is_served()

    play(cluster, 2, act, crowd=3 * CROWD)


def test_an_abort_on_decode_alone_releases_the_paused_prefill(cluster: Cluster) -> None:
    async def act(scene: Scene) -> None:
        servers = scene.servers
        before = (await servers.kairos())["counters"].get("paused_failures", 0)
        await servers.abort(servers.decode, scene.rid)
        report = await servers.until("released", lambda r: r["paused"] == 0)
        assert report["counters"]["paused_failures"] == before + 1
        assert not all(task.done() for task in scene.crowd), "released before its turn came"
        (status, _), _ = await scene.long
        assert status == 500
        await scene.crowd_is_served()

    play(cluster, 3, act, crowd=3 * CROWD)


@pytest.mark.one_of
@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pausing_the_whole_engine_changes_no_token_of_a_paused_request(
    cluster: Cluster, mode: str
) -> None:
    seed = 4 if mode == "in_place" else 5

    async def alone() -> Any:
        async with aiohttp.ClientSession() as session:
            servers = Servers(cluster, session)
            _, (status, answer) = await servers.generate("alone", prompts[0], HOUR_MS)
            assert status == 200
            return answer["output_ids"]

    async def act(scene: Scene) -> None:
        servers = scene.servers
        await servers.call("POST", servers.prefill + "/pause_generation", mode=mode)
        await asyncio.sleep(0.5)
        assert (await servers.kairos())["paused"] == 1
        status, _ = await servers.call("POST", servers.prefill + "/flush_cache")
        assert status == 400, "a flush would have freed the KV of the paused request"
        await servers.call("POST", servers.prefill + "/continue_generation")
        await scene.crowd_is_served()
        (_, (status, answer)) = await scene.long
        assert status == 200
        outputs.append(answer["output_ids"])
        prompts.append(scene.long_prompt)

    outputs: list[Any] = []
    prompts: list[list[int]] = []
    play(cluster, seed, act, crowd=3 * CROWD)
    assert outputs == [asyncio.run(alone())]


async def abort_everything(cluster: Cluster) -> None:
    async with aiohttp.ClientSession() as session:
        servers = Servers(cluster, session)
        for url in (servers.prefill, servers.decode):
            await servers.call("POST", url + "/abort_request", abort_all=True)


def test_a_running_timeout_reaches_a_paused_request(
    zygote: Zygote, tiny_model: str, out_dir: Path
) -> None:
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        server_args=SIZES,
        prefill_env={"SGLANG_REQ_RUNNING_TIMEOUT": "3.0"},
        zygote=zygote,
        log_dir=out_dir / "pausing-timeout",
    )

    async def act(scene: Scene) -> None:
        report = await scene.servers.until("released", lambda r: r["paused"] == 0)
        assert report["counters"]["paused_aborts"] == 1
        assert not all(task.done() for task in scene.crowd), "released before its turn came"
        await scene.servers.call("POST", scene.servers.decode + "/abort_request", abort_all=True)
        await scene.long
        await asyncio.gather(*scene.crowd)

    with Cluster(spec) as running:
        # On a host that stalls the time may be over before the long one is paused: again, then.
        for seed in (6, 106, 206):
            try:
                play(running, seed, act, crowd=5 * CROWD)
                break
            except AssertionError as error:
                if not str(error).startswith("never paused") or seed == 206:
                    raise
                asyncio.run(abort_everything(running))
                assert PdClient(running).settles(), "a server did not become idle"
        assert not trouble_in(running.logs)


def test_prefill_outlives_a_decode_server_that_dies_while_requests_are_paused(
    zygote: Zygote, tiny_model: str, out_dir: Path
) -> None:
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        server_args=SIZES,
        zygote=zygote,
        log_dir=out_dir / "pausing-dead-decode",
    )

    async def idle(servers: Servers) -> None:
        deadline = time.monotonic() + 60
        while True:
            status, _ = await servers.call("POST", servers.prefill + "/flush_cache")
            if status == 200:
                return
            assert time.monotonic() < deadline, "prefill holds on to a request whose peer is dead"
            await asyncio.sleep(0.5)

    async def act(scene: Scene) -> None:
        os.killpg(decode.process.pid, signal.SIGKILL)
        await idle(scene.servers)
        assert (await scene.servers.kairos())["paused"] == 0
        for task in (scene.long, *scene.crowd):
            task.cancel()

    async def run() -> None:
        async with paused_scene(running, 7) as scene:
            await act(scene)

    with Cluster(spec) as running:
        decode = next(part for part in running.parts if part.name == "d0")
        asyncio.run(run())
        assert not trouble_in({"p0": running.logs["p0"]})


JOBS = long_tail_jobs(70, seed=12)


@pytest.fixture(scope="module")
def stock(zygote: Zygote, tiny_model: str, out_dir: Path) -> list[tuple[int, Any]]:
    """What stock SGLang answers to `JOBS`."""
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        server_args=(*SIZES, "--disable-radix-cache"),
        zygote=zygote,
        log_dir=out_dir / "pausing-stock",
    )
    return stock_outputs(spec, JOBS)


@pytest.mark.parametrize("args", [("--disable-radix-cache",)], ids=["no-radix-cache"])
def test_random_decisions_change_no_token(
    zygote: Zygote,
    tiny_model: str,
    out_dir: Path,
    stock: list[tuple[int, Any]],
    args: tuple[str, ...],
) -> None:
    doomed = doomed_jobs(8, 8, seed=13, span_s=4.0)
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        kairos={"chaos_seed": 5},
        server_args=(*SIZES, *args),
        zygote=zygote,
        log_dir=out_dir / f"pausing-chaos{''.join(args)}",
    )
    rounds, report, _ = rounds_of(
        spec,
        [*JOBS, *doomed],
        lambda prefill, _: prefill["pauses"] >= 10,
    )
    assert all(answers[: len(JOBS)] == stock for answers in rounds)
    assert report["counters"]["pauses"] >= 10 and report["paused"] == 0


@pytest.mark.parametrize("kairos", [{"chaos_seed": 5}], ids=["random"])
def test_paused_prefills_find_the_kv_for_their_rest_while_transfers_hold_all_other(
    zygote: Zygote,
    tiny_model: str,
    out_dir: Path,
    tmp_path: Path,
    stock: list[tuple[int, Any]],
    kairos: dict[str, Any],
) -> None:
    until = tmp_path / "go"
    spec = ClusterSpec(
        model_path=tiny_model,
        router="none",
        kairos=kairos,
        launcher="held_server",
        prefill_args=("--chunked-prefill-size", "128", "--max-total-tokens", "6000"),
        prefill_env={"HELD_UNTIL": str(until)},
        zygote=zygote,
        log_dir=out_dir / f"pausing-little-kv-{''.join(kairos)}",
    )
    # The longest begin alone; the others, many times what KV there is, find them half done.
    few = JOBS[:40]
    longest = sorted(few, key=lambda job: -len(job.prompt))[:3]
    crowd = [dataclasses.replace(job, at_s=0.0 if job in longest else 0.1) for job in few]
    with Cluster(spec) as running, ThreadPoolExecutor(1) as pool:
        client = PdClient(running)
        sent = pool.submit(client.run, crowd)
        try:
            full = nobody_begins_any_more(client, sent)
        finally:
            until.touch()
        answers = sent.result()
        assert answers == stock[: len(few)]
        assert client.settles(), "a server did not become idle"
        assert not trouble_in(running.logs)
    assert full["paused"] == 0, "whoever has begun comes to its end without a single transfer"
    assert full["counters"]["pauses"] >= 1


def nobody_begins_any_more(client: PdClient, sent: Future[Any]) -> dict[str, Any]:
    """The prefill server's report once it has run steps and runs no more."""
    deadline, last = time.monotonic() + 60, {}
    quiet_since = time.monotonic()
    while time.monotonic() < deadline and not sent.done():
        report = client.kairos()[0]
        if report["steps"] != last.get("steps") or report["prefill_error"]["samples"] < 10:
            quiet_since = time.monotonic()
        last = report
        if time.monotonic() - quiet_since > 2.0:
            return report
        time.sleep(0.2)
    pytest.fail(f"it never came to rest: {last}")
