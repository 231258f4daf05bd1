"""Is the installed SGLang one that Kairos knows? Its source is read, never imported."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sglang_kairos.engine.seams import SEAMS, SUPPORTED_VERSIONS, Seam

State = Literal["same", "changed", "gone"]


@dataclass(frozen=True)
class Finding:
    """How one seam's function stands in an SGLang tree. `problem` is empty when it is the same."""

    seam: Seam
    state: State
    problem: str = ""


@dataclass(frozen=True)
class Survey:
    """A tree against the column of the table that fits it best, whatever version it says it is."""

    version: str
    findings: list[Finding]

    @property
    def problems(self) -> list[str]:
        """One sentence per seam that is not as known, each naming the upstream function."""
        return [finding.problem for finding in self.findings if finding.problem]

    @property
    def usable(self) -> list[Seam]:
        """The seams whose functions are as known."""
        return [finding.seam for finding in self.findings if not finding.problem]


def survey(seams: Iterable[Seam] = SEAMS, package: Path | None = None) -> Survey:
    """Compare the seams with the sources of SGLang, without importing it.

    `package` is SGLang's package folder; by default it is looked for as an import would.
    """
    seams = list(seams)
    surveys = [
        Survey(v, [_find(seam, v, package) for seam in seams if v in seam.fingerprints])
        for v in SUPPORTED_VERSIONS
    ]
    # Ties go to the newest: `min` keeps the first.
    return min(surveys, key=_misfit)


def _misfit(found: Survey) -> float:
    """Share of the seams that are not as known; a version that the table is silent on is no fit."""
    return len(found.problems) / len(found.findings) if found.findings else 2.0


def _find(seam: Seam, version: str, package: Path | None) -> Finding:
    path = _module_path(seam.module, package)
    if path is None:
        problem = f"{seam.target}: SGLang has no module {seam.module}"
        return Finding(seam, "gone", problem)
    found = fingerprint(path.read_text(encoding="utf-8"), seam.qualname)
    if found is None:
        return Finding(seam, "gone", f"{seam.target}: SGLang has no such function")
    if found != seam.fingerprints[version]:
        known = ", ".join(f"v{v}" for v in seam.fingerprints)
        problem = f"{seam.target}: unknown source {found}; Kairos knows {known}"
        return Finding(seam, "changed", problem)
    return Finding(seam, "same")


def _module_path(module: str, package: Path | None) -> Path | None:
    top, *rest = module.split(".")
    if package is None:
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            return None
        package = Path(next(iter(spec.submodule_search_locations)))
    base = package.joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=16)
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


def _definition(body: list[ast.stmt], names: list[str]) -> ast.stmt | None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == names[0]:
                return node if len(names) == 1 else _definition(node.body, names[1:])
    return None


def fingerprint(source: str, qualname: str) -> str | None:
    """Hash of a function's text in `source` from ``def`` on; None when there is no such function.

    Text, not AST: the same on every Python. Trailing blanks and indentation do not count.
    """
    node = _definition(_parse(source).body, qualname.split("."))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
        return None
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    text = textwrap.dedent("\n".join(line.rstrip() for line in lines))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def namesakes(seam: Seam, package: Path, at_most: int = 3) -> list[str]:
    """Where else SGLang defines a function of that name, as ``module:qualified.name``.

    Those in the seam's own module come first, then those in its folder.
    """
    name, home = seam.qualname.split(".")[-1], seam.module.split(".")
    found: list[tuple[int, str]] = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if f"def {name}(" not in text:
            continue
        module = [package.name, *path.relative_to(package).with_suffix("").parts]
        shared = next((i for i, (a, b) in enumerate(zip(module, home, strict=False)) if a != b), 99)
        found += [(-shared, f"{'.'.join(module)}:{q}") for q in _qualnames(text, name)]
    return [target for _, target in sorted(found) if target != seam.target][:at_most]


def _qualnames(source: str, name: str) -> list[str]:
    """Functions called `name`, at the top of a module or in its classes."""
    try:
        module = _parse(source)
    except SyntaxError:
        return []
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    groups: list[tuple[str, list[ast.stmt]]] = [("", module.body)]
    groups += [(f"{node.name}.", node.body) for node in classes]
    return [
        prefix + name
        for prefix, body in groups
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]


def way_out(problems: Iterable[str], installed: str) -> str:
    """The message a user sees when Kairos refuses to start."""
    listed = "\n".join(f"  - {problem}" for problem in problems)
    versions = ", ".join(SUPPORTED_VERSIONS)
    return (
        f"Kairos refuses to start: the installed SGLang ({installed}) is not what it was checked "
        f"against.\n{listed}\n"
        f"Way out: install a supported SGLang ({versions}), or start with --kairos off (KAIROS=off) "
        "for stock scheduling, or --kairos-strict off (KAIROS_STRICT=off) to run without the seams "
        "named above at your own risk. `python -m sglang_kairos.tools.doctor` says more."
    )
