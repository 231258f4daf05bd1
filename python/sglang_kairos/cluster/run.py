"""Runs a whole prefill/decode cluster on one machine: prefill servers, decode servers, a router.

    with Cluster(ClusterSpec(prefill=1, decode=1)) as cluster:
        requests.post(cluster.url + "/generate", json={...})

Every part is a process group of its own with a log file of its own. Entering the context returns
once a request has gone through the router. Leaving it kills every group. If this process is killed
outright, a small guard process ends the groups. If the guard is killed too, the kernel ends the
parts that the main thread started.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sglang_kairos import processes
from sglang_kairos.cluster.layout import (
    ROUTERS,
    ClusterError,
    ClusterSpec,
    Layout,
    PortBook,
    flag_value,
    port_is_free,
    reachable,
)
from sglang_kairos.config import KairosConfig
from sglang_kairos.cpu.zygote import Zygote
from sglang_kairos.local_http import open_url

__all__ = ["ROUTERS", "Cluster", "ClusterError", "ClusterSpec", "Part", "quiet_zygote"]

PORT_TRIES = 3
PROGRESS_EVERY_S = 5.0


class _PortTaken(ClusterError):
    """A part found its port in use, so another try with other ports may succeed."""

    def __init__(self, text: str, part: str) -> None:
        super().__init__(text)
        self.part = part


class _Process(Protocol):
    """The methods that `subprocess.Popen` and the zygote's `ForkedProcess` have in common."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...


