"""What every test may use, which tests a run draws, and the order they run in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from helpers.fake_clock import JumpingLoop
from helpers.trees import seed

if TYPE_CHECKING:
    from sglang_kairos.cpu.zygote import Zygote

# A busy two-core machine draws examples slowly; that says nothing about the code under test.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("unit", "sim", "e2e", "fault")

# Files of unit/ and fault/ that start processes or wait for real time. `--part timed` runs only them,
# `--part pure` all but them: the rest of unit/ and sim/ does not mind how slowly it runs.
TIMED = (
    *(
        "cluster",
        "cluster_ends",
        "cpu_runtime",
        "doctor",
        "gpu_bench",
        "local_http",
        "other_sglang",
    ),
    *("patch", "port", "relied", "replay", "report", "seams"),
)
# Files of e2e/ that take longest, first: two run at a time, and the last should not run alone.
LONGEST = ("pausing", "identity", "versions", "serving", "gpu_dry_run", "bench_goodput", "profile")
ROUTER = "test_router"  # so begin the names of the router's tests, which have servers of their own


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part`: see `TIMED`."""
    parser.addoption("--part", choices=("pure", "timed"), help="see TIMED in test/conftest.py")


def is_timed(path: Path) -> bool:
    """Whether the tests in this file start processes or wait for real time."""
    return path.name.startswith(ROUTER) or path.stem.removeprefix("test_") in TIMED


def _folder(item: pytest.Item) -> str:
    return next((name for name in FOLDERS if ROOT / "test" / name in item.path.parents), "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Draws from tests that are `one_of`, picks the `--part`, marks test/e2e as what it is, sorts."""
    if config.option.markexpr == "not slow":
        left_out = not_drawn(items, seed())
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    if part := config.option.part:
        left_out = [item for item in items if is_timed(item.path) != (part == "timed")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        if _folder(item) == "e2e":
            item.add_marker("e2e")
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> tuple[int, int]:
    folder, name = _folder(item), item.path.stem.removeprefix("test_")
    return (
        FOLDERS.index(folder) if folder else len(FOLDERS),
        LONGEST.index(name) if folder == "e2e" and name in LONGEST else len(LONGEST),
    )


def not_drawn(items: Sequence[pytest.Item], seed: int) -> list[pytest.Item]:
    """All but one of the parameter sets of each test marked so, or of the tests of a named group."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("one_of"):
            family = marker.args[0] if marker.args else item.nodeid.partition("[")[0]
            families.setdefault(family, []).append(item)
    return [
        item
        for family in families.values()
        for place, item in enumerate(family)
        if place != seed % len(family)
    ]


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
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Pays once for SGLang's imports and forks stock servers, with the strict memory check on.

    The launchers in test/e2e are known. prometheus-client asks once, when it is imported, whether
    processes share their metrics; servers that export any name a folder of their own.
    """
    from sglang_kairos.cpu.zygote import Zygote

    path = os.pathsep.join(filter(None, [str(ROOT / "test/e2e"), os.environ.get("PYTHONPATH")]))
    env = {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "PYTHONPATH": path,
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics")),
    }
    with Zygote(preload=["sglang_kairos.launch_router"], env=env) as started:
        yield started


@pytest.fixture(scope="session")
def out_dir() -> Path:
    """out/test: logs and records worth keeping after a run. Use tmp_path for the rest."""
    path = ROOT / "out" / "test"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> str | tuple[str, dict[str, Any]]:
    """Async tests run on asyncio; those marked `fake_clock` in made-up time (`helpers.fake_clock`)."""
    if request.node.get_closest_marker("fake_clock"):
        return "asyncio", {"loop_factory": JumpingLoop}
    return "asyncio"
