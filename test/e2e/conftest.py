"""What the end-to-end tests share; their zygote is in the folder above."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_kairos.cluster import Cluster


@pytest.fixture(scope="session", autouse=True)
def servers_end_at_once() -> Iterator[None]:
    """SGLang looks for a SIGTERM every five seconds; here nothing is left that has to end well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "stop", functools.partialmethod(Cluster.stop, 0.0))
        yield


@pytest.fixture(scope="session")
def tiny_model(out_dir: Path) -> str:
    """A generated float32 model whose greedy outputs vary."""
    from sglang_kairos.cpu.tiny_model import make_tiny_model

    return str(make_tiny_model(out_dir.parent / "tiny"))


@pytest.fixture(scope="session")
def patched_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a copy of the installed SGLang, all patches applied."""
    import importlib.util
    import shutil
    import subprocess
    import sys

    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    folder = tmp_path_factory.mktemp("patched")
    source = next(iter(found.submodule_search_locations))
    # With the compiled modules: they stay valid, save for those of files that are patched.
    shutil.copytree(source, folder / "sglang")
    command = [sys.executable, "-m", "sglang_kairos.tools.patch", "apply"]
    command += ["--tree", str(folder / "sglang"), "--version", "0.5.23"]
    subprocess.run(command, check=True)
    return folder
