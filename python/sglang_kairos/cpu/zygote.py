"""Starts SGLang servers in seconds: one process imports everything once, and forks each server.

Importing SGLang costs about 10 s of CPU in every launcher, scheduler and detokenizer, which is
nearly all of a tiny model's start-up. `Zygote` pays it once; a server then needs 2 to 4 seconds,
and its processes share the memory of the imported code. For tests and local clusters without a
GPU; it starts the same modules with the same arguments as ``python -m`` would.

Two differences. Variables that SGLang reads while being imported must be set when the zygote is
made. A server's children inherit what its launcher loaded, plugins included.

    with Zygote() as zygote:
        server = zygote.start("sglang.launch_server", ["--model-path", ...], log="server.log")
        ...
        server.stop()
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, NoReturn

from sglang_kairos import processes
from sglang_kairos.cpu import adapt

# Orders are carried out at once, except that the first one waits until everything is imported.
ANSWER_WITHIN_S = 30.0
IMPORTS_WITHIN_S = 600.0
CLOSE_WITHIN_S = 10.0

# The modules a server imports at start. A module that this SGLang lacks is skipped.
PRELOADED = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
    "sglang.srt.disaggregation.mooncake.conn",
    "sglang.srt.layers.attention.torch_native_backend",
)


@dataclass(frozen=True)
class ForkedProcess:
    """A process that the zygote started; it leads its own process group."""

    pid: int
    zygote: Zygote

    def poll(self) -> int | None:
        """Returns its exit status (negative: killed by that signal); None while it runs."""
        status: int | None = self.zygote.ask({"do": "poll", "pid": self.pid})["status"]
        return status

    def wait(self, timeout_s: float) -> int | None:
        """Waits at most `timeout_s` seconds for it to end. Returns its exit status, or None."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process alone; nothing happens if it has ended."""
        self.zygote.ask({"do": "signal", "pid": self.pid, "signal": number})

    def stop(self, grace_s: float = 15.0) -> None:
        """Asks it to terminate, then kills what is left of its process group."""
        self.send_signal(signal.SIGTERM)
        self.wait(grace_s)
        self.zygote.ask({"do": "kill_group", "pid": self.pid})


class Zygote:
    """A process that has imported SGLang and forks servers on request. Thread-safe.

    `preload` names modules to import beside `PRELOADED`; `env` is added to its environment.
    Whatever it started dies with it, and it ends with this process. It has a session of its own:
    signals to this process' group (Ctrl-C, ``timeout``) do not reach it.
    """

    def __init__(self, preload: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._imported = False
        self._read = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sglang_kairos.cpu.zygote", *PRELOADED, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, adapt.START_VARIABLE: "fork", **(env or {})},
            text=True,
            start_new_session=True,
        )

    def start(
        self,
        module: str,
        argv: Sequence[str],
        *,
        log: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
    ) -> ForkedProcess:
        """Runs ``python -m module *argv`` in a fork; stdout and stderr go to the file `log`.

        `env` is added to the zygote's environment. The first call waits for the imports.
        """
        order = {"do": "start", "module": module, "argv": list(argv), "env": dict(env or {})}
        return ForkedProcess(self.ask({**order, "log": os.path.abspath(log)})["pid"], self)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Sends one order and returns the answer.

        Raises RuntimeError if the zygote has ended, or does not answer in time.
        """
        stdin = self._process.stdin
        assert stdin is not None
        with self._lock:
            number = next(self._numbers)
            try:
                stdin.write(json.dumps({**order, "number": number}) + "\n")
                stdin.flush()
                # A signal may have broken off an earlier order while it waited for its answer.
                while (answer := self._answer())["number"] != number:
                    pass
            except (BrokenPipeError, ValueError) as error:
                raise RuntimeError("the zygote has ended") from error
            self._imported = True
        return answer

    def _answer(self) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        within_s = ANSWER_WITHIN_S if self._imported else IMPORTS_WITHIN_S
        deadline = time.monotonic() + within_s
        # Several answers may be there at once, and a signal may come in the middle of one. So what
        # was read stays in `_read`, which `select` does not see.
        while b"\n" not in self._read:
            if select.select([stdout], [], [], 0.5)[0]:
                some = os.read(stdout.fileno(), 65536)
                if not some:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(timeout=1.0)
                    raise RuntimeError(f"the zygote has ended with status {self._process.poll()}")
                self._read += some
                continue
            # A process that inherited the pipe keeps it open, so its end alone does not tell.
            if self._process.poll() is not None:
                raise RuntimeError(f"the zygote has ended with status {self._process.poll()}")
            if time.monotonic() > deadline:
                # Its children end with it, and nobody else has to wait as long.
                self._process.kill()
                raise RuntimeError(f"the zygote has not answered within {within_s:g} s")
        line, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the zygote and every process it started."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._lock:
            # The zygote may have ended; then what was not sent cannot be sent any more.
            with contextlib.suppress(OSError):
                stdin.close()
            try:
                self._process.wait(timeout=CLOSE_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            stdout.close()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _serve(orders: IO[str], answers: IO[str]) -> None:
    """Carries out orders until the client closes its end."""
    statuses: dict[int, int | None] = {}
    for line in orders:
        order = json.loads(line)
        answer: dict[str, Any] = {"number": order["number"]}
        if order["do"] == "start":
            answer["pid"] = pid = _start(order, (orders.fileno(), answers.fileno()))
            statuses[pid] = None
        elif order["do"] == "poll":
            answer["status"] = _poll(order["pid"], statuses)
        elif order["do"] == "signal" and _poll(order["pid"], statuses) is None:
            os.kill(order["pid"], order["signal"])
        elif order["do"] == "kill_group":
            processes.kill_session(order["pid"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in statuses:
        processes.kill_session(pid)
    processes.kill_descendants()


def _poll(pid: int, statuses: dict[int, int | None]) -> int | None:
    """Returns how this child ended; None: it runs. Reaps adopted orphans on the way."""
    with contextlib.suppress(ChildProcessError):  # no child is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            child, status = ended
            if child in statuses:
                statuses[child] = os.waitstatus_to_exitcode(status)
    return statuses[pid]


def _start(order: dict[str, Any], channels: Sequence[int]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(order, log, parent, channels)
    os.close(log)
    return pid


def _become(order: dict[str, Any], log: int, parent: int, channels: Sequence[int]) -> NoReturn:
    """Turns this fork into ``python -m module *argv``; never returns to the zygote's loop."""
    status = 1
    try:
        os.setsid()
        processes.end_with_parent(parent)
        # If a child kept them open, a caller that waits for the zygote's end would wait for it too.
        for channel in channels:
            os.close(channel)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(order["env"])
        sys.argv = [order["module"], *order["argv"]]
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reseed() -> None:
    """Seeds the random generators anew. Otherwise every fork would draw the same ports, ids and rooms.

    Generators that a module keeps for itself are for that module to seed.
    """
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def main(modules: Sequence[str]) -> None:
    """Runs the zygote process: imports `modules`, then serves orders from stdin."""
    processes.adopt_orphans()
    os.register_at_fork(after_in_child=_reseed)
    # stdout is the answer channel. Output of the imports must not get into it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    orders = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"zygote: {name} not preloaded: {error}", file=sys.stderr)
    if threading.active_count() > 1:
        print(f"zygote: forking with threads {threading.enumerate()}", file=sys.stderr)
    _serve(orders, answers)
    sys.stderr.flush()
    os._exit(0)  # there is nothing to finish, and taking SGLang's modules apart takes seconds


if __name__ == "__main__":
    main(sys.argv[1:])
