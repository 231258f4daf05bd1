"""Servers that are Kubernetes pods, with a fake API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from helpers.fake_pd import bench, until
from sglang_kairos.router.control import discovery
from sglang_kairos.router.control.discovery import PORT_ANNOTATION, ApiServer, Discovery, address
from sglang_kairos.router.options import OptionError, Pods

pytestmark = [pytest.mark.anyio, pytest.mark.fake_clock]

PODS = Pods("role=prefill", "role=decode", 30000, "llm")


def pod(name: str, ip: str, *, ready: bool = True, **meta: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": name, "resourceVersion": "1", **meta},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


class Api:
    """Pods by role, and open watches; `forget` ends them with 410, `drop` without a word."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
        self.watches: dict[str, list[asyncio.Queue[bytes | None]]] = {"prefill": [], "decode": []}
        self.asked: list[dict[str, str]] = []
        self.tokens: set[str] = set()
        self.failing = 0
        self.version = 10

    def change(self, role: str, kind: str, found: dict[str, Any]) -> None:
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        if kind == "DELETED":
            self.pods[role].pop(found["metadata"]["uid"], None)
        else:
            self.pods[role][found["metadata"]["uid"]] = found
        self.say(role, {"type": kind, "object": found})

    def say(self, role: str, event: dict[str, Any]) -> None:
        for queue in self.watches[role]:
            queue.put_nowait(json.dumps(event).encode() + b"\n")
        if event["type"] == "ERROR":
            self.watches[role].clear()  # whoever is told leaves

    def drop(self, role: str) -> None:
        for queue in self.watches[role]:
            queue.put_nowait(None)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.tokens.add(request.headers.get("authorization", ""))
        self.asked.append(dict(request.query))
        if self.failing:
            self.failing -= 1
            return web.json_response({"message": "pods is forbidden"}, status=403)
        role = request.query["labelSelector"].removeprefix("role=")
        if request.query.get("watch") != "1":
            items, version = list(self.pods[role].values()), str(self.version)
            return web.json_response({"items": items, "metadata": {"resourceVersion": version}})
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.watches[role].append(queue)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while (line := await queue.get()) is not None:
                # In two pieces, as a network may.
                await response.write(line[:7])
                await response.write(line[7:])
        finally:
            if queue in self.watches[role]:
                self.watches[role].remove(queue)
        return response


@contextlib.asynccontextmanager
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """The API server and a router whose servers all are pods."""
    monkeypatch.setattr(discovery, "_BACK_OFF_S", 0.01)
    (tmp_path / "token").write_text("secret\n")
    api = Api()
    app = web.Application()
    app.router.add_get("/api/v1/namespaces/llm/pods", api.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    async with bench() as b:
        for server in b.router.fleet.servers:
            b.router._poller.drop(server)
            b.router.fleet.remove(server)
        found = Discovery(PODS, b.router._admin, ApiServer(f"http://{host}:{port}", tmp_path))
        yield api, found, b.router.fleet
        await found.stop()
    await runner.cleanup()


async def test_pods_join_when_ready_leave_when_not_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, monkeypatch) as (api, found, fleet):
        here = pod("p0", "10.0.0.1", annotations={PORT_ANNOTATION: "9001"})
        api.pods["prefill"] = {"p0": here, "p1": pod("p1", "10.0.0.2", ready=False)}
        found.start()
        await until(lambda: [s.url for s in fleet.prefills] == ["http://10.0.0.1:30000"])
        assert fleet.prefills[0].bootstrap_port == 9001
        assert api.tokens == {"Bearer secret"}
        await until(lambda: bool(api.watches["prefill"] and api.watches["decode"]))
        api.change("decode", "ADDED", pod("d0", "fd00::1"))
        api.change("prefill", "MODIFIED", pod("p1", "10.0.0.2"))
        await until(lambda: len(fleet.servers) == 3)
        assert fleet.decodes[0].url == "http://[fd00::1]:30000"
        # One with a request in flight is drained, and taken back as it was.
        busy = fleet.prefills[1]
        busy.attempts.add(object())  # type: ignore[arg-type]
        api.change("prefill", "MODIFIED", pod("p1", "10.0.0.2", ready=False))
        await until(lambda: busy.draining)
        api.change("prefill", "MODIFIED", pod("p1", "10.0.0.2"))
        await until(lambda: not busy.draining)
        assert fleet.prefills[1] is busy
        busy.attempts.clear()
        api.change("prefill", "DELETED", pod("p1", "10.0.0.2"))
        api.change("prefill", "MODIFIED", pod("p0", "10.0.0.1", deletionTimestamp="now"))
        await until(lambda: not fleet.prefills)


async def test_a_broken_or_forgotten_watch_ends_in_a_new_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, monkeypatch) as (api, found, fleet):
        api.failing = 3  # refused at first: tried again
        found.start()
        await until(lambda: bool(api.watches["prefill"] and api.watches["decode"]))
        # What happened while nobody watched is seen by the next list.
        api.pods["decode"]["d0"] = pod("d0", "10.0.0.3")
        api.say("decode", {"type": "ERROR", "object": {"code": 410, "message": "too old"}})
        await until(lambda: len(fleet.decodes) == 1 and bool(api.watches["decode"]))
        api.pods["decode"] = {"d1": pod("d1", "10.0.0.4")}
        api.say("decode", {"type": "ERROR", "object": {"code": 500, "message": "odd"}})
        await until(lambda: [s.url for s in fleet.decodes] == ["http://10.0.0.4:30000"])
        # A watch that has run its time goes on from the version it has reached.
        await until(lambda: bool(api.watches["decode"]))
        bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "77"}}}
        api.say("decode", bookmark)
        api.drop("decode")
        await until(lambda: any(one.get("resourceVersion") == "77" for one in api.asked))
        assert [s.url for s in fleet.decodes] == ["http://10.0.0.4:30000"]


async def test_servers_of_the_command_line_are_not_a_pods_to_take_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, monkeypatch) as (api, found, fleet):
        fixed = fleet.add_decode("http://10.0.0.9:30000")
        api.pods["decode"]["d9"] = pod("d9", "10.0.0.9")
        found.start()
        await until(lambda: bool(api.watches["decode"]))
        api.change("decode", "DELETED", pod("d9", "10.0.0.9"))
        api.change("decode", "ADDED", pod("d0", "10.0.0.3"))
        await until(lambda: len(fleet.decodes) == 2)
        assert fleet.decodes[0] is fixed and not fixed.draining


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (pod("a", "1.2.3.4"), ("http://1.2.3.4:30000", None)),
        (pod("a", "1.2.3.4", annotations={PORT_ANNOTATION: "x"}), ("http://1.2.3.4:30000", None)),
        (pod("a", "1.2.3.4", annotations={PORT_ANNOTATION: "0"}), ("http://1.2.3.4:30000", None)),
        (pod("a", "1.2.3.4", annotations=None), ("http://1.2.3.4:30000", None)),
        (pod("a", ""), None),
        (pod("a", "1.2.3.4", ready=False), None),
        (pod("a", "1.2.3.4", deletionTimestamp="2026"), None),
        ({"metadata": {"uid": "a"}}, None),
        ({"metadata": {"uid": "a"}, "status": {"phase": "Pending", "conditions": None}}, None),
    ],
)
def test_a_pod_is_a_server_when_it_is_ready(found: Any, expected: Any) -> None:
    assert address(found, 30000) == expected


def test_outside_a_cluster_there_is_no_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(OptionError, match="--service-discovery"):
        ApiServer()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    assert ApiServer().url == "https://[fd00::1]:6443"
