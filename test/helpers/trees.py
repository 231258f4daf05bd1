"""The SGLang versions that tests run on: the installed one, and those beside it.

    python test/helpers/trees.py

prints the versions that a test run needs beside the installed one. By default those are the oldest
and one other, drawn by date; ``KAIROS_TEST_VERSIONS`` names others, or all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pytest

from sglang_kairos.engine.seams.table import SUPPORTED_VERSIONS
from sglang_kairos.other_sglang import NoSuchSglang, folder_of
from sglang_kairos.versions import patch

ROOT = Path(__file__).resolve().parent.parent.parent
NEWEST, *_BETWEEN, OLDEST = SUPPORTED_VERSIONS


def seed() -> int:
    """What draws: `KAIROS_FLAGS_SEED`, else today's date as 20261128."""
    return int(os.environ.get("KAIROS_FLAGS_SEED") or f"{date.today():%Y%m%d}")


def versions_to_test(named: str, draw: int) -> tuple[str, ...]:
    """Newest first; the newest is always among them. ValueError for a version that is not supported."""
    if named.strip() == "all":
        return SUPPORTED_VERSIONS
    chosen = set(named.replace(",", " ").split()) or {OLDEST, _BETWEEN[draw % len(_BETWEEN)]}
    if unknown := chosen.difference(SUPPORTED_VERSIONS):
        raise ValueError(f"KAIROS_TEST_VERSIONS: {min(unknown)} is none of {SUPPORTED_VERSIONS}")
    return tuple(version for version in SUPPORTED_VERSIONS if version in {NEWEST, *chosen})


TESTED_VERSIONS = versions_to_test(os.environ.get("KAIROS_TEST_VERSIONS", ""), seed())


def sglang_folder(version: str) -> Path:
    """The folder for PYTHONPATH that holds SGLang `version`; skips the test without one."""
    try:
        installed = patch.find_tree()
        if installed.version is not None and installed.version.split("+")[0] == version:
            return installed.root.parent
    except patch.PatchError:
        pass
    for where in (version, str(ROOT / "out" / f"sglang-{version}")):
        try:
            return folder_of(where)
        except NoSuchSglang:
            continue
    pytest.skip(f"SGLang {version} is not here: `kairos sglang {version}` installs it")


def changed_copy(folder: Path, version: str, changes: Mapping[str, tuple[str, str]]) -> Path:
    """A folder for PYTHONPATH with that SGLang in links, and in some files one text for another."""
    source, target = sglang_folder(version) / "sglang", folder / "sglang"
    folders = {parent for name in changes for parent in Path(name).parents}
    for here in sorted(folders):
        (target / here).mkdir(parents=True, exist_ok=True)
        for entry in (source / here).iterdir():
            inner = here / entry.name
            if inner not in folders and str(inner) not in changes and entry.name != "__pycache__":
                (target / inner).symlink_to(entry)
    for name, (old, new) in changes.items():
        text = (source / name).read_text(encoding="utf-8")
        assert old in text, f"{name} has no {old!r}"
        (target / name).write_text(text.replace(old, new), encoding="utf-8")
    return folder


def patched_copy(source: Path, folder: Path, version: str) -> Path:
    """A folder for PYTHONPATH like `source`, with all patches applied to its SGLang."""
    # With the compiled modules: they stay valid, save for those of files that are patched.
    shutil.copytree(source / "sglang", folder / "sglang")
    if source != sglang_folder(NEWEST):
        for entry in source.iterdir():  # what that version needs beside it
            if entry.is_symlink():
                (folder / entry.name).symlink_to(entry.resolve())
    command = [sys.executable, "-m", "sglang_kairos.versions.patch", "apply"]
    command += ["--tree", str(folder / "sglang"), "--version", version]
    subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    print(" ".join(TESTED_VERSIONS[1:]))