@dataclass
class Part:
    """One running part: ``p0``, ``d0``, ``router``. `url` is where it serves."""

    name: str
    what: str
    url: str
    log: Path
    process: _Process
    ready: bool = False

    def exit_code(self) -> int | None:
        """Returns its exit code (negative: the signal that killed it); None while it runs."""
        try:
            return self.process.poll()
        except RuntimeError:
            # The zygote that forked it has ended, and has ended all that it started.
            return -int(signal.SIGKILL)

    def tail(self, lines: int = 15) -> str:
        """Returns the last lines of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 20_000))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(line[:400] for line in text.splitlines()[-lines:])

    def obituary(self) -> str:
        """Returns what to tell a person when it has died."""
        code = self.exit_code()
        ended = (
            f"exited with code {code}"
            if code is None or code >= 0
            else (f"was killed by signal {-code}")
        )
        when = "" if self.ready else " before it was ready"
        tail = "".join(f"\n  {self.name}| {line}" for line in self.tail().splitlines())
        return f"{self.what} {self.name} {ended}{when} (log: {self.log}){tail}"


class Cluster:
    """Runs a `ClusterSpec`. Use it as a context manager, or `start` and `stop` it."""

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.parts: list[Part] = []
        self.prefill_urls: list[str] = []
        self.decode_urls: list[str] = []
        self.bootstrap_ports: list[int] = []
        self.started_in_s = 0.0
        self._log_dir = spec.log_dir or Path()
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._failed = False

    @property
    def url(self) -> str:
        """Returns where to send requests: the router, or the first server if there is no router."""
        routers = [part.url for part in self.parts if part.name == "router"]
        return [*routers, *self.prefill_urls, *self.decode_urls][0]

    @property
    def logs(self) -> dict[str, Path]:
        """Returns the log file of each part, by name."""
        return {part.name: part.log for part in self.parts}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._failed = self._failed or isinstance(error, Exception)
        self.stop()

    def start(self) -> None:
        """Starts every part and waits until a request goes through. Raises ClusterError."""
        begun = time.monotonic()
        self._log_dir = self.spec.log_dir or Path(tempfile.mkdtemp(prefix="kairos-pd-"))
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            for left in reversed(range(PORT_TRIES)):
                try:
                    self._start_once(begun)
                    break
                except _PortTaken as error:
                    if not left:
                        raise
                    self.spec.say(f"a port was taken meanwhile, trying others: {error.part}")
                    self._end_parts(self.spec.stop_grace_s)
        except BaseException as error:
            self._failed = isinstance(error, Exception)
            self.stop()
            raise
        self.started_in_s = time.monotonic() - begun

    def dead(self) -> Part | None:
        """Returns the first part found to have ended by itself; None: all run."""
        with self._lock:
            return next((part for part in self.parts if part.exit_code() is not None), None)

    def check(self) -> None:
        """Raises ClusterError if a part has ended."""
        part = self.dead()
        if part is None:
            return
        text = part.obituary()
        said = text.lower()
        if not part.ready and ("address already in use" in said or "errno 98" in said):
            raise _PortTaken(text, part.name)
        self._failed = True
        raise ClusterError(text)

    def stop(self, grace_s: float | None = None) -> None:
        """Ends every part, the router first; kills whole groups after `grace_s`. Idempotent."""
        self._end_parts(self.spec.stop_grace_s if grace_s is None else grace_s)
        if self.spec.log_dir is None and not self._failed and self._log_dir.name:
            shutil.rmtree(self._log_dir, ignore_errors=True)

    def _end_parts(self, grace_s: float) -> None:
        with self._lock:
            try:
                for part in reversed(self.parts):
                    with contextlib.suppress(RuntimeError):
                        part.process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + grace_s
                while time.monotonic() < deadline:
                    if all(part.exit_code() is not None for part in self.parts):
                        break
                    time.sleep(0.05)
            finally:
                for part in self.parts:
                    _kill_group(part)
                self.parts, self.prefill_urls, self.decode_urls = [], [], []
                self._dismiss_guard()

    def _start_once(self, begun: float) -> None:
        spec = self.spec
        book = PortBook()
        if spec.port and not port_is_free(spec.host, spec.port):
            raise ClusterError(f"port {spec.port} on {spec.host} is in use; choose another --port")
        layout = Layout(spec)
        self.bootstrap_ports = bootstrap = []
        for role, count in (("prefill", spec.prefill), ("decode", spec.decode)):
            for index in range(count):
                block = book.take()
                argv = layout.server_argv(role, index, block)
                url = f"http://{reachable(layout.server_host)}:{block.http}"
                env = spec.prefill_env if role == "prefill" else spec.decode_env
                self._spawn(f"{role[0]}{index}", f"{role} server", url, spec.launcher, argv, env)
                if role == "prefill":
                    bootstrap.append(block.bootstrap)
                    self.prefill_urls.append(url)
                else:
                    self.decode_urls.append(url)
        self._wait_ready(begun)
        # SGLang asks for the administrator's key there as soon as there is one.
        self._freeze_garbage(layout.admin_api_key or layout.api_key)
        if spec.router != "none":
            port = spec.port or book.take().http
            argv = layout.router_argv(self.prefill_urls, bootstrap, self.decode_urls, port)
            url = f"http://{reachable(spec.host)}:{port}"
            self._spawn("router", "router", url, layout.router_module, argv, {})
            self._wait_ready(begun)
            client_key = flag_value(spec.router_args, "--client-api-key") or layout.api_key
            self._probe(client_key)

    def _spawn(
        self,
        name: str,
        what: str,
        url: str,
        module: str,
        argv: Sequence[str],
        env: Mapping[str, str],
    ) -> None:
        spec = self.spec
        log = self._log_dir / f"{name}.log"
        settings = {**_kairos_env(spec.kairos), "PYTHONUNBUFFERED": "1", **spec.env, **env}
        process: _Process
        if spec.zygote is not None:
            try:
                process = spec.zygote.start(module, argv, log=log, env=settings)
            except RuntimeError as error:
                raise ClusterError(f"{what} {name} cannot be forked: {error}") from None
        else:
            with log.open("wb") as file:
                words = [spec.python, "-m", module, *argv]
                # The kernel takes the end of the thread that started a child for its parent's end.
                if threading.current_thread() is threading.main_thread():
                    trampoline = ["-ISc", processes.EXEC_WITH_PARENT, str(os.getpid())]
                    words = [sys.executable, *trampoline, *words]
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **settings},
                    start_new_session=True,
                )
        with self._lock:
            self.parts.append(Part(name, what, url, log, process))
            self._tell_guard(process.pid)

    def _wait_ready(self, begun: float) -> None:
        spec = self.spec
        said = time.monotonic()
        while waiting := [part for part in self.parts if not part.ready]:
            self.check()
            for part in waiting:
                if _status(part.url + "/health") == 200:
                    part.ready = True
                    spec.say(
                        f"{part.name} ready after {time.monotonic() - begun:.1f} s: {part.url}"
                    )
            now = time.monotonic()
            if now - begun > spec.ready_timeout_s:
                part = waiting[0]
                raise ClusterError(
                    f"{part.what} {part.name} was not ready within {spec.ready_timeout_s:g} s "
                    f"(log: {part.log})\n{part.tail()}"
                )
            if now - said >= PROGRESS_EVERY_S:
                names = ", ".join(part.name for part in self.parts if not part.ready)
                spec.say(f"waiting for {names} ({now - begun:.0f} s)" if names else "all ready")
                said = now
            time.sleep(0.1)

    def _freeze_garbage(self, api_key: str) -> None:
        """Asks each server to freeze its garbage, as SGLang does at start, often before its port is open.

        A full collection stops its HTTP process, and with it every stream, for one to two seconds.
        """
        for part in self.parts:
            request = urllib.request.Request(
                part.url + "/freeze_gc", b"", _authorization(api_key), method="POST"
            )
            try:
                with open_url(request, timeout=PROGRESS_EVERY_S) as response:
                    response.read()
            except (OSError, http.client.HTTPException) as error:
                self.spec.say(f"{part.name} keeps collecting garbage of its start: {error}")

    def _probe(self, api_key: str) -> None:
        """Sends one request all the way through, so that wiring mistakes show before the first user's."""
        body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
        request = urllib.request.Request(
            self.url + "/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"} | _authorization(api_key),
        )
        try:
            with open_url(request, timeout=self.spec.ready_timeout_s) as response:
                response.read()
        except OSError as error:
            self.check()
            detail = (
                error.read().decode(errors="replace")[:400]
                if isinstance(error, urllib.error.HTTPError)
                else ""
            )
            raise ClusterError(
                f"all parts are up, but a first request failed: {error} {detail}; "
                f"logs in {self._log_dir}"
            ) from None

    def _tell_guard(self, group: int) -> None:
        if self._guard is None:
            self._guard = subprocess.Popen(
                [sys.executable, "-ISc", _GUARD, str(processes.__file__)],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{group}\n".encode())
        self._guard.stdin.flush()

    def _dismiss_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.kill()
            guard.communicate()


@contextlib.contextmanager
def quiet_zygote(log: Path, router: str = "kairos") -> Iterator[Zygote]:
    """Yields a zygote for `ClusterSpec.zygote`, without a GPU only. Its imports print to `log`.

    `router`: the kind of router that will be started from it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    modules = {
        "kairos": ["sglang_kairos.launch_router"],
        "random": ["sglang_router.launch_router", "sglang_router.mini_lb"],
        "none": [],
    }
    shown = os.dup(2)
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        zygote = Zygote(preload=modules[router], env=_source_path())
    finally:
        os.dup2(shown, 2)
        os.close(shown)
    try:
        yield zygote
    finally:
        # The pipe is broken if the zygote has died already.
        with contextlib.suppress(OSError):
            zygote.close()


# Reads process groups line by line; when its parent is gone, ends them.
_GUARD = """
import os, runpy, signal, sys, time
kill_session = runpy.run_path(sys.argv[1])["kill_session"]
groups = [int(line) for line in sys.stdin]
def alive():
    for group in groups:
        try:
            os.killpg(group, 0)
            return True
        except OSError:
            pass
for group in groups:
    try:
        os.killpg(group, signal.SIGTERM)
    except OSError:
        pass
deadline = time.monotonic() + 5
while alive() and time.monotonic() < deadline:
    time.sleep(0.05)
for group in groups:
    kill_session(group)
"""


def _kairos_env(kairos: bool | Mapping[str, Any]) -> dict[str, str]:
    """Returns Kairos' settings as environment variables, which work under every launcher."""
    if isinstance(kairos, bool):
        env = {"KAIROS": "on" if kairos else "off"}
    else:
        env = {}
        KairosConfig(**kairos).to_env(env)
    return env | _source_path()


def _source_path() -> dict[str, str]:
    """Returns the environment that lets children import this package when run from its source tree."""
    root = Path(__file__).resolve().parents[2]
    if root.name == "site-packages":
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}


def _kill_group(part: Part) -> None:
    processes.kill_session(part.process.pid)
    deadline = time.monotonic() + 10.0
    while part.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def _authorization(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _status(url: str) -> int:
    """Returns the HTTP status, or 0 when nothing answers."""
    try:
        with open_url(url, timeout=5.0) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return 0
