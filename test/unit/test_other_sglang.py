"""Other SGLangs: put beside the installed one whole or not at all; which of them tests draw."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.trees import NEWEST, OLDEST, versions_to_test
from sglang_kairos import other_sglang
from sglang_kairos.engine.seams.table import SUPPORTED_VERSIONS
from sglang_kairos.other_sglang import NEEDS, NoSuchSglang, fetch, folder_of


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip was asked to install, each time; it knows no 9.9.9."""
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        at = command.index("--target")
        target, packages = Path(command[at + 1]), command[at + 2 :]
        asked.append(packages)
        for package in packages:
            name, _, version = package.partition("==")
            (target / name).mkdir(parents=True)
            (target / name / "__init__.py").write_text(f"version = {version!r}")
            if version == "9.9.9":
                said = "WARNING: x\nERROR: No matching distribution found for sglang==9.9.9\n"
                return SimpleNamespace(returncode=1, stderr=said)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_a_version_is_fetched_once_and_shares_what_others_need_too(
    tmp_path: Path, pip: list[list[str]]
) -> None:
    folders = [fetch(version, tmp_path) for version in ("0.5.16", "v0.5.17", "0.5.22", "0.5.17")]
    old = list(NEEDS["0.5.16"])
    assert pip == [old, ["sglang==0.5.16"], ["sglang==0.5.17"], ["sglang==0.5.22"]]
    assert folders[1] == folders[3] == folder_of("0.5.17", tmp_path)
    for folder in folders[:2]:
        names = [requirement.partition("==")[0] for requirement in old]
        assert all((folder / name / "__init__.py").is_file() for name in names)
        assert all((folder / name).is_symlink() for name in names)
    assert not any(entry.is_symlink() for entry in folders[2].iterdir())


def test_what_pip_cannot_get_leaves_nothing_behind(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(NoSuchSglang, match=r"sglang==9\.9\.9: ERROR: No matching distribution"):
        fetch("9.9.9", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert other_sglang.main(["9.9.9"]) == 1
    assert other_sglang.main([]) == 0, "a run of the newest alone needs no other"


def test_every_version_is_drawn_in_turn() -> None:
    drawn = {versions_to_test("", day) for day in range(20261120, 20261126)}
    assert {versions[1] for versions in drawn} == set(SUPPORTED_VERSIONS[1:-1])
    assert all((found[0], found[-1]) == (NEWEST, OLDEST) and len(found) == 3 for found in drawn)


def test_tested_versions_may_be_named() -> None:
    assert versions_to_test("all", 1) == SUPPORTED_VERSIONS
    assert versions_to_test("0.5.18, 0.5.20", 1) == (NEWEST, "0.5.20", "0.5.18")
    with pytest.raises(ValueError, match=r"0\.5\.3"):
        versions_to_test("0.5.3", 1)
