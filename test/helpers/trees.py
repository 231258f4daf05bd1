"""The SGLang versions that this environment has: the installed one, and those beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_kairos.other_sglang import NoSuchSglang, folder_of
from sglang_kairos.tools import patch

ROOT = Path(__file__).resolve().parent.parent.parent


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
    pytest.skip(f"SGLang {version} is not here; scripts/bootstrap.sh installs it")
