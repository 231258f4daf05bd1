"""How the package is laid out: imports go one way, names stand once, what registers is found."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from sglang_kairos.loads.format import FORMATS
from sglang_kairos.registry import Registry
from sglang_kairos.sim.baselines.order import ORDERS
from sglang_kairos.sim.baselines.policies import POLICIES


@pytest.fixture(scope="module")
def import_picture(repo_root: Path) -> ModuleType:
    """scripts/import_picture.py."""
    path = repo_root / "scripts" / "import_picture.py"
    spec = importlib.util.spec_from_file_location("import_picture", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(folder: Path, **sources: str) -> Path:
    """A package of these modules; ``a__b`` is ``b`` in the folder ``a``."""
    for name, source in sources.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def test_imports_go_one_way_and_in_no_circle(import_picture: ModuleType, repo_root: Path) -> None:
    known = import_picture.modules(repo_root / "python" / "sglang_kairos")
    edges = import_picture.imports(known)
    assert sum(map(len, edges.values())) > 400, "it sees the imports"
    assert import_picture.upwards(edges) == []
    assert import_picture.circle(edges) == []


def test_an_import_that_goes_up_is_named(import_picture: ModuleType, tmp_path: Path) -> None:
    inside = "def f():\n    from sglang_kairos.engine.plugin import install\n"
    folder = tree(tmp_path, slo__age=inside, engine__plugin="import sglang_kairos.slo.age\n")
    edges = import_picture.imports(import_picture.modules(folder))
    assert import_picture.upwards(edges) == [
        "slo.age (slo) imports engine.plugin (engine.plugin), which is not below it"
    ]
    assert import_picture.circle(edges) == ["engine.plugin", "slo.age", "engine.plugin"]


def test_an_imported_name_counts_for_the_module_that_it_lies_in(
    import_picture: ModuleType, tmp_path: Path
) -> None:
    folder = tree(
        tmp_path,
        slo__age="",
        policy__load="from sglang_kairos.slo import age\nfrom sglang_kairos.slo.age import Rule\n",
    )
    edges = import_picture.imports(import_picture.modules(folder))
    assert edges["policy.load"] == {"slo.age"}


def test_the_picture_leaves_out_what_a_longer_way_explains(import_picture: ModuleType) -> None:
    edges = {"config": {"slo.age"}, "policy.load": {"config", "slo.age"}, "slo.age": {"registry"}}
    arrows = re.findall(r"\[(\S+)\] --> \S+\[(\S+)\]", import_picture.picture(edges))
    assert arrows == [("policy", "config"), ("config", "slo")]


def test_no_class_name_stands_twice(repo_root: Path) -> None:
    sources = [
        path.read_text("utf-8")
        for folder in ("python", "benchmark", "contrib", "scripts")
        for path in (repo_root / folder).rglob("*.py")
    ]
    names = Counter(name for text in sources for name in re.findall(r"^class (\w+)", text, re.M))
    assert len(names) > 200
    assert [name for name, count in names.items() if count > 1] == []


def test_one_file_is_enough_to_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "things_by_name"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    made: Registry[int] = Registry("things_by_name")
    monkeypatch.setitem(sys.modules, "registry_under_test", made)  # type: ignore[arg-type]
    for name, number in (("one", 1), ("another", 2)):
        text = f"import sys\nsys.modules['registry_under_test'].add('{name}', {number})\n"
        (package / f"{name}.py").write_text(text)
    assert list(made.items()) == [("another", 2), ("one", 1)]
    with pytest.raises(ValueError, match="'one' is registered twice"):
        made.add("one", 3)


def test_every_order_is_a_policy_of_the_simulator() -> None:
    assert {"fcfs", "lpm", "hrrn", "shortest-prefill-first", "priority", "edf"} <= set(ORDERS)
    assert set(ORDERS) <= set(POLICIES)


def test_formats_with_columns_of_their_own_go_before_those_that_take_anything() -> None:
    ranks = {name: each.rank for name, each in FORMATS.items()}
    assert ranks == {"BurstGPT": 0, "Bailian": 0, "aiperf": 0, "Mooncake": 1, "Azure": 2}
