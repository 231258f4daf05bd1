"""Real servers of an experiment: how they are started, placed on cores, emptied and asked."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from sglang_kairos.cluster.run import Cluster, ClusterSpec
from sglang_kairos.cpu import runtime as cpu_runtime
from sglang_kairos.local_http import open_url

Say = Callable[[str], None]
KAIROS = "kairos"
CHUNK_TOKENS = 512
# KV for all that can wait at once: the experiments are about order, not about memory.
KV_TOKENS = 200_000
TIMEOUT_S = 90.0
# Otherwise each health check of the router makes both servers generate a token.
QUIET = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
_BEGUN = time.monotonic()
_cores: set[int] = set()  # every core this process may use, before it was confined


def narrator(prefix: str) -> Say:
    """Returns what prints a line with the seconds since the start."""

    def say(line: str) -> None:
        print(f"{time.monotonic() - _BEGUN:5.0f} s {prefix} {line}", flush=True)

    return say


def on_cpu() -> bool:
    return cpu_runtime.decide().active


def platform() -> str:
    """Returns what the figures are measured on."""
    cores = len(os.sched_getaffinity(0) | _cores)
    return f"CPU ({cores} cores)" if on_cpu() else "GPU"


@contextmanager
def start_method(given: argparse.Namespace) -> Iterator[Any]:
    """A zygote to fork servers from, or None to start each anew. On a CPU they are forked."""
    if (given.start or ("fork" if on_cpu() else "spawn")) == "spawn":
        yield None
        return
    from sglang_kairos.cluster.run import quiet_zygote

    narrator("[setup]")("importing SGLang once for all servers (about 15 s)")
    with quiet_zygote(given.out / "zygote.log", given.router) as zygote:
        yield zygote


def pair_spec(
    policy: str, given: argparse.Namespace, zygote: Any, say: Say, name: str
) -> ClusterSpec:
    """One prefill and one decode server; policies differ in scheduling and in nothing else."""
    return ClusterSpec(
        model_path=given.model_path,
        router=given.router,
        launcher=given.launcher,
        kairos=policy == KAIROS,
        server_args=[
            *("--chunked-prefill-size", str(CHUNK_TOKENS)),
            *("--max-total-tokens", str(KV_TOKENS)),
        ],
        prefill_args=[] if policy == KAIROS else ["--schedule-policy", policy],
        env=QUIET,
        log_dir=given.out / "logs" / name,
        stop_grace_s=5.0,
        ready_timeout_s=180.0,
        zygote=zygote,
        say=say,
    )


def schedulers(cluster: Cluster, role: str = "") -> dict[str, psutil.Process]:
    """Returns the scheduler processes of the parts whose name begins so, by the part's name."""
    found: dict[str, psutil.Process] = {}
    for part in cluster.parts:
        root = psutil.Process(part.process.pid)
        for process in (root, *root.children(recursive=True)):
            if part.name.startswith(role) and "scheduler" in " ".join(process.cmdline()):
                found[part.name] = process
    return found


def cpu_s(processes: dict[str, psutil.Process]) -> float:
    """Returns the CPU seconds that they have used."""
    return float(sum(sum(process.cpu_times()[:2]) for process in processes.values()))


def separate(cluster: Cluster, role: str = "p") -> None:
    """On a CPU: schedulers of this role (p, d) get a core for themselves, the rest the others.

    A decode scheduler with work to do never sleeps. Without this the operating system would decide
    who slows down whom, instead of the scheduler under test.
    """
    _cores.update(os.sched_getaffinity(0))
    if len(_cores) < 2 or not on_cpu():
        return
    first, *others = sorted(_cores)
    os.sched_setaffinity(0, others)
    alone = {process.pid for process in schedulers(cluster, role).values()}
    for part in cluster.parts:
        root = psutil.Process(part.process.pid)
        for process in (root, *root.children(recursive=True)):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, [first] if process.pid in alone else others)


def forget(cluster: Cluster) -> None:
    """Empties the servers' prefix caches, once they are through with what earlier runs left."""
    deadline = time.monotonic() + TIMEOUT_S
    for url in (*cluster.prefill_urls, *cluster.decode_urls):
        ask = urllib.request.Request(url + "/flush_cache", method="POST")
        while True:
            try:
                with open_url(ask, timeout=10):
                    break
            except urllib.error.HTTPError as error:  # 400: busy
                if error.code != 400 or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def prefill_busy_s(cluster: Cluster) -> float:
    """Returns the seconds that prefill servers have spent in prefill steps, by SGLang's counter.

    v0.5.16 has none. There it is the CPU time of their schedulers, which sleep while idle. On a GPU
    that says nothing: NaN.
    """
    loads: list[dict[str, Any]] = []
    for base in cluster.prefill_urls:
        loads += _get(base + "/v1/loads?include=core")["loads"]
    if all("total_prefill_busy_us" in load for load in loads):
        return sum(load["total_prefill_busy_us"] for load in loads) / 1e6
    return cpu_s(schedulers(cluster, "p")) if on_cpu() else math.nan


def server_info(url: str) -> dict[str, Any]:
    """Returns a server's arguments and, on the same level, the state of its scheduler."""
    found = _get(url + "/server_info")
    return {**found, **found["internal_states"][0]}


def kairos_reports(cluster: Cluster) -> dict[str, Any]:
    """Returns what Kairos tells of itself on each server: predictors, their error, counters."""
    infos = [server_info(url) for url in (*cluster.prefill_urls, *cluster.decode_urls)]
    return {f"kairos_{i['kairos']['mode']}": i["kairos"] for i in infos if "kairos" in i}


def _get(url: str) -> dict[str, Any]:
    with open_url(url, timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
