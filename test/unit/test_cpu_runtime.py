"""The CPU runtime: when it applies, that it is harmless twice, and that its stand-ins are right."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos.cpu import adapt, flags, runtime, site, zygote
from sglang_kairos.cpu.__main__ import main

SOURCE = Path(runtime.__file__).resolve().parents[2]


def machine(tmp_path: Path, *files: str) -> str:
    """A root folder that holds the given files; returns its path."""
    (tmp_path / "dev").mkdir()
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(tmp_path)


@pytest.fixture
def meta_path() -> Iterator[None]:
    """Restores `sys.meta_path`."""
    before = list(sys.meta_path)
    sys.meta_path[:] = [one for one in before if not isinstance(one, runtime.ImportHook)]
    yield
    sys.meta_path[:] = before


@pytest.mark.parametrize("value", ["auto", "on", "AUTO", " on ", "", None])
def test_without_a_gpu_it_is_on_unless_told_otherwise(value: str | None, tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("auto means Linux only")
    env = {} if value is None else {"KAIROS_CPU": value}
    assert runtime.should_activate(env, machine(tmp_path))


def test_off_is_off(tmp_path: Path) -> None:
    assert not runtime.should_activate({"KAIROS_CPU": "off"}, machine(tmp_path))


@pytest.mark.parametrize("value", ["auto", "on", "off", None])
@pytest.mark.parametrize(
    "sign",
    [
        "dev/nvidia0",
        "dev/nvidiactl",
        "dev/nvidia-uvm",
        "dev/kfd",
        "dev/dxg",
        "proc/driver/nvidia/version",
        "usr/lib/x86_64-linux-gnu/libcuda.so.1",
    ],
)
def test_never_with_a_gpu(sign: str, value: str | None, tmp_path: Path) -> None:
    env = {} if value is None else {"KAIROS_CPU": value}
    root = machine(tmp_path, sign)
    assert runtime.cuda_present(root)
    assert not runtime.should_activate(env, root)


def test_asking_for_it_with_a_gpu_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not runtime.should_activate({"KAIROS_CPU": "on"}, machine(tmp_path, "dev/nvidia0"))
    assert "has a GPU" in capsys.readouterr().err


def test_an_unknown_value_warns_and_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not runtime.should_activate({"KAIROS_CPU": "yes"}, machine(tmp_path))
    assert "KAIROS_CPU must be one of auto, on, off, got 'yes'" in capsys.readouterr().err


def test_activate_refuses_on_a_machine_with_a_gpu(
    meta_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "cuda_sign", lambda: "/dev/nvidia0")
    with pytest.raises(RuntimeError, match="GPU"):
        runtime.activate()
    assert not runtime.is_active()


def test_activate_twice_is_activate_once(meta_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cuda_sign", lambda: None)
    runtime.activate()
    installed = list(sys.meta_path)
    runtime.activate()
    assert sys.meta_path == installed
    assert runtime.is_active()


def test_env_defaults_do_not_overwrite() -> None:
    env = {"OMP_NUM_THREADS": "4"}
    adapt.set_env_defaults(env)
    assert env["OMP_NUM_THREADS"] == "4"
    assert env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert env["MC_FORCE_TCP"] == "1"


def standin() -> ModuleType:
    spec = adapt.adapted("sgl_kernel", None)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cuda_wheel_is_replaced_and_a_cpu_build_kept(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("sgl_kernel", tmp_path / "__init__.py")
    assert adapt.adapted("sgl_kernel", spec) is spec
    (tmp_path / "sm90").mkdir()
    replaced = adapt.adapted("sgl_kernel", spec)
    assert replaced is not None
    assert str(replaced.origin).endswith("sgl_kernel_standin.py")


def test_unknown_kernels_import_but_do_not_run() -> None:
    kernel = standin().some_gpu_kernel
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.some_gpu_kernel"):
        kernel(1, two=2)
    with pytest.raises(AttributeError):
        _ = standin().__path__


TAKEN_AT_IMPORT = (
    "import torch\n"
    "first = torch.ops.sgl_kernel.kairos_test_first\n"
    "class Layer:\n"
    "    second = torch.ops.sgl_kernel.kairos_test_second.default\n"
)
ASKED_FOR = (
    "import torch\n"
    "known = hasattr(torch.ops.sgl_kernel, 'kairos_test_third')\n"
    "got = getattr(torch.ops.sgl_kernel, 'kairos_test_third', None)\n"
    "try:\n"
    "    torch.ops.sgl_kernel.kairos_test_third\n"
    "    tried = True\n"
    "except AttributeError:\n"
    "    tried = False\n"
)


def test_operators_that_models_take_at_import_are_there_and_do_not_run() -> None:
    """None of the names is known: any that a newer SGLang brings is answered."""
    standin()
    names: dict[str, Any] = {"__name__": "model"}
    exec(TAKEN_AT_IMPORT, names)
    for operator, name in ((names["first"], "first"), (names["Layer"].second, "second")):
        with pytest.raises(NotImplementedError, match=f"sgl_kernel.kairos_test_{name}"):
            operator(1, two=2)


def test_who_asks_whether_there_is_an_operator_hears_no() -> None:
    standin()
    names: dict[str, Any] = {}
    exec(ASKED_FOR, names)
    assert (names["known"], names["got"], names["tried"]) == (False, None, False)


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_every_operator_that_this_sglang_takes_at_import_is_answered(version: str) -> None:
    """The statements themselves, out of the sources: importing all models takes a minute."""
    standin()
    taken = []
    for file in (sglang_folder(version) / "sglang" / "srt").rglob("*.py"):
        text = file.read_text(encoding="utf-8", errors="replace")
        if "torch.ops.sgl_kernel." not in text:
            continue
        for line in re.findall(r"^ {0,4}\w+ = (torch\.ops\.sgl_kernel\.\w+)$", text, re.M):
            names: dict[str, Any] = {}
            exec(f"import torch\nfound = {line}", names)
            taken.append(line)
            assert callable(names["found"]), (file, line)
    assert len(taken) >= 3


@pytest.mark.parametrize("seed", range(5))
def test_assign_req_to_token_pool_matches_a_naive_loop(seed: int) -> None:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> Any:
        return torch.randint(low, high, (count,), generator=generator)

    rows, width, requests = 12, 40, 7
    table = torch.full((rows, width), -1, dtype=torch.int32)
    indices = torch.randperm(rows, generator=generator)[:requests]
    start = draw(0, 20, requests)
    end = start + draw(0, 20, requests)  # includes empty ranges
    slots = torch.randperm(1000, generator=generator)[: int((end - start).sum())]

    expected = table.clone()
    position = 0
    for i in range(requests):
        for column in range(int(start[i]), int(end[i])):
            expected[indices[i], column] = slots[position]
            position += 1

    standin().assign_req_to_token_pool_cpu(indices, table, start, end, slots, width)
    assert torch.equal(table, expected)


def test_prefill_gets_events_and_buffers_that_need_no_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    module = ModuleType("sglang.srt.disaggregation.prefill")
    module.__dict__["torch"] = torch
    adapt._make_events_portable(module)
    patched = module.__dict__["torch"]
    adapt._make_events_portable(module)
    assert module.__dict__["torch"] is patched, "twice is once"

    event = patched.cuda.Event()
    event.record(patched.cuda.current_stream())
    event.synchronize()
    assert event.query()
    buffer = patched.empty((3,), dtype=torch.int64, device="cpu", pin_memory=True)
    assert buffer.shape == (3,)
    assert buffer.dtype == torch.int64
    assert patched.Tensor is torch.Tensor
    assert patched.cuda.is_available() is False
    with pytest.raises(RuntimeError):
        torch.empty(1, pin_memory=True)  # the real torch is untouched


def test_children_are_forked_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    fake = ModuleType("multiprocessing")
    fake.__dict__["set_start_method"] = lambda method, force=False: calls.append((method, force))

    def engine() -> ModuleType:
        module = ModuleType("engine")
        module.__dict__["mp"] = fake
        adapt._fork_children(module)
        module.__dict__["mp"].set_start_method("spawn", force=True)
        return module

    monkeypatch.delenv(adapt.START_VARIABLE, raising=False)
    engine()
    monkeypatch.setenv(adapt.START_VARIABLE, "fork")
    engine()
    assert calls == [("spawn", True), ("fork", True)]


def run_python(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in an interpreter for which `folder` is a site folder."""
    site_line = f"import site; site.addsitedir({str(folder)!r}); "
    return subprocess.run(
        [sys.executable, "-c", site_line + code],
        env={**os.environ, "PYTHONPATH": str(SOURCE), **env},
        capture_output=True,
        text=True,
        check=True,
    )


