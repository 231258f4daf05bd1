"""What pyproject.toml, requirements/ and README.md promise to someone who installs Kairos."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sglang_kairos.engine.seams.table import SUPPORTED_VERSIONS
from sglang_kairos.other_sglang import NEEDS

SETUP_EXTRAS = ("completion", "cpu", "dev", "sim", "tables")
# Imported under these names without being installed under them.
# By SGLang's CUDA wheels, the first also by sglang_kairos.cpu; the last in Dynamo's own workers only.
PROVIDED_ELSEWHERE = {"sgl_kernel", "flashinfer", "dynamo"}


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]


def pins(path: Path) -> dict[str, str]:
    """Package -> version of a requirements file that pins everything with ==."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    for requirement in requirements:
        assert [s.operator for s in requirement.specifier] == ["=="], f"{requirement} is no pin"
        assert requirement.url is None
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in requirements}


@pytest.fixture(scope="module")
def lock(repo_root: Path) -> dict[str, str]:
    return pins(repo_root / "requirements" / "constraints-cpu.txt")


def test_the_plugin_entry_point_names_a_function_that_exists(
    project: dict[str, Any], repo_root: Path
) -> None:
    module, _, function = project["entry-points"]["sglang.srt.plugins"]["kairos"].partition(":")
    source = repo_root / "python" / Path(*module.split(".")).with_suffix(".py")
    defined = {
        node.name
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert function in defined


def test_the_version_is_the_one_the_package_says(project: dict[str, Any]) -> None:
    import sglang_kairos

    assert project["version"] == sglang_kairos.__version__


def test_extras_are_present(project: dict[str, Any]) -> None:
    assert set(project["optional-dependencies"]) == {*SETUP_EXTRAS, "cuda"}


@pytest.mark.parametrize("extra", SETUP_EXTRAS)
def test_the_lock_covers_the_extra_and_agrees_with_it(
    extra: str, project: dict[str, Any], lock: dict[str, str]
) -> None:
    for text in (*project["dependencies"], *project["optional-dependencies"][extra]):
        requirement = Requirement(text)
        version = lock.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not in the lock"
        assert requirement.specifier.contains(version), f"{text}, but the lock has {version}"


def test_the_cpu_extra_is_pinned_exactly(project: dict[str, Any]) -> None:
    for text in project["optional-dependencies"]["cpu"]:
        assert [s.operator for s in Requirement(text).specifier] == ["=="], text


def test_what_is_installed_without_dependencies_agrees_with_the_lock(
    repo_root: Path, lock: dict[str, str]
) -> None:
    without = pins(repo_root / "requirements" / "cpu-nodeps.txt")
    assert set(without) == {"sglang", "sglang-router", "torchvision"}
    assert without.items() <= lock.items()


def test_newest_and_oldest_sglang_are_installed(repo_root: Path, lock: dict[str, str]) -> None:
    script = (repo_root / "scripts" / "bootstrap.sh").read_text("utf-8")
    oldest = re.search(r"OLDEST=(\S+)", script)
    assert oldest is not None
    assert (lock["sglang"], oldest[1]) == (SUPPORTED_VERSIONS[0], SUPPORTED_VERSIONS[-1])
    assert set(NEEDS) < set(SUPPORTED_VERSIONS)


def test_both_machines_get_the_same_sglang(project: dict[str, Any], lock: dict[str, str]) -> None:
    assert project["optional-dependencies"]["cuda"] == [f"sglang=={lock['sglang']}"]


def test_the_lock_asks_for_no_build_of_one_machine(lock: dict[str, str]) -> None:
    assert [name for name, version in lock.items() if "+" in version] == []


def imported(path: Path) -> Iterator[str]:
    """The top-level names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_every_import_is_a_declared_dependency(
    project: dict[str, Any], repo_root: Path, lock: dict[str, str]
) -> None:
    texts = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    declared |= set(pins(repo_root / "requirements" / "cpu-nodeps.txt"))
    known = sys.stdlib_module_names | PROVIDED_ELSEWHERE | {"sglang_kairos"}
    undeclared = {
        f"{path.relative_to(repo_root)}: {name}"
        for path in (repo_root / "python").rglob("*.py")
        for name in imported(path)
        if name not in known and not declared & distributions(name)
    }
    assert undeclared == set()


# What folders of the package may import beyond the base dependencies: extras by name.
FOLDER_EXTRAS = {
    "engine": {"cpu"},
    "cpu": {"cpu"},
    "sim": {"sim", "tables"},
    "calibrate": {"cpu"},
    "loads": {"sim", "cpu"},
    "reports": {"sim"},
    "completion.py": {"completion"},
    "versions": {"cpu"},
}
# Of the base dependencies, those that nothing imports: the text that shows who uses them.
NAMED_ONLY = {"httptools": 'http="httptools"'}
# SGLang's launcher runs SGLang, which is installed separately.
SGLANG = {"sglang", *PROVIDED_ELSEWHERE}


@functools.cache
def providers() -> Mapping[str, list[str]]:
    """Modules by name, with the distributions that have them; reading these takes seconds."""
    return packages_distributions()


def distributions(name: str) -> set[str]:
    """What may have installed a module of this name."""
    return {canonicalize_name(dist) for dist in providers().get(name, [name])}


def names_of(texts: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_every_base_dependency_is_imported_or_named_by_the_package(
    project: dict[str, Any], repo_root: Path
) -> None:
    sources = {p: p.read_text() for p in (repo_root / "python").rglob("*.py")}
    used = {dist for p in sources for name in imported(p) for dist in distributions(name)}
    idle = names_of(project["dependencies"]) - used
    assert idle == set(NAMED_ONLY)
    for text in NAMED_ONLY.values():
        assert any(text in source for source in sources.values()), text


def test_the_package_needs_no_extra_outside_the_folders_that_say_so(
    project: dict[str, Any], repo_root: Path
) -> None:
    base = names_of(project["dependencies"])
    extras = {name: names_of(texts) for name, texts in project["optional-dependencies"].items()}
    package = repo_root / "python" / "sglang_kairos"
    found = set()
    for path in package.rglob("*.py"):
        folder = path.relative_to(package).parts[0]
        allowed = base.union(*(extras[name] for name in FOLDER_EXTRAS.get(folder, ())))
        foreign = set(imported(path)) - sys.stdlib_module_names - {"sglang_kairos"} - SGLANG
        found |= {(str(path), name) for name in foreign if not allowed & distributions(name)}
    assert found == set()


def test_the_scripts_can_be_executed(repo_root: Path) -> None:
    for script in (*(repo_root / "scripts").glob("*.sh"), repo_root / ".ci" / "run"):
        assert script.stat().st_mode & 0o111, script
        assert script.read_text().startswith("#!/usr/bin/env bash\n"), script


def test_readme_names_the_two_commands(repo_root: Path) -> None:
    readme = repo_root / "README.md"
    if readme.exists():
        text = readme.read_text()
        assert "make demo" in text
        assert "make test" in text
