"""What travels to a GPU machine, and the report that comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from benchmark.gpu import run
from benchmark.gpu.parts import kv_capacity
from benchmark.gpu.report_gpu import markdown
from benchmark.gpu.shape import SHAPES, write_shape
from contrib.air_gapped import pack
from hypothesis import given
from hypothesis import strategies as st

from sglang_kairos.loads.traces import Request


def make_wheel(folder: Path, name: str, files: dict[str, str], needs: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    own = [f"{info}/{part}" for part in ("METADATA", "WHEEL", "RECORD")]
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    record = "".join(f"{file},,\n" for file in [*files, *own])
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", record)
    return path


def test_a_trimmed_wheel_keeps_a_true_record(tmp_path: Path) -> None:
    files = {"k/__init__.py": "", "k/sm90/common_ops.abi3.so": "90", "k/flash_ops.abi3.so": "big"}
    wheel = make_wheel(tmp_path, "k", files)
    pack.trim(wheel, tmp_path / "small.whl", pack.TRIMMED["sglang-kernel"])
    with zipfile.ZipFile(tmp_path / "small.whl") as archive:
        names = archive.namelist()
        record = archive.read("k-1.0.dist-info/RECORD").decode()
    assert "k/flash_ops.abi3.so" not in names
    assert {"k/__init__.py", "k/sm90/common_ops.abi3.so"} <= set(names)
    assert sorted(line.split(",")[0] for line in record.splitlines()) == sorted(names)


@given(sizes=st.lists(st.integers(1, 90), max_size=30))
def test_parts_hold_every_file_once_and_keep_the_bound(sizes: list[int]) -> None:
    most = 100 + 2048 * 40
    files = {Path(f"f{index}"): size for index, size in enumerate(sizes)}
    parts = pack.filled(files, most)
    assert sorted(file for part in parts for file in part) == sorted(files)
    assert all(sum(files[file] + 2048 for file in part) <= most for part in parts)


def test_a_file_larger_than_a_part_is_named() -> None:
    with pytest.raises(pack.PackError, match=r"big\.whl.*--most-mib"):
        pack.filled({Path("big.whl"): 10**9}, 10**8)


def test_the_list_of_wheels_is_well_formed_and_disjoint_from_what_is_there() -> None:
    wanted = pack.read_wanted()
    names = [one.name for one in wanted]
    assert len(set(names)) == len(names)
    assert not set(names) & pack.read_present()
    assert {"sglang", "sglang-kernel", "flashinfer-python"} <= set(names)
    assert set(pack.TRIMMED) <= set(names)


@pytest.mark.parametrize("line", ["sglang base", "sglang==1", "sglang==1 other", "a==1 base x"])
def test_a_bad_line_of_the_list_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "wheels.txt").write_text(f"# ok\n{line}\n")
    with pytest.raises(pack.PackError, match=r"wheels\.txt:2"):
        pack.read_wanted(tmp_path / "wheels.txt")


def test_a_need_that_nobody_meets_is_told(tmp_path: Path) -> None:
    needs = ("b>=1", "c; python_version < '3'", "D-e", "torch", 'z; extra == "x"')
    wheels = [make_wheel(tmp_path, "a", {}, needs), make_wheel(tmp_path, "b", {}, ("a>=2",))]
    assert pack.unmet(wheels, {"torch"}, "3.12") == [
        "a needs d-e: neither in wheels.txt nor in present.txt",
        "b needs a>=2, packed is 1.0",
    ]


def test_listing_asks_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack.subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    assert pack.main(["--list"]) == 0
    assert "sglang==0.5.16" in capsys.readouterr().out


def test_parts_come_one_by_one_and_are_installed_when_complete(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out, into = tmp_path / "cache", tmp_path / "parts", tmp_path / "into"
    heavy = {"filler.bin": "".join(chr(33 + i * 7919 % 90) for i in range(9 << 20))}
    for name in ("one", "two", "three"):
        make_wheel(cache, name, {f"{name}.py": f"NAME = {name!r}\n", **heavy})
    wanted = [pack.WantedWheel("one", "1.0", "base"), pack.WantedWheel("two", "1.0", "base")]
    wanted.append(pack.WantedWheel("three", "1.0", "transfer"))
    monkeypatch.setattr(pack, "read_wanted", lambda: wanted)
    monkeypatch.setattr(pack, "TREE", ("benchmark/gpu", "contrib"))
    words = ["--out", str(out), "--cache", str(cache), "--most-mib", "16"]
    assert pack.main(words) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert [part["group"] for part in manifest["parts"]] == ["base", "base", "transfer"]
    assert all(part["bytes"] <= 16 << 20 for part in manifest["parts"])
    alone = tmp_path / "install.py"
    alone.write_text((repo_root / "contrib" / "air_gapped" / "install.py").read_text())

    def install(*names: str) -> str:
        folder = tmp_path / "carried"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name in ("manifest.json", *names):
            (folder / name).write_bytes((out / name).read_bytes())
        command = [sys.executable, str(alone), str(folder), str(into), "--no-pip"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    first, second, third = (part["file"] for part in manifest["parts"])
    assert f"not here yet: {second}" in install(first)
    assert not (into / "env.sh").exists()
    assert "installed 2 wheels" in install(second)
    assert "installed 1 wheels" in install(third)
    assert (into / "tree" / "benchmark" / "gpu" / "run.py").exists()
    assert (into / "tree" / "contrib" / "air_gapped" / "setup.sh").exists()
    script = f". {into}/env.sh && {sys.executable} -Sc 'import one, two, three; print(one.NAME)'"
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "one\n"
    (out / first).write_bytes(b"damaged")
    assert "damaged on the way" in install(first)


def test_without_a_gpu_the_benchmark_says_so_and_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = run.cpu_runtime.Decision(True, "no GPU was found")
    monkeypatch.setattr(run.cpu_runtime, "decide", lambda: decision)
    assert run.main([]) == 0
    assert "skipped: this machine has no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"), [(["--parts", "x"], "--parts: 'x'"), (["--budget-s", "0"], "--budget-s")]
)
def test_a_bad_setting_is_named(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.parse(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_config_and_a_tokenizer_without_weights(name: str, tmp_path: Path) -> None:
    folder = write_shape(tmp_path, name, layers=3)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"] == 4096
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_kv_bounds_the_rate_that_is_sent() -> None:
    rows = [Request(0.0, 900, 200)] * 5
    rate = kv_capacity(100_000, rows, 10.0)
    abreast = rate * 200 * 0.010  # how many are in at once, 2 s each
    assert abreast * (900 + 100) == pytest.approx(90_000)


def a_run(policy: str, part: str, attained: float) -> dict[str, Any]:
    return {
        "policy": policy,
        "part": part,
        "slo": {"ttft_ms": 1000.0, "tpot_ms": 20.0},
        "ttft_attainment": attained,
        "tpot_attainment": attained,
        "e2e_attainment": attained,
        "goodput_rps": 3.0,
        "decode_tokens_per_s": 100.0,
        "ttft_p99_ms": None,
        "tpot_p99_ms": 19.0,
        "failed": 0,
        "scheduler_cpu_s": 1.0,
        **({"kairos_decode": {"decode_error": {"mape": 0.031}}} if policy == "kairos" else {}),
    }


def test_the_markdown_has_a_table_a_part_and_shows_the_spread() -> None:
    runs = [a_run("stock", "decode", 0.5), a_run("kairos", "decode", 0.8)]
    runs += [a_run("kairos", "decode", 0.9), a_run("stock", "pd", 1.0)]
    steady = [
        {"policy": name, "batch": 16, "step_ms": 5.0, "scheduler_cpu_ms_per_step": 0.5}
        for name in ("stock", "kairos")
    ]
    setup = {
        "platform": "CPU (2 cores)",
        "shape": "tiny",
        "load": 1.2,
        "steady": steady,
        "identity": {"stock against chaos": {"requests": 24, "equal": 24}},
        "skipped": {"prefill": "10 s of the budget left"},
    }
    text = markdown({"runs": runs, "setup": setup})
    assert "### decode: TTFT 1000 ms, TPOT 20 ms" in text and "### pd" in text
    assert "| kairos | 85.0 (80.0–90.0) |" in text
    assert "3.1 (3.1–3.1)" in text
    assert "| stock | 16 | 5.000 | 0.500 |" in text
    assert "24 of 24 requests equal" in text
    assert "skipped: prefill: 10 s of the budget left" in text
