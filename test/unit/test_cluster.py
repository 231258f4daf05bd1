"""Starting, watching and ending the parts of a cluster, with small programs for servers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_kairos.cluster import layout as layouts
from sglang_kairos.cluster.layout import PortBlock, PortBook, flag_value, port_is_free
from sglang_kairos.cluster.run import Cluster, ClusterError, ClusterSpec
from sglang_kairos.launch_pd import parse
from sglang_kairos.other_sglang import first_on_path
from sglang_kairos.router.options import parse_options

SOURCES = Path(layouts.__file__).parents[2]

# Stands for a server or the router; what it does is in its environment or its flags.
FAKE = """
import http.server, json, os, pathlib, signal, subprocess, sys, time

argv = sys.argv[1:]
port = int(argv[argv.index("--port") + 1])
print("argv", json.dumps(argv), "KAIROS", os.environ.get("KAIROS"), flush=True)
mode = os.environ.get("FAKE", "")
marker = pathlib.Path(os.environ["FAKE_MARKER"])
if "--die" in argv:
    print("no such model", flush=True)
    sys.exit(3)
if "--port-taken-once" in argv and not marker.exists():
    marker.touch()
    print("OSError: [Errno 98] error while attempting to bind: address already in use")
    sys.exit(1)
if "--stubborn" in argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(300)"])
    marker.write_text(str(child.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        print("posted", self.path, self.headers.get("authorization"), flush=True)
        self.send_response(500 if "--broken" in argv else 200); self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *args):
        pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes specs of fake parts; as on a GPU machine, so that no CPU flags come in."""
    (tmp_path / "fake_part.py").write_text(FAKE)
    monkeypatch.setenv("KAIROS_CPU", "off")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FAKE_MARKER", str(tmp_path / "marker"))
    monkeypatch.setitem(layouts.ROUTER_MODULES, "kairos", "fake_part")

    def spec(**changes: Any) -> ClusterSpec:
        basis: dict[str, Any] = {
            "launcher": "fake_part",
            "model_path": "some/model",
            "ready_timeout_s": 30.0,
            "stop_grace_s": 5.0,
        }
        return ClusterSpec(**{**basis, **changes})

    return spec


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, within_s: float = 8.0) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def argv_of(cluster: Cluster, name: str) -> str:
    return cluster.logs[name].read_text()


def test_servers_are_told_once_up_to_leave_their_start_to_no_garbage_collection(make: Any) -> None:
    said: list[str] = []
    with Cluster(make(prefill_args=["--broken"], say=said.append)) as cluster:
        assert "posted /freeze_gc" in argv_of(cluster, "p0")
        assert "posted /freeze_gc" in argv_of(cluster, "d0")
        assert "/freeze_gc" not in argv_of(cluster, "router")
    complaints = [line for line in said if "garbage" in line]
    assert len(complaints) == 1 and complaints[0].startswith("p0 ")  # and it goes on


def test_a_cluster_starts_serves_and_leaves_nothing_behind(make: Any) -> None:
    said: list[str] = []
    with Cluster(make(prefill=2, decode=1, say=said.append, kairos=False)) as cluster:
        assert [part.name for part in cluster.parts] == ["p0", "p1", "d0", "router"]
        assert cluster.url not in (*cluster.prefill_urls, *cluster.decode_urls)
        assert cluster.dead() is None
        cluster.check()
        pids = [part.process.pid for part in cluster.parts]
        folder = cluster.logs["p0"].parent
        p0, d0, router = (argv_of(cluster, name) for name in ("p0", "d0", "router"))
        assert '"--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port"' in p0
        assert '"--base-gpu-id", "0"' in p0
        assert '"--disaggregation-mode", "decode", "--nccl-port"' in d0
        assert "KAIROS off" in p0
        assert "KAIROS off" in router
        for url in cluster.prefill_urls:
            bootstrap = int(url.rsplit(":", 1)[1]) + 2
            assert f'"--prefill", "{url}", "{bootstrap}"' in router
        assert f'"--decode", "{cluster.decode_urls[0]}"' in router
        assert cluster.started_in_s > 0
    assert all(gone(pid) for pid in pids)
    assert not folder.exists()
    assert any(line.startswith("p1 ready after") for line in said)


def test_without_a_router_the_first_prefill_server_is_the_url(make: Any, tmp_path: Path) -> None:
    spec = make(router="none", log_dir=tmp_path / "logs", kairos={"max_wait": 3.0})
    with Cluster(spec) as cluster:
        assert cluster.url == cluster.prefill_urls[0]
        assert "KAIROS on" in argv_of(cluster, "p0")
    assert (tmp_path / "logs" / "p0.log").exists()


def test_a_part_that_dies_at_once_is_named_with_its_log(make: Any) -> None:
    with pytest.raises(ClusterError) as caught, Cluster(make(decode_args=["--die"])):
        pass
    first, *rest = str(caught.value).split("\n")
    assert first.startswith("decode server d0 exited with code 3 before it was ready (log: /")
    assert "  d0| no such model" in rest
    assert Path(first.split("(log: ")[1][:-1]).exists()


def test_a_part_that_dies_later_is_found(make: Any) -> None:
    with Cluster(make()) as cluster:
        router = cluster.parts[2].process.pid
        os.kill(cluster.parts[1].process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while cluster.dead() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(ClusterError, match=r"decode server d0 was killed by signal 9 \(log"):
            cluster.check()
    assert gone(router)


def test_a_taken_port_is_tried_again_with_others(make: Any) -> None:
    said: list[str] = []
    spec = make(prefill_args=["--port-taken-once"], say=said.append)
    with Cluster(spec) as cluster:
        assert cluster.dead() is None
    assert "a port was taken meanwhile, trying others: p0" in said


def test_a_port_in_use_is_said_before_anything_starts(make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} on 127.0.0.1 is in use"):
            Cluster(make(port=port)).start()


def test_a_failing_first_request_is_an_error(make: Any) -> None:
    with pytest.raises(ClusterError, match="a first request failed: HTTP Error 500"):
        Cluster(make(router_args=["--broken"])).start()


def test_parts_that_do_not_end_are_killed_with_their_children(make: Any, tmp_path: Path) -> None:
    with Cluster(make(prefill_args=["--stubborn"], stop_grace_s=0.3)) as cluster:
        child = int((tmp_path / "marker").read_text())
        assert alive(child)
        cluster.stop()
        cluster.stop()
    assert gone(child)


def test_nothing_survives_a_killed_launcher(make: Any, tmp_path: Path) -> None:
    """The guard process ends what a killed launcher cannot."""
    script = (
        f"import sys, time; sys.path.insert(0, {str(SOURCES)!r})\n"
        "from sglang_kairos.cluster.run import Cluster, ClusterSpec\n"
        "spec = ClusterSpec(launcher='fake_part', model_path='m', router='none')\n"
        "with Cluster(spec) as c:\n"
        "    print(*(part.process.pid for part in c.parts), flush=True)\n"
        "    time.sleep(300)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        pids = [int(word) for word in launcher.stdout.readline().split()]
        launcher.kill()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_ports_are_free_apart_and_never_given_twice() -> None:
    book = PortBook(20_000, 20_640)
    blocks: list[PortBlock] = []

    def take_all() -> None:
        while True:
            blocks.append(book.take())

    with pytest.raises(ClusterError, match="no free ports"):
        take_all()
    used = [port for b in blocks for port in (b.http, b.nccl, b.bootstrap)]
    assert len(set(used)) == len(used) > 60
    derived = {b.http + delta for b in blocks for delta in range(233, 240)}
    assert not derived & set(used)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert not port_is_free("127.0.0.1", taken.getsockname()[1])


def test_servers_get_gpus_of_their_own_and_then_share(make: Any) -> None:
    block = PortBook().take()

    def gpu(spec: ClusterSpec, role: str, index: int) -> tuple[str, str]:
        argv = layouts.Layout(spec).server_argv(role, index, block)
        return flag_value(argv, "--base-gpu-id"), flag_value(argv, "--mem-fraction-static")

    one_each = make()
    assert gpu(one_each, "prefill", 0) == ("0", "")
    assert gpu(one_each, "decode", 0) == ("1", "")
    wide = make(server_args=["--tp", "2"])
    assert gpu(wide, "decode", 0) == ("0", "0.40")
    chosen = make(server_args=["--tp=2", "--mem-fraction-static", "0.3", "--base-gpu-id", "4"])
    assert gpu(chosen, "decode", 0) == ("4", "0.3")


def test_the_version_is_that_of_the_sglang_the_servers_will_import(tmp_path: Path) -> None:
    # As a patched copy: no metadata, which only the one that pip installed has.
    (tmp_path / "sglang" / "srt").mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("")
    (tmp_path / "sglang" / "_version.py").write_text("__version__ = version = '1.2.3'\n")
    env = first_on_path(tmp_path)
    assert layouts._sglang_version(sys.executable, env) == "1.2.3"


def test_a_data_parallel_server_draws_its_own_nccl_ports(make: Any) -> None:
    argv = layouts.Layout(make(server_args=["--dp-size", "2"])).server_argv(
        "prefill", 0, PortBook().take()
    )
    assert "--nccl-port" not in argv


@pytest.mark.parametrize(
    "keys",
    [
        {"server_args": ["--api-key", "sk-test", "--admin-api-key", "sk-admin"]},
        {"server_args": ["--api-key=sk-test", "--admin-api-key=sk-admin"]},
        {"prefill_args": ["--api-key=sk-test"], "decode_args": ["--admin-api-key", "sk-admin"]},
        {
            "server_args": ["--api-key", "old", "--admin-api-key", "sk-admin"],
            "prefill_args": ["--api-key", "sk-test"],
            "decode_args": ["--api-key=sk-test"],
        },
    ],
)
def test_the_servers_keys_reach_the_router_however_they_are_given(
    make: Any, keys: dict[str, Any]
) -> None:
    layout = layouts.Layout(make(**keys))
    argv = layout.router_argv(["http://127.0.0.1:1"], [2], ["http://127.0.0.1:3"], 4)
    options = parse_options(argv)
    assert (options.api_key, options.client_api_key) == ("sk-test", "sk-test")
    assert options.admin_api_key == "sk-admin"


def test_a_key_that_one_router_cannot_send_is_refused_with_the_flags(make: Any) -> None:
    args = {"prefill_args": ["--api-key", "a"], "decode_args": ["--api-key", "b"]}
    with pytest.raises(ClusterError, match=r"--api-key: differs .*--prefill-args.*--decode-args"):
        layouts.Layout(make(**args))
    with pytest.raises(ClusterError, match="--api-key: sglang_router"):
        layouts.Layout(make(router="random", server_args=["--api-key", "a"]))


def test_a_cluster_bears_its_keys_where_servers_and_router_ask_for_them(make: Any) -> None:
    keys = ["--api-key", "sk-test", "--admin-api-key", "sk-admin"]
    said: list[str] = []
    with Cluster(make(server_args=keys, say=said.append)) as cluster:
        assert "posted /freeze_gc Bearer sk-admin" in argv_of(cluster, "p0")
        assert "posted /generate Bearer sk-test" in argv_of(cluster, "router")
    with Cluster(make(server_args=keys, router_args=["--client-api-key", "mine"])) as cluster:
        assert "posted /generate Bearer mine" in argv_of(cluster, "router")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"router": "magic"}, "router: must be one of kairos, random, none, got 'magic'"),
        ({"prefill": 0}, "at least one prefill"),
        (
            {"decode_args": ["--port=1"]},
            "--port=1: leave it out; the cluster sets it for each server",
        ),
    ],
)
def test_specs_that_make_no_sense(make: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        make(**changes)


def test_on_a_gpu_a_model_is_needed(make: Any) -> None:
    with pytest.raises(ClusterError, match="--model-path is needed"):
        Cluster(make(model_path="")).start()


def test_the_command_line_sorts_flags_by_whom_they_are_for() -> None:
    words = "--prefill 2 --port 0 --tp 2 --kairos-max-wait 5 --decode-args --enable-x --quiet"
    spec, options = parse(
        [*words.split(), "--prefill-args", "--a 1 --b", "--", "--mem-fraction-static", "0.5"]
    )
    assert (spec.prefill, spec.decode, spec.port, options.quiet) == (2, 1, 0, True)
    assert spec.server_args == ["--tp", "2", "--mem-fraction-static", "0.5"]
    assert (spec.decode_args, spec.prefill_args) == (["--enable-x"], ["--a", "1", "--b"])
    assert spec.kairos is True
    assert spec.env["KAIROS_MAX_WAIT"] == "5"
    assert parse(["--kairos", "off"])[0].kairos is False
