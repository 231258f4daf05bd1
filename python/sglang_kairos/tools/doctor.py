"""Would Kairos start with this SGLang? Looks, changes nothing, and imports nothing of SGLang.

Exit code 0 when all is well, 1 when something has to be done; what, stands in the lines marked ``!!``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sglang_kairos
from sglang_kairos.config import ConfigError
from sglang_kairos.cpu import runtime, site
from sglang_kairos.engine.plugin import PLUGIN_GROUP, PLUGIN_NAME, check_loadable
from sglang_kairos.engine.seams import SUPPORTED_VERSIONS
from sglang_kairos.engine.sources import Finding, Survey, namesakes
from sglang_kairos.engine.sources import survey as survey_seams
from sglang_kairos.other_sglang import NoSuchSglang, folder_of
from sglang_kairos.tools import patch

BESIDE = ("torch", "transformers")  # what an SGLang most often quarrels with


@dataclass(frozen=True)
class Check:
    """One thing looked at: a headline and, below it, what there is to know."""

    topic: str
    ok: bool
    headline: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = "ok" if self.ok else "!!"
        below = "".join(f"\n               {line}" for line in self.details)
        return f"{mark}  {self.topic:9}  {self.headline}{below}"


def examine(where: str | None = None) -> Iterator[Check]:
    """All checks, for the SGLang at `where` (see `locate`) or the installed one."""
    yield about_here()
    yield about_runtime()
    yield about_plugin()
    try:
        tree = locate(where)
    except patch.PatchError as error:
        yield Check("SGLang", False, str(error))
        return
    found = survey_seams(package=tree.root)
    yield about_sglang(tree, found)
    yield about_functions("seams", found.findings, tree, found.version)
    yield about_functions("relied on", found.relied_on, tree, found.version)
    yield about_patches(tree, found.version)


def locate(where: str | None) -> patch.Tree:
    """The SGLang that `where` means: a version beside the installed one, a tree, or (None) ours."""
    if where is None:
        return patch.find_tree()
    try:
        return patch.find_tree(folder_of(where))
    except NoSuchSglang:
        return patch.find_tree(Path(where))


def about_here() -> Check:
    """Not a check, but every report of a problem needs it."""
    versions = [f"Kairos {sglang_kairos.__version__}", f"Python {platform.python_version()}"]
    for name in BESIDE:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return Check("here", True, ", ".join(versions))


def about_runtime() -> Check:
    """GPU or CPU, and whether a CPU has what it takes."""
    decision = runtime.decide()
    if not decision.active:
        return Check("runtime", not decision.refused, f"stock: {decision.reason}")
    hook = site.site_packages() / site.PTH_NAME
    installed = hook.is_file() and hook.read_text(encoding="utf-8") == site.PTH_LINE
    cure = () if installed else ("python -m sglang_kairos.cpu install", site.status())
    state = "start-up hook installed" if installed else "start-up hook missing"
    return Check("runtime", installed, f"CPU: {decision.reason}; {state}", cure)


def about_plugin() -> Check:
    """Whether SGLang would find Kairos in this Python."""
    try:
        check_loadable()
    except ConfigError as error:
        return Check("plugin", False, str(error))
    return Check("plugin", True, f"{PLUGIN_NAME!r} is an entry point of {PLUGIN_GROUP}")


def about_sglang(tree: patch.Tree, found: Survey) -> Check:
    """Which version it says it is, and which of ours its source is closest to."""
    supported = f"supported: {', '.join(SUPPORTED_VERSIONS)}"
    if tree.version is None:
        headline = f"in {tree.root}, does not say its version; taken for {found.version}"
        return Check("SGLang", not found.problems, headline, (supported,))
    headline = f"{tree.version} in {tree.root}"
    if tree.version.split("+")[0] in SUPPORTED_VERSIONS:
        return Check("SGLang", True, headline)
    state = "runs as" if not found.problems else "not supported, closest to"
    return Check("SGLang", not found.problems, f"{headline}: {state} {found.version}", (supported,))


def about_functions(topic: str, looked: list[Finding], tree: patch.Tree, version: str) -> Check:
    """Each function that Kairos wraps, or that its handlers rely on: the same, changed or gone."""
    details: list[str] = []
    for finding in looked:
        if not finding.problem:
            continue
        details.append(f"{finding.state}: {finding.problem}")
        if finding.state == "gone":
            named = namesakes(finding.function, tree.root)
            details.append(f"      same name: {', '.join(named) or 'nowhere'}")
        elif finding.callee is not None:
            details.append(f"      taken for granted: {finding.callee.taken}")
        if finding.callee is None and finding.seam.upstream:
            details.append(f"      see {finding.seam.upstream}")
    if details:
        details.append("what to do: docs/upstream.md; until then --kairos off serves stock SGLang")
    same = sum(finding.state == "same" for finding in looked)
    headline = f"{same} of {len(looked)} as Kairos knows them from v{version}"
    return Check(topic, not details, headline, tuple(details))


def about_patches(tree: patch.Tree, version: str) -> Check:
    """How the patches of the closest version stand to the tree."""
    try:
        folder = patch.patches_dir()
    except patch.PatchError as error:  # a wheel of Kairos need not carry them
        return Check("patches", True, str(error))
    series = patch.series(folder, version)
    if not series:
        return Check("patches", False, f"none for v{version} in {folder}")
    states = patch.survey(tree, series).states
    fit = [state in patch.SOUND for state in states.values()]
    applied = sum(state == "applied" for state in states.values())
    headline = f"{sum(fit)} of {len(series)} for v{version} fit, {applied} applied"
    details = [f"{n}: {s}" for (n, s), good in zip(states.items(), fit, strict=True) if not good]
    return Check("patches", all(fit), headline, tuple(details))


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0 when all is well, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kairos.tools.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sglang",
        metavar="WHERE",
        help="a checkout, a package folder, or the version of one beside the installed "
        "(default: the installed one)",
    )
    well = True
    for check in examine(parser.parse_args(argv).sglang):
        print(check)
        well &= check.ok
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
