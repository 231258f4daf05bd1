"""Servers found as Kubernetes pods: ready ones of a label selector join, others leave.

For each role the pods are listed once and then watched from that version on. A version that the API
server has forgotten (410) ends in a new list, and so does every broken watch. A pod that is deleted or no
longer ready gets no new requests. It leaves when its last one has ended, as if removed by
``/admin/servers``. Ready again, it joins again. Servers of the command line stay, whatever pods do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from sglang_kairos.router.control.admin import Admin
from sglang_kairos.router.fleet.servers import DecodeServer, PrefillServer
from sglang_kairos.router.options import OptionError, Pods

logger = logging.getLogger(__name__)

# As upstream's router reads it.
PORT_ANNOTATION = "sglang.ai/bootstrap-port"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_LIST_S = 30.0
# The API server ends a watch after this long; one that says nothing much longer is broken.
_WATCH_S = 240
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0


class ApiServer:
    """Where the cluster's API is and how to be let in; by default as every pod is told."""

    def __init__(self, url: str = "", account: Path = _ACCOUNT) -> None:
        self._account = account
        self.url = url or self._in_cluster()
        ca = account / "ca.crt"
        self.verify: ssl.SSLContext | bool = True
        if ca.exists():
            self.verify = ssl.create_default_context(cafile=str(ca))

    def headers(self) -> dict[str, str]:
        """With the token as it is now: it is replaced from time to time."""
        try:
            return {"authorization": f"Bearer {(self._account / 'token').read_text().strip()}"}
        except OSError:
            return {}

    @staticmethod
    def _in_cluster() -> str:
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        if not host:
            raise OptionError(
                "--service-discovery: only inside a cluster (KUBERNETES_SERVICE_HOST)"
            )
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        return f"https://{f'[{host}]' if ':' in host else host}:{port}"


class _Stale(Exception):
    """The version to watch from is forgotten: list again."""


class Discovery:
    """One task per role, from `start` to `stop`."""

    def __init__(self, pods: Pods, admin: Admin, api: ApiServer | None) -> None:
        self._admin, self._api = admin, api or ApiServer()
        self._port = pods.port
        self._selectors = {"prefill": pods.prefill, "decode": pods.decode}
        space = f"/namespaces/{pods.namespace}" if pods.namespace else ""
        self._url = f"{self._api.url}/api/v1{space}/pods"
        self._found: dict[str, dict[str, PrefillServer | DecodeServer]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look for pods."""
        self._tasks = [asyncio.create_task(self._follow(role)) for role in self._selectors]

    async def stop(self) -> None:
        """Look no more; servers stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, role: str) -> None:
        back_off_s, said = _BACK_OFF_S, ""
        connector = aiohttp.TCPConnector(ssl=self._api.verify)
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                try:
                    pods, version = await self._list(session, role)
                    self._settle(role, pods)
                    back_off_s, said = _BACK_OFF_S, ""
                    while True:
                        version = await self._watch(session, role, pods, version)
                except _Stale:
                    pass
                except Exception as error:  # this loop must outlive whatever the API server answers
                    if said != (text := f"{type(error).__name__}: {error}"):
                        logger.warning("looking for %s pods: %s; trying again", role, text)
                    said = text
                await asyncio.sleep(back_off_s * random.uniform(0.8, 1.2))
                back_off_s = min(2.0 * back_off_s, _LONGEST_BACK_OFF_S)

    async def _list(
        self, session: aiohttp.ClientSession, role: str
    ) -> tuple[dict[str, Mapping[str, Any]], str]:
        """The pods of a role by id, and the version they are of."""
        async with session.get(
            self._url,
            params={"labelSelector": self._selectors[role]},
            headers=self._api.headers(),
            timeout=aiohttp.ClientTimeout(total=_LIST_S),
        ) as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                raise OSError(f"HTTP {response.status} {_message(answer)}")
        return {_id(pod): pod for pod in answer["items"]}, answer["metadata"]["resourceVersion"]

    async def _watch(
        self,
        session: aiohttp.ClientSession,
        role: str,
        pods: dict[str, Mapping[str, Any]],
        version: str,
    ) -> str:
        """Follow changes to `pods` until the API server ends the watch; the version reached."""
        async with session.get(
            self._url,
            params={
                "labelSelector": self._selectors[role],
                "watch": "1",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(_WATCH_S),
            },
            headers=self._api.headers(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_LIST_S, sock_read=_WATCH_S * 2),
        ) as response:
            if response.status == 410:
                raise _Stale
            if response.status != 200:
                raise OSError(f"HTTP {response.status} {(await response.text())[:200]}")
            changed = False
            async for event in _events(response):
                kind, pod = event.get("type"), event.get("object") or {}
                if kind == "ERROR":
                    if pod.get("code") == 410:
                        raise _Stale
                    raise OSError(_message(pod))
                version = pod["metadata"]["resourceVersion"]
                changed = True
                if kind == "DELETED":
                    pods.pop(_id(pod), None)
                elif kind in ("ADDED", "MODIFIED"):
                    pods[_id(pod)] = pod
                else:
                    continue
                self._settle(role, pods)
            if not changed:
                # One that ends at once, again and again, must not be asked in a tight loop.
                await asyncio.sleep(_BACK_OFF_S)
        return version

    def _settle(self, role: str, pods: Mapping[str, Mapping[str, Any]]) -> None:
        """Let the fleet's servers of a role be those of its ready pods."""
        wanted = dict(
            found for pod in pods.values() if (found := address(pod, self._port)) is not None
        )
        mine = self._found.setdefault(role, {})
        for url in [url for url in mine if url not in wanted]:
            logger.info("%s pod %s leaves", role, url)
            self._admin.dismiss(mine.pop(url))
        for url, port in wanted.items():
            if url not in mine:
                server = self._admin.enrol(role, url, port if role == "prefill" else None)
                if server is None:
                    logger.warning("%s pod %s: a server of that URL is there already", role, url)
                else:
                    logger.info("%s pod %s joins", role, url)
                    mine[url] = server


def address(pod: Mapping[str, Any], port: int) -> tuple[str, int | None] | None:
    """A pod's URL and bootstrap port (None: as the server says), or None unless it is ready."""
    meta, status = pod.get("metadata") or {}, pod.get("status") or {}
    ready = any(
        one.get("type") == "Ready" and one.get("status") == "True"
        for one in status.get("conditions") or ()
    )
    host = status.get("podIP")
    if not ready or not host or status.get("phase") != "Running" or meta.get("deletionTimestamp"):
        return None
    given = str((meta.get("annotations") or {}).get(PORT_ANNOTATION, ""))
    bootstrap = int(given) if given.isascii() and given.isdigit() else 0
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return url, bootstrap if 1 <= bootstrap <= 65535 else None


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of a watch, one JSON object a line, however long the lines are."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield orjson.loads(line)


def _id(pod: Mapping[str, Any]) -> str:
    meta = pod["metadata"]
    return str(meta.get("uid") or f"{meta.get('namespace')}/{meta.get('name')}")


def _message(answer: Any) -> str:
    return str(answer.get("message", answer) if isinstance(answer, Mapping) else answer)[:200]