def test_install_and_uninstall(tmp_path: Path) -> None:
    path = site.install(tmp_path)
    assert path.parent == tmp_path
    lines = path.read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")
    assert "installed: " in site.status(tmp_path)
    assert site.uninstall(tmp_path) is True
    assert site.uninstall(tmp_path) is False
    assert "not installed" in site.status(tmp_path)


def test_status_command_speaks_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "start-up hook" in out
    assert "this machine" in out
    assert "this process" in out


@pytest.mark.skipif(runtime.cuda_present(), reason="there is a GPU")
def test_the_pth_line_activates_cheaply(tmp_path: Path) -> None:
    site.install(tmp_path)
    code = (
        "import sys; from sglang_kairos.cpu import runtime; "
        "print(runtime.is_active(), 'torch' in sys.modules, 'typing' in sys.modules)"
    )
    on = run_python(code, tmp_path, KAIROS_CPU="on")
    assert on.stdout.split() == ["True", "False", "False"]
    assert run_python(code, tmp_path, KAIROS_CPU="off").stdout.split()[0] == "False"


def test_the_pth_line_is_silent_when_the_package_is_gone(tmp_path: Path) -> None:
    site.install(tmp_path)
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import site; site.addsitedir({str(tmp_path)!r})"],
        cwd=empty,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_flags_fill_in_what_is_missing() -> None:
    argv = ["--model-path", "m", "--disaggregation-mode", "decode", "--dtype=bfloat16"]
    completed = flags.with_server_flags(argv)
    assert completed[: len(argv)] == argv
    assert "--dtype" not in completed
    backup = completed.index("--disaggregation-decode-retraction-backup")
    assert completed[backup + 1] == "cpu_tensor"
    assert flags.with_server_flags(completed) == completed


