"""Compares the installed SGLang with the versions that Kairos knows.

Source is read, not imported.
"""

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

from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.seams.callees import Callee
from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS, Seam

State = Literal["same", "changed", "gone"]


@dataclass(frozen=True)
class Finding:
    """How a function of a seam stands in an SGLang tree. `problem` is empty if Kairos knows it.

    `callee` is None for the function that the seam wraps, else one that its handler relies on.
    `text` is the hash of what is there. `known_as`: the versions with the same text, newest first.
    """

    seam: Seam
    state: State
    problem: str = ""
    callee: Callee | None = None
    text: str = ""
    known_as: tuple[str, ...] = ()

    @property
    def function(self) -> Seam | Callee:
        """The function that was looked for."""
        return self.callee or self.seam


@dataclass(frozen=True)
class Survey:
    """A tree compared with the column of the table that fits it best, whatever version it claims.

    The column says which functions are wrapped. The text of each may be that of any version in
    which it is wrapped, since the handler is the same there. `findings`: of the wrapped functions.
    `relied_on`: of what their handlers rely on.
    """

    version: str
    findings: list[Finding]
    relied_on: list[Finding]

    @property
    def all(self) -> list[Finding]:
        return [*self.findings, *self.relied_on]

    @property
    def problems(self) -> list[str]:
        """Returns one sentence per function that is not as known, each naming it."""
        return [finding.problem for finding in self.all if finding.problem]

    @property
    def vouched_for(self) -> list[str]:
        """Returns the functions whose text only the file of `KAIROS_SEAMS` knows."""
        return sorted(
            {
                one.function.target
                for one in self.all
                if one.known_as
                and one.function.known is None
                and known_texts.is_vouched_for(one.function.target, one.function.kind, one.text)
            }
        )

    @property
    def usable(self) -> list[Seam]:
        """Returns the seams whose functions, and all that their handlers rely on, are as known."""
        broken = {finding.seam.target for finding in self.all if finding.problem}
        return [found.seam for found in self.findings if found.seam.target not in broken]


def survey(seams: Iterable[Seam] = SEAMS, package: Path | None = None) -> Survey:
    """Compares the seams with the sources of SGLang, without importing it.

    `package`: SGLang's package folder; None: it is looked for as an import would.
    """
    seams = list(seams)
    texts = Texts(package)
    surveys: list[Survey] = []
    for version in SUPPORTED_VERSIONS:
        surveys.append(_survey(version, seams, texts))
        if _misfit(surveys[-1]) == (0.0, 0):
            break
    return min(surveys, key=_misfit)  # ties go to the newest: `min` keeps the first


def _survey(version: str, seams: list[Seam], texts: Texts) -> Survey:
    there = [seam for seam in seams if version in seam.fingerprints]
    relied_on = [
        _find(seam, version, texts, callee)
        for seam in there
        for callee in seam.relies_on
        if version in callee.fingerprints
    ]
    return Survey(version, [_find(seam, version, texts) for seam in there], relied_on)


def _misfit(found: Survey) -> tuple[float, int]:
    """Returns the share of functions not as known, then how many are as in another version only.

    A version that the table is silent on does not fit.
    """
    if not found.findings:
        return 2.0, 0
    of_others = sum(found.version not in one.known_as for one in found.all)
    return len(found.problems) / len(found.all), of_others


def _find(seam: Seam, version: str, texts: Texts, callee: Callee | None = None) -> Finding:
    function = callee or seam
    text, trouble = texts.of(function)
    known_as = tuple(v for v, known in function.fingerprints.items() if known == text)
    state: State = "same" if known_as else "changed" if text else "gone"
    if state == "changed":
        known = ", ".join(f"v{v}" for v in function.fingerprints)
        trouble = f"unknown source {text}; Kairos knows {known}"
    whose = f" ({seam.qualname}'s seam relies on it)" if callee else ""
    problem = f"{function.target}{whose}: {trouble}" if trouble else ""
    return Finding(seam, state, problem, callee, text, known_as)


class Texts:
    """The functions of one SGLang tree, each read and hashed once.

    `package`: SGLang's package folder; None: it is looked for as an import would.
    """

    def __init__(self, package: Path | None = None) -> None:
        self._package = package
        self._found: dict[str, tuple[str, str]] = {}

    def of(self, function: Seam | Callee) -> tuple[str, str]:
        """Returns the hash of a function's text; or an empty one and what is missing, in words."""
        if function.target not in self._found:
            self._found[function.target] = self._look(function)
        return self._found[function.target]

    def _look(self, function: Seam | Callee) -> tuple[str, str]:
        path = _module_path(function.module, self._package)
        if path is None:
            return "", f"SGLang has no module {function.module}"
        text = fingerprint(path.read_text(encoding="utf-8"), function.qualname)
        return (text, "") if text else ("", "SGLang has no such function")


def package_folder(name: str = "sglang") -> Path | None:
    """Returns the folder of an installed package, without importing it; None if there is none."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _module_path(module: str, package: Path | None) -> Path | None:
    top, *rest = module.split(".")
    package = package_folder(top) if package is None else package
    if package is None:
        return None
    base = package.joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@functools.lru_cache(maxsize=32)
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


def _definition(body: list[ast.stmt], names: list[str]) -> ast.stmt | None:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == names[0]:
                return node if len(names) == 1 else _definition(node.body, names[1:])
    return None


def fingerprint(source: str, qualname: str) -> str | None:
    """Returns the hash of a function's text in `source`; None if there is no such function."""
    text = text_of(source, qualname)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def text_of(source: str, qualname: str) -> str | None:
    """Returns a function's text in `source` from ``def`` on; None if there is no such function.

    It is text, not AST, and so the same on every Python. Trailing blanks and indentation do not
    count.
    """
    node = _definition(_parse(source).body, qualname.split("."))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
        return None
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return textwrap.dedent("\n".join(line.rstrip() for line in lines))


def namesakes(seam: Seam | Callee, package: Path, at_most: int = 3) -> list[str]:
    """Returns where else SGLang defines a function of that name, as ``module:qualified.name``.

    Those in its own module come first, then those in its folder.
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
    """Returns functions called `name`, at the top of a module or in its classes."""
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
    """Returns the message that a user sees when Kairos refuses to start."""
    listed = "\n".join(f"  - {problem}" for problem in problems)
    versions = f"{SUPPORTED_VERSIONS[-1]} to {SUPPORTED_VERSIONS[0]}"
    return (
        f"Kairos refuses to start: the installed SGLang ({installed}) is not what it was checked "
        f"against.\n{listed}\n"
        f"Way out: install a supported SGLang ({versions}), or start with --kairos off (KAIROS=off) "
        "for stock scheduling, or --kairos-strict seam (KAIROS_STRICT=seam) to run without exactly "
        "what depends on the functions named above. `kairos doctor` says more."
    )
