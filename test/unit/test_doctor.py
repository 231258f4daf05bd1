"""The doctor on the SGLangs that are here, on damaged ones and on none."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.trees import TESTED_VERSIONS, sglang_folder
from sglang_kairos import other_sglang
from sglang_kairos.config import ConfigError
from sglang_kairos.engine.seams import SEAMS
from sglang_kairos.other_sglang import NoSuchSglang, first_on_path, folder_of
from sglang_kairos.tools import doctor

Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugin and runtime are this machine's own affair."""
    monkeypatch.setattr(doctor, "check_loadable", lambda: None)
    monkeypatch.setattr(doctor, "about_runtime", lambda: doctor.Check("runtime", True, "fine"))


def damaged(folder: Path, version: str, changes: dict[str, tuple[str, str]]) -> Path:
    """A copy of what the seams and patches touch, with texts replaced in some files."""
    source, target = sglang_folder(version) / "sglang", folder / "sglang"
    folders = ("managers", "disaggregation", "entrypoints", "mem_cache", "sampling")
    for name in (f"srt/{folder}" for folder in folders):
        for path in (source / name).rglob("*.py"):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    for name in ("__init__.py", "_version.py"):
        (target / name).write_text((source / name).read_text())
    for name, (old, new) in changes.items():
        text = (target / name).read_text()
        assert old in text
        (target / name).unlink()
        (target / name).write_text(text.replace(old, new))
    return folder


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_a_supported_sglang_is_well(version: str, capsys: Printed) -> None:
    assert doctor.main(["--sglang", str(sglang_folder(version))]) == 0
    text = capsys.readouterr().out
    count = sum(version in seam.fingerprints for seam in SEAMS)
    assert "!!" not in text
    assert f"SGLang     {version} in " in text
    assert f"{count} of {count} as Kairos knows them from v{version}" in text
    assert f"for v{version} fit, 0 applied" in text


def test_what_moved_is_named_with_where_it_may_be_now(tmp_path: Path, capsys: Printed) -> None:
    policy, batch = "srt/managers/schedule_policy.py", "srt/managers/schedule_batch.py"
    tree = damaged(
        tmp_path,
        "0.5.23",
        {
            policy: ("class SchedulePolicy:", "class Policy:"),
            batch: ("def prepare_for_decode(self):", "def prepare_for_decode(self, now=None):"),
        },
    )
    assert doctor.main(["--sglang", str(tree)]) == 1
    text = capsys.readouterr().out
    module = "sglang.srt.managers.schedule_policy"
    assert f"gone: {module}:SchedulePolicy.calc_priority: SGLang has no such function" in text
    assert f"same name: {module}:Policy.calc_priority" in text
    assert "changed: sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_decode" in text
    known = sum("0.5.23" in seam.fingerprints for seam in SEAMS)
    assert f"!!  seams      {known - 3} of {known} as Kairos knows them from v0.5.23" in text
    assert "!!  patches    3 of 4 for v0.5.23 fit" in text
    assert "docs/upstream.md" in text and "--kairos off" in text


def test_an_unknown_version_with_known_functions_is_well(tmp_path: Path, capsys: Printed) -> None:
    tree = damaged(tmp_path, "0.5.23", {"_version.py": ("0.5.23", "0.5.99")})
    assert doctor.main(["--sglang", str(tree)]) == 0
    assert "0.5.99 in " in (text := capsys.readouterr().out) and "runs as 0.5.23" in text


def test_a_tree_without_a_version_is_judged_by_its_source(tmp_path: Path, capsys: Printed) -> None:
    tree = damaged(tmp_path, "0.5.23", {})
    (tree / "sglang" / "_version.py").unlink()
    assert doctor.main(["--sglang", str(tree)]) == 0
    assert "does not say its version; taken for 0.5.23" in capsys.readouterr().out


def test_no_sglang_and_no_plugin_are_reported(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ConfigError("sglang-kairos is not installed")

    monkeypatch.setattr(doctor, "check_loadable", missing)
    assert doctor.main(["--sglang", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "!!  plugin     sglang-kairos is not installed" in text
    assert f"!!  SGLang     {tmp_path} holds no SGLang" in text


def beside(prefix: Path, version: str) -> Path:
    package = prefix / f"sglang-{version}" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return package.parent


def test_another_sglang_is_named_by_folder_or_version(tmp_path: Path) -> None:
    folder = beside(tmp_path, "1.2.3")
    assert folder_of(str(folder)) == folder
    assert folder_of("1.2.3", tmp_path) == folder_of("v1.2.3", tmp_path) == folder
    with pytest.raises(NoSuchSglang, match=r"--sglang 1\.2\.4: .* 1\.2\.3 "):
        folder_of("1.2.4", tmp_path)
    with pytest.raises(NoSuchSglang, match="none"):
        folder_of("1.2.4", tmp_path / "empty")


def test_another_sglang_goes_first_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beside(tmp_path, "1.2.3")
    assert first_on_path(folder, {}) == {"PYTHONPATH": str(folder)}
    assert first_on_path(folder, {"PYTHONPATH": "a:b"}) == {"PYTHONPATH": f"{folder}:a:b"}
    monkeypatch.setattr(sys, "path", ["before"])
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    monkeypatch.setenv("PYTHONPATH", "c")
    assert other_sglang.use(str(folder)) == folder
    assert sys.path == [str(folder), "before"]
    assert os.environ["PYTHONPATH"] == f"{folder}:c"
    monkeypatch.setitem(sys.modules, "sglang", ModuleType("sglang"))
    with pytest.raises(NoSuchSglang, match="imported already"):
        other_sglang.use(str(folder))