@pytest.mark.parametrize(
    ("argv", "mode"),
    [
        ([], "null"),
        (["--disaggregation-mode", "prefill"], "prefill"),
        (["--disaggregation-mode=decode"], "decode"),
        (["--disaggregation-mode=decode", "--disaggregation-mode", "null"], "null"),
    ],
)
def test_mode_of(argv: list[str], mode: str) -> None:
    assert flags.mode_of(argv) == mode


def test_flags_follow_mode_and_version() -> None:
    def of(mode: str, **more: Any) -> list[str]:
        return flags.with_server_flags(["--disaggregation-mode", mode], **more)

    backup = "--disaggregation-decode-retraction-backup"
    transfer = "--disaggregation-transfer-backend"
    assert transfer not in of("null")
    assert transfer in of("prefill")
    assert backup not in of("prefill")
    assert backup in of("decode", version="0.5.23.post1")
    assert backup in of("decode", version="0.5.18")
    assert backup not in of("decode", version="v0.5.17")
    assert "--skip-server-warmup" in of("null", fast_start=True)
    with pytest.raises(ValueError, match="mode"):
        of("both")


def test_flags_respect_other_spellings() -> None:
    completed = flags.with_server_flags(["--decode-cancellation-backend", "triton"])
    assert "--cancellation-backend" not in completed


