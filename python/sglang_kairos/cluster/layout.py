"""The parts of a cluster: what to start, on which ports, with which command lines."""

from __future__ import annotations

import glob
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_kairos.cpu import flags as cpu_flags
from sglang_kairos.cpu import runtime as cpu_runtime
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.other_sglang import NoSuchSglang, importable_version

ROUTER_MODULES = {
    "kairos": "sglang_kairos.launch_router",
    # sglang_router's mini load balancer.
    "random": "sglang_router.launch_router",
}
ROUTERS = (*ROUTER_MODULES, "none")
# Flags that the cluster sets for each server. Values from the user would break its wiring.
OWN_FLAGS = ("--port", "--disaggregation-mode", "--disaggregation-bootstrap-port")


class ClusterError(RuntimeError):
    """The cluster cannot start or has lost a part. The text names the part and its log."""


@dataclass(frozen=True)
class ClusterSpec:
    """What to start. The user's flags go behind the cluster's own flags, so they win.

    `model_path`: empty means a generated tiny model, without a GPU only.
    `router`: kairos, random (sglang_router's mini load balancer) or none. Without a router, servers
    of one role alone are enough.
    `launcher`: the module behind ``python -m`` for each server.
    `kairos`: off, on, or on with these `KairosConfig` settings.
    `log_dir`: kept when given; otherwise a temporary folder, which is left only after a failure.
    `stop_grace_s`: seconds that a part has to end by itself before its group is killed.
    `zygote`: starts the parts by forking (see `sglang_kairos.cpu.zygote`) instead of anew.
    """

    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    model_path: str = ""
    router: str = "kairos"
    launcher: str = "sglang_kairos.launch_server"
    python: str = sys.executable
    kairos: bool | Mapping[str, Any] = True
    server_args: Sequence[str] = ()
    prefill_args: Sequence[str] = ()
    decode_args: Sequence[str] = ()
    router_args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    prefill_env: Mapping[str, str] = field(default_factory=dict)
    decode_env: Mapping[str, str] = field(default_factory=dict)
    log_dir: Path | None = None
    ready_timeout_s: float = 600.0
    stop_grace_s: float = 10.0
    zygote: Zygote | None = None
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise ClusterError(f"router: must be one of {', '.join(ROUTERS)}, got {self.router!r}")
        fewest, sides = min(self.prefill, self.decode), self.prefill + self.decode
        if fewest < 0 or sides < 1 or (fewest < 1 and self.router != "none"):
            raise ClusterError("needs at least one prefill and one decode server")
        for word in (*self.server_args, *self.prefill_args, *self.decode_args):
            if word.split("=", 1)[0] in OWN_FLAGS:
                raise ClusterError(f"{word}: leave it out; the cluster sets it for each server")


@dataclass(frozen=True)
class PortBlock:
    """The ports of one server; SGLang derives others from `http` (+233 to +239)."""

    http: int

    @property
    def nccl(self) -> int:
        return self.http + 1

    @property
    def bootstrap(self) -> int:
        return self.http + 2


class PortBook:
    """Hands out free ports, each once.

    They lie below the ephemeral range, so no outgoing connection takes one meanwhile. Blocks start
    at multiples of 16, so the ports that SGLang derives from one never meet another's.
    """

    def __init__(self, low: int = 20_000, high: int = 32_000) -> None:
        self._bases = list(range(low + -low % 16, high, 16))
        random.SystemRandom().shuffle(self._bases)

    def take(self) -> PortBlock:
        """Returns a block that is free now; another program may still take it before its server does."""
        while self._bases:
            block = PortBlock(self._bases.pop())
            if all(port_is_free("", port) for port in (block.http, block.nccl, block.bootstrap)):
                return block
        raise ClusterError("no free ports left; end servers that are not needed")


