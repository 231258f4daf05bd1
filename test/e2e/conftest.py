"""What the end-to-end tests share; their zygote is in the folder above."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.trees import NEWEST, patched_copy, sglang_folder
from sglang_kairos.cluster.run import Cluster


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
    """`patched_copy` of the installed SGLang."""
    return patched_copy(sglang_folder(NEWEST), tmp_path_factory.mktemp("patched"), NEWEST)
