"""What every test may use, and the order the tests run in: cheapest first."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy two-core machine draws examples slowly; that says nothing about the code under test.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("unit", "sim", "e2e", "fault")


def _folder(item: pytest.Item) -> str:
    return next((name for name in FOLDERS if ROOT / "test" / name in item.path.parents), "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by folder, and marks test/e2e as what it is."""
    for item in items:
        if _folder(item) == "e2e":
            item.add_marker("e2e")
    rank = {folder: i for i, folder in enumerate(FOLDERS)}
    items.sort(key=lambda item: rank.get(_folder(item), len(FOLDERS)))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top of the working tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path | None:
    """Traces and measured tables that only some machines have, or None: then use made-up ones."""
    for candidate in (ROOT / "shared", ROOT.parent / "shared"):
        if (candidate / "traces").is_dir():
            return candidate
    return None


@pytest.fixture(scope="session")
def out_dir() -> Path:
    """out/test: logs and records worth keeping after a run. Use tmp_path for the rest."""
    path = ROOT / "out" / "test"
    path.mkdir(parents=True, exist_ok=True)
    return path