def port_is_free(host: str, port: int) -> bool:
    """Returns whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class Layout:
    """The command lines of a spec's parts."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.cpu = cpu_runtime.decide().active
        self.server_host = spec.host if spec.router == "none" else "127.0.0.1"
        self.router_module = ROUTER_MODULES.get(spec.router, "")
        self.api_key = _one_key(spec, "--api-key")
        self.admin_api_key = _one_key(spec, "--admin-api-key")
        if self.api_key and spec.router == "random":
            raise ClusterError("--api-key: sglang_router's mini load balancer passes no key on")
        self._model = spec.model_path or self._tiny_model()
        self._version = _sglang_version(spec.python, spec.env) if self.cpu else ""

    def server_argv(self, role: str, index: int, block: PortBlock) -> list[str]:
        """Returns the arguments of one prefill or decode server."""
        spec = self.spec
        role_args = spec.prefill_args if role == "prefill" else spec.decode_args
        given = [*spec.server_args, *role_args]
        argv = ["--model-path", self._model, "--host", self.server_host, "--port", str(block.http)]
        argv += ["--disaggregation-mode", role]
        if role == "prefill":
            argv += ["--disaggregation-bootstrap-port", str(block.bootstrap)]
        # Each rank of a data-parallel server needs a port of its own, and draws it itself.
        if not flag_value(given, "--dp", "--dp-size", "--data-parallel-size"):
            argv += ["--nccl-port", str(block.nccl)]
        if self.cpu:
            return cpu_flags.with_server_flags(
                [*argv, *given], version=self._version, fast_start=True
            )
        number = index if role == "prefill" else spec.prefill + index
        return [*argv, *self._gpu_args(number, given), *given]

    def router_argv(
        self, prefill: Sequence[str], bootstrap: Sequence[int], decode: Sequence[str], port: int
    ) -> list[str]:
        """Returns the arguments of the router in front of these servers."""
        argv = ["--pd-disaggregation", "--host", self.spec.host, "--port", str(port)]
        for url, bootstrap_port in zip(prefill, bootstrap, strict=True):
            argv += ["--prefill", url, str(bootstrap_port)]
        for url in decode:
            argv += ["--decode", url]
        if self.spec.router == "random":
            argv += ["--mini-lb", "--policy", "random"]
        elif self.api_key:
            # Clients need the same key at the router as at a server. The router checks it itself,
            # since it answers some requests without asking a server.
            argv += ["--api-key", self.api_key, "--client-api-key", self.api_key]
        if self.admin_api_key and self.spec.router == "kairos":
            argv += ["--admin-api-key", self.admin_api_key]
        return [*argv, *self.spec.router_args]

    def _tiny_model(self) -> str:
        if not self.cpu:
            raise ClusterError("--model-path is needed: a tiny model is made only without a GPU")
        from sglang_kairos.cpu.tiny_model import make_tiny_model

        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return str(make_tiny_model(Path(cache) / "sglang-kairos" / "tiny-model"))

    def _gpu_args(self, number: int, given: Sequence[str]) -> list[str]:
        """Gives server `number` its own GPUs while they last, then a share of one."""
        if flag_value(given, "--base-gpu-id"):
            return []
        tp = flag_value(given, "--tp", "--tp-size", "--tensor-parallel-size") or "1"
        pp = flag_value(given, "--pp", "--pp-size", "--pipeline-parallel-size") or "1"
        wide = int(tp) * int(pp)
        slots = max(1, _gpu_count() // wide)
        argv = ["--base-gpu-id", str(number % slots * wide)]
        sharing = -(-(self.spec.prefill + self.spec.decode) // slots)
        if sharing > 1 and not flag_value(given, "--mem-fraction-static"):
            self.spec.say(f"{sharing} servers share each GPU; --mem-fraction-static splits it")
            argv += ["--mem-fraction-static", f"{0.8 / sharing:.2f}"]
        return argv


def _one_key(spec: ClusterSpec, flag: str) -> str:
    """Returns the key that `flag` gives the servers. Raises ClusterError if there are two.

    A server that is given none takes any.
    """
    keys = {
        flag_value([*spec.server_args, *args], flag)
        for args in (spec.prefill_args, spec.decode_args)
    } - {""}
    if len(keys) > 1:
        raise ClusterError(
            f"{flag}: differs between --prefill-args and --decode-args, but the router calls all "
            "servers with one key; give it once, outside of both"
        )
    return keys.pop() if keys else ""


def flag_value(argv: Sequence[str], *names: str) -> str:
    """Returns the last value given to any of these spellings of a flag; empty if it is not there."""
    found = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag in names:
            found = value if equals else following
    return found


def reachable(host: str) -> str:
    """Returns the address at which a server that listens on `host` can be called from here."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _sglang_version(python: str, env: Mapping[str, str]) -> str:
    """Returns SGLang's version for that interpreter, with `env` added to the environment."""
    try:
        if python == sys.executable and "PYTHONPATH" not in env:
            return importable_version()
        code = "from sglang_kairos.other_sglang import importable_version as v; print(v())"
        found = subprocess.check_output(
            [python, "-c", code],
            text=True,
            timeout=60,
            env={**os.environ, **env},
            stderr=subprocess.DEVNULL,
        )
        return found.strip()
    except (NoSuchSglang, OSError, subprocess.SubprocessError):
        raise ClusterError(f"SGLang is not installed for {python}; name another --python") from None


def _gpu_count() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))