DRAWS = (
    "import multiprocessing, random\n"
    "from sglang_kairos.router.request import body as pairing\n"
    "def draw(pipe):\n"
    "    body = {}\n"
    "    pairing.pair_up(body, None, 'h', 1)\n"
    "    pipe.send([pairing.unique_id(), str(body['bootstrap_room']), str(random.random())])\n"
    "for _ in range(2):\n"
    "    ours, theirs = multiprocessing.Pipe()\n"
    "    child = multiprocessing.get_context('fork').Process(target=draw, args=(theirs,))\n"
    "    child.start()\n"
    "    print(*ours.recv())\n"
    "    child.join()\n"
)


def test_forked_routers_and_their_forks_draw_different_ids_and_rooms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote, "PRELOADED", ())
    monkeypatch.setenv("PYTHONPATH", str(SOURCE) + os.pathsep + str(tmp_path))
    (tmp_path / "draws.py").write_text(DRAWS)
    with zygote.Zygote(preload=["sglang_kairos.router.request.body"]) as parent:
        logs = [tmp_path / "a.log", tmp_path / "b.log"]
        for draws in [parent.start("draws", [], log=log) for log in logs]:
            assert draws.wait(30) == 0
    words = [word for log in logs for word in log.read_text().split()]
    assert len(set(words)) == len(words) == 12


def test_a_zygote_answers_the_order_that_was_asked_after_one_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote, "PRELOADED", ())
    monkeypatch.setenv("PYTHONPATH", str(SOURCE) + os.pathsep + str(tmp_path))
    (tmp_path / "napper.py").write_text("import time; time.sleep(60)")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with zygote.Zygote() as parent:
        napper = parent.start("napper", [], log=tmp_path / "log")
        with monkeypatch.context() as patch:
            patch.setattr(parent, "_answer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                napper.send_signal(signal.SIGTERM)
        assert napper.wait(30) == -signal.SIGTERM


def test_a_zygote_starts_polls_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygote, "PRELOADED", ())
    monkeypatch.setenv("PYTHONPATH", str(SOURCE) + os.pathsep + str(tmp_path))
    (tmp_path / "napper.py").write_text(
        "import os, random, sys, time\n"
        "print(sys.argv[1:], os.environ['NAP'], random.random(), flush=True)\n"
        "time.sleep(float(os.environ['NAP']))\n"
        "sys.exit(3)\n"
    )
    with zygote.Zygote() as parent:
        logs = [tmp_path / "a.log", tmp_path / "b.log"]
        quick = parent.start("napper", ["--x", "1"], log=logs[0], env={"NAP": "0"})
        slow = parent.start("napper", [], log=logs[1], env={"NAP": "60"})
        assert quick.wait(30) == 3
        deadline = time.monotonic() + 30
        while not logs[1].read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert slow.poll() is None
        slow.stop(grace_s=30)
        assert slow.poll() == -signal.SIGTERM
    words = [log.read_text().split() for log in logs]
    assert words[0][:2] == ["['--x',", "'1']"]
    assert words[0][-1] != words[1][-1], "each fork draws its own random numbers"
    with pytest.raises(RuntimeError, match="ended"):
        parent.start("napper", [], log=logs[0])


def test_a_zygote_buries_the_orphans_of_a_child_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote, "PRELOADED", ())
    monkeypatch.setenv("PYTHONPATH", str(SOURCE) + os.pathsep + str(tmp_path))
    (tmp_path / "mother.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with zygote.Zygote() as parent:
        mother = parent.start("mother", [], log=tmp_path / "log")
        deadline = time.monotonic() + 30
        while not (tmp_path / "log").read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.02)
        child = Path("/proc", (tmp_path / "log").read_text().strip())
        assert child.exists()
        mother.stop(grace_s=0)
        while child.exists() and time.monotonic() < deadline:
            mother.poll()  # a kill takes effect when its process runs again
        assert not child.exists(), "it stays as a zombie"
        assert mother.poll() is not None
