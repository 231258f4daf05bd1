"""However a cluster ends, nothing that it started runs on, and it does end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_kairos.cluster import layout

SOURCES = Path(layout.__file__).parents[2]
WITHIN_S = 20.0

# A part that takes SIGTERM for nothing, with a child in a group of its own that does, too.
PART = """
import http.server, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(120)"], process_group=0)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--never-ready" in sys.argv else 200); self.end_headers()
    def do_POST(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *args):
        pass
print("up", flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# Signals as a terminal leaves them: a test run may be a background job, or under nohup.
LAUNCHER = """
import dataclasses, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
from sglang_kairos import launch_pd
from sglang_kairos.cluster import layout as cluster_layout
from sglang_kairos.cpu import zygote
zygote.PRELOADED = ()
cluster_layout.ROUTER_MODULES["kairos"] = "part"
parse = launch_pd.parse
def quick(argv):
    spec, options = parse(argv)
    return dataclasses.replace(spec, stop_grace_s=0.3), options
launch_pd.parse = quick
sys.exit(launch_pd.main(sys.argv[1:]))
"""


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes that carry `mark` in their environment, by pid."""
    found = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            folder = Path("/proc", name)
            if name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found[int(name)] = (folder / "cmdline").read_bytes().decode().replace("\0", " ")
    return found


class Run:
    """A launcher that has come as far as the test wants it."""

    def __init__(self, folder: Path, start: str, extra: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        (folder / "part.py").write_text(PART)
        argv = ["--launcher", "part", "--model-path", "m", "--port", "0", "--start", start]
        env = {
            **os.environ,
            "KAIROS_CPU": "off",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "PYTHONPATH": f"{SOURCES}{os.pathsep}{folder}",
            "MARK": self.mark,
        }
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *argv, "--log-dir", str(folder / "logs"), *extra],
            env=env,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        assert self.launcher.stdout is not None
        wanted = "p0| up" if extra else "serving at"
        for line in self.launcher.stdout:
            if wanted in line:
                break

    def pid_of(self, words: str) -> int:
        # A fork has the command line of what it was forked from, which is the older.
        return min(pid for pid, line in marked(self.mark).items() if words in line)

    def send(self, number: int, *words: str) -> None:
        pids = [self.pid_of(each) for each in words] or [self.launcher.pid]
        for pid in pids:
            os.kill(pid, number)

    def send_group(self, number: int) -> None:
        os.killpg(self.launcher.pid, number)

    def left(self) -> dict[int, str]:
        """What still runs in the end."""
        deadline = time.monotonic() + WITHIN_S
        while (found := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(how: str, *extra: str) -> Run:
        runs.append(Run(tmp_path, how, list(extra)))
        return runs[-1]

    yield start
    for each in runs:
        for pid in marked(each.mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        each.launcher.wait()
        assert each.launcher.stdout is not None
        each.launcher.stdout.close()


def twice(run: Run) -> None:
    run.send_group(signal.SIGTERM)
    run.send_group(signal.SIGINT)


def terminal_gone(run: Run) -> None:
    assert run.launcher.stdout is not None
    run.launcher.stdout.close()
    run.send(signal.SIGHUP)


ENDS: dict[str, Callable[[Run], None]] = {
    "SIGTERM": lambda run: run.send(signal.SIGTERM),
    "SIGHUP and no terminal": terminal_gone,
    "SIGKILL": lambda run: run.send(signal.SIGKILL),
    "SIGKILL, the guard too": lambda run: run.send(signal.SIGKILL, "kill_session", "main(sys.argv"),
    "SIGTERM to the group": lambda run: run.send_group(signal.SIGTERM),
    "SIGKILL to the group": lambda run: run.send_group(signal.SIGKILL),
    "two signals": twice,
    "a server is killed": lambda run: run.send(signal.SIGKILL, "mode decode"),
    "the zygote is terminated": lambda run: run.send(signal.SIGTERM, "cpu.zygote"),
    "the zygote is killed": lambda run: run.send(signal.SIGKILL, "cpu.zygote"),
}


@pytest.mark.parametrize(
    ("start", "how"),
    [
        ("spawn", "SIGTERM"),
        ("spawn", "SIGHUP and no terminal"),
        ("spawn", "SIGKILL"),
        ("spawn", "two signals"),
        ("spawn", "a server is killed"),
        ("fork", "SIGTERM to the group"),
        ("fork", "SIGKILL to the group"),
        ("fork", "SIGKILL, the guard too"),
        ("fork", "the zygote is terminated"),
        ("fork", "the zygote is killed"),
    ],
)
def test_nothing_outlives_the_launcher_however_it_ends(
    run: Callable[..., Run], start: str, how: str
) -> None:
    started = run(start)
    assert len(marked(started.mark)) >= 8  # the launcher, its guard, three parts, their children
    ENDS[how](started)
    assert started.left() == {}


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_nothing_outlives_a_start_that_is_broken_off(run: Callable[..., Run], start: str) -> None:
    started = run(start, "--prefill-args", "--never-ready")
    started.send_group(signal.SIGTERM)
    assert started.left() == {}


ADOPTS = """
import subprocess, sys
from sglang_kairos import processes
sleep = [sys.executable, "-ISc", "import time; time.sleep(120)"]
older = subprocess.Popen(sleep)
others = processes.descendants()
processes.adopt_orphans()
orphan = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
subprocess.run([sys.executable, "-ISc", orphan, *sleep], check=True)
print(len(processes.descendants()), processes.kill_descendants(spared=others))
print(processes.descendants() == others == [older.pid], older.poll())
older.kill()
"""


def test_orphans_are_ended_and_what_was_there_before_is_spared() -> None:
    found = subprocess.run(
        [sys.executable, "-c", ADOPTS],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.split() == ["2", "True", "True", "None"]
