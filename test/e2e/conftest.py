"""Real servers for the end-to-end tests: one zygote pays for SGLang's imports, clusters fork from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_kairos.cpu.zygote import Zygote

STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks stock SGLang servers with the strict memory check on; this folder's launchers are known.

    prometheus-client asks once, when it is imported, whether processes share their metrics. Servers
    that export any name a folder of their own.
    """
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    shared = str(tmp_path_factory.mktemp("metrics"))
    env = {**STRICT, "PYTHONPATH": path, "PROMETHEUS_MULTIPROC_DIR": shared}
    with Zygote(preload=["sglang_kairos.launch_router"], env=env) as started:
        yield started


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
    ignored = shutil.ignore_patterns("__pycache__")
    source = next(iter(found.submodule_search_locations))
    shutil.copytree(source, folder / "sglang", ignore=ignored)
    command = [sys.executable, "-m", "sglang_kairos.tools.patch", "apply"]
    command += ["--tree", str(folder / "sglang"), "--version", "0.5.23"]
    subprocess.run(command, check=True)
    return folder
