"""A run of the GPU benchmark: its budget, its models, how servers are started, what was found."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from benchmark.gpu.shape import IDENTITY, write_shape
from benchmark.harness import driver, servers
from benchmark.harness.experiment import alternated
from sglang_kairos.calibrate.server import FAKE_HOST
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.cpu.tiny_model import make_tiny_model
from sglang_kairos.loads import traces
from sglang_kairos.loads.replay import Result, failures
from sglang_kairos.reports import report

SYSTEMS = ("stock", "kairos")
# What takes made-up KV, or sends its KV nowhere.
ALONE = {"bootstrap_host": FAKE_HOST, "bootstrap_room": 0}


class GpuSession:
    """What all parts share: settings, models, results so far."""

    def __init__(
        self, given: argparse.Namespace, zygote: Any, save: Callable[[GpuSession], None]
    ) -> None:
        self.given, self.zygote = given, zygote
        self.save = lambda: save(self)
        self.dry = bool(given.dry_run)
        self.say: servers.Say = print
        self._ends_s = time.monotonic() + given.budget_s
        self.runs: list[report.Run] = []
        self.steady: list[dict[str, Any]] = []
        self.identity: dict[str, dict[str, int]] = {}
        self.skipped: dict[str, str] = {}
        self.took_s: dict[str, float] = {}

    def left_s(self) -> float:
        """Returns seconds of the budget."""
        return self._ends_s - time.monotonic()

    def platform(self) -> str:
        if self.dry:
            return servers.platform()
        import torch

        return f"1 × {torch.cuda.get_device_name()}, torch {torch.__version__}"

    def flags(self) -> list[str]:
        """Returns the same for both systems: CUDA graphs and overlap stay on."""
        flags = ["--max-total-tokens", str(self.given.kv_tokens)]
        if self.dry:
            return [*flags, "--chunked-prefill-size", "512"]
        flags += ["--attention-backend", "flashinfer", "--load-format", "dummy"]
        # Several servers share the GPU; the KV is bounded by tokens, the share only must not be less.
        flags += ["--mem-fraction-static", "0.85", "--grammar-backend", "none"]
        return [*flags, "--random-seed", "1", "--watchdog-timeout", "900"]

    def model(self, layers: int | None = None) -> str:
        """Returns a folder to serve; empty for the tiny model of a dry run."""
        folder = self.given.out / "models"
        return "" if self.dry else str(write_shape(folder, self.given.shape, layers))

    def spec(self, name: str, system: str, kairos: Any = None, **changes: Any) -> ClusterSpec:
        """Returns a cluster of one system; `changes` are ClusterSpec's."""
        settings: dict[str, Any] = {
            "model_path": self.model(),
            "router": "none",
            "kairos": system != "stock" if kairos is None else kairos,
            "server_args": self.flags(),
            "env": servers.QUIET,
            "log_dir": self.given.out / "logs" / f"{name}-{system}",
            "stop_grace_s": 0.0 if self.dry else 5.0,
            "ready_timeout_s": 420.0,
            "zygote": self.zygote,
        }
        return ClusterSpec(**{**settings, **changes})

    def pair_spec(self, name: str, system: str, kairos: Any = None) -> ClusterSpec:
        """Returns a pair and its router, small enough for two of them on a GPU."""
        changes: dict[str, Any] = {"router": "kairos"}
        models = self.given.out / "models"
        if self.dry and name == "identity":
            changes["model_path"] = str(make_tiny_model(models / "identity"))
        if not self.dry:
            changes["model_path"] = self.model(self.given.pd_layers)
            flags = [*self.flags(), "--disaggregation-transfer-backend", self.given.transfer]
            if name == "identity":
                # Real (random) weights whose tokens vary, and kernels that do not depend on the batch.
                changes["model_path"] = str(make_tiny_model(models / "identity", IDENTITY))
                flags[flags.index("--load-format") + 1] = "auto"
                flags += ["--dtype", "bfloat16", "--enable-deterministic-inference"]
            changes["server_args"] = flags
        return self.spec(name, system, kairos, **changes)

    @contextmanager
    def both(self, specs: dict[str, ClusterSpec]) -> Iterator[dict[str, Cluster]]:
        """Yields all clusters, started at the same time."""
        clusters = {name: Cluster(spec) for name, spec in specs.items()}
        begun = time.monotonic()
        try:
            with ThreadPoolExecutor(len(clusters)) as pool:
                for done in [pool.submit(cluster.start) for cluster in clusters.values()]:
                    done.result()
            self.say(f"{', '.join(clusters)} ready after {time.monotonic() - begun:.0f} s")
            yield clusters
        finally:
            with ThreadPoolExecutor(len(clusters)) as pool:
                list(pool.map(Cluster.stop, clusters.values()))

    def turns(self) -> Iterator[tuple[int, str]]:
        """Yields round and system, alternated."""
        for turn, systems in enumerate(alternated(SYSTEMS, self.given.rounds)):
            for system in systems:
                yield turn, system

    def send(
        self,
        cluster: Cluster,
        rows: Sequence[traces.Request],
        *targets: float,
        abreast: int | None = None,
    ) -> Result:
        """Sends the rows at their times, or `abreast` at once, and waits for the last answer.

        Raises ClusterError for a failed request if `abreast` is given: a warm-up or a measurement."""
        result = driver.send(
            cluster,
            rows,
            *targets,
            seed=self.given.seed,
            extra=ALONE if cluster.spec.router == "none" else None,
            timeout_s=max(30.0, min(120.0, self.left_s())),
            concurrency=abreast,
        )
        if abreast is not None and any(not outcome.ok for outcome in result.outcomes):
            raise ClusterError(f"warming up or measuring failed: {failures(result.outcomes)[0]}")
        return result

    def warm(
        self, clusters: dict[str, Cluster], sizes: Sequence[int], output: int, abreast: int
    ) -> None:
        """Sends every cluster one request per prompt length."""
        rows = [traces.Request(0.0, size, output) for size in sizes]
        for cluster in clusters.values():
            self.send(cluster, rows, abreast=abreast)

    def alternate(
        self,
        part: str,
        clusters: dict[str, Cluster],
        rows: Sequence[traces.Request],
        tpot_ms: float,
    ) -> None:
        """Sends the trace to each system in turn, as long as the budget lasts."""
        given = self.given
        for turn, system in self.turns():
            if not self.dry and self.left_s() <= 3 * given.load_s:
                self.say(f"stopping here: {self.left_s():.0f} s of the budget left")
                return
            cluster = clusters[system]
            servers.forget(cluster)
            before = servers.cpu_s(servers.schedulers(cluster))
            result = self.send(cluster, rows, given.ttft_ms, tpot_ms)
            cpu_s = servers.cpu_s(servers.schedulers(cluster)) - before
            facts = {
                "part": part,
                "repeat": turn,
                "rate_rps": round(traces.rate_of(rows), 3),
                "slo": {"ttft_ms": given.ttft_ms, "tpot_ms": tpot_ms},
                "scheduler_cpu_s": round(cpu_s, 3),
                **own_reports(cluster),
            }
            driver.tell_failures(result, self.say)
            self.say(f"{system}: {driver.summary(result)}")
            self.runs.append(report.Run(system, result, facts))
            result.dump(given.out / f"{part}-{turn}-{system}.jsonl")
            self.save()


def own_reports(cluster: Cluster) -> dict[str, Any]:
    """Returns Kairos' own reports, without their latest single steps."""
    found = servers.kairos_reports(cluster)
    return {key: {k: v for k, v in one.items() if k != "steps"} for key, one in found.items()}
