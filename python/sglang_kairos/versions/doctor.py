"""Tells whether Kairos would start with this SGLang. It changes nothing and imports nothing of SGLang.

The exit code is 0 when all is well, and 1 when something has to be done: the lines marked ``!!``
say what. For each function that differs from all versions Kairos knows, it says what a machine can
tell. ``--diff`` also shows what changed in those functions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sglang_kairos
from sglang_kairos.commands import parser_of
from sglang_kairos.config import ConfigError
from sglang_kairos.cpu import runtime, site
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.installed import PLUGIN_GROUP, PLUGIN_NAME, check_loadable
from sglang_kairos.engine.judge import Judge, SeamVerdict
from sglang_kairos.engine.seams.callees import Callee
from sglang_kairos.engine.seams.table import SUPPORTED_VERSIONS, Seam
from sglang_kairos.engine.survey import Survey, namesakes
from sglang_kairos.engine.survey import survey as survey_seams
from sglang_kairos.other_sglang import NoSuchSglang, folder_of
from sglang_kairos.versions import patch, port, upstream_texts

BESIDE = ("torch", "transformers")  # the packages whose versions SGLang depends on most


@dataclass(frozen=True)
class Check:
    """The result of one check: a headline and, below it, details."""

    topic: str
    ok: bool
    headline: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = "ok" if self.ok else "!!"
        below = "".join(f"\n               {line}" for line in self.details)
        return f"{mark}  {self.topic:9}  {self.headline}{below}"


def examine(where: str | None = None) -> Iterator[Check]:
    """Yields all checks, for the SGLang at `where` (see `locate`) or the installed one."""
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
    if os.environ.get(known_texts.VOUCHED_FOR):
        yield about_vouched(found)
    yield about_seams(tree, found, verdicts_of(tree, found))
    yield about_callees(found)
    yield about_patches(tree, found.version)


def verdicts_of(tree: patch.SglangTree, found: Survey) -> list[SeamVerdict]:
    """Returns what a machine can tell of each seam; empty for a version that Kairos knows whole."""
    version = found.version if tree.version is None else known_texts.release(tree.version)
    if not found.problems and version in SUPPORTED_VERSIONS:
        return []
    return Judge(tree.root, version).verdicts()


def diffs(tree: patch.SglangTree, found: Survey) -> Iterator[str]:
    """Yields the changes of each unknown function since the nearest version in which it is known."""
    for function, print_ in _unknown(found):
        if print_:
            near = nearest(function, found.version)
            try:
                name = tree.version or "this tree"
                yield upstream_texts.diff(function.target, near, tree.root, name)
            except upstream_texts.NoText as error:
                yield f"{function.target}: no v{near} to compare with: {error}"


def _unknown(found: Survey) -> Iterator[tuple[Seam | Callee, str]]:
    seen: set[str] = set()
    for finding in found.all:
        if finding.problem and finding.function.target not in seen:
            seen.add(finding.function.target)
            yield finding.function, finding.text


def nearest(function: Seam | Callee, version: str) -> str:
    """Returns the nearest version that is known: `version`, the newest before, or the oldest after."""
    known = sorted(function.fingerprints, key=known_texts.order)
    before = [v for v in known if known_texts.order(v) <= known_texts.order(version)]
    return before[-1] if before else known[0]


def locate(where: str | None) -> patch.SglangTree:
    """Returns the SGLang that `where` names: a version beside ours, or a tree; None: ours."""
    if where is None:
        return patch.find_tree()
    try:
        return patch.find_tree(folder_of(where))
    except NoSuchSglang:
        return patch.find_tree(Path(where))


def about_here() -> Check:
    """Reports the versions in use. It cannot fail, but every report of a problem needs it."""
    versions = [f"Kairos {sglang_kairos.__version__}", f"Python {platform.python_version()}"]
    for name in BESIDE:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return Check("here", True, ", ".join(versions))


def about_runtime() -> Check:
    """Checks whether this is a GPU or a CPU, and whether a CPU has what it needs."""
    decision = runtime.decide()
    if not decision.active:
        return Check("runtime", not decision.refused, f"stock: {decision.reason}")
    hook = site.site_packages() / site.PTH_NAME
    installed = hook.is_file() and hook.read_text(encoding="utf-8") == site.PTH_LINE
    cure = () if installed else ("kairos cpu install", site.status())
    state = "start-up hook installed" if installed else "start-up hook missing"
    return Check("runtime", installed, f"CPU: {decision.reason}; {state}", cure)


def about_plugin() -> Check:
    """Checks whether SGLang would find Kairos in this Python."""
    try:
        check_loadable()
    except ConfigError as error:
        return Check("plugin", False, str(error))
    return Check("plugin", True, f"{PLUGIN_NAME!r} is an entry point of {PLUGIN_GROUP}")


def about_sglang(tree: patch.SglangTree, found: Survey) -> Check:
    """Checks which version it says it is, and which known version its source is closest to."""
    supported = f"supported: {', '.join(SUPPORTED_VERSIONS)}"
    if tree.version is None:
        headline = f"in {tree.root}, does not say its version; taken for {found.version}"
        return Check("SGLang", not found.problems, headline, (supported,))
    headline = f"{tree.version} in {tree.root}"
    if known_texts.release(tree.version) in SUPPORTED_VERSIONS:
        return Check("SGLang", True, headline)
    state = "runs as" if not found.problems else "not supported, closest to"
    return Check("SGLang", not found.problems, f"{headline}: {state} {found.version}", (supported,))


def about_vouched(found: Survey) -> Check:
    """Checks texts that somebody other than Kairos' authors has vouched for."""
    named = f"{known_texts.VOUCHED_FOR}={os.environ[known_texts.VOUCHED_FOR]}"
    try:
        known_texts.vouched()
    except known_texts.TableError as error:
        return Check("vouched", False, str(error), ("Kairos does not start with it",))
    names = ", ".join(found.vouched_for)
    return Check(
        "vouched", True, f"{len(found.vouched_for)} texts by {named}", (names,) * bool(names)
    )


def about_seams(tree: patch.SglangTree, found: Survey, verdicts: list[SeamVerdict]) -> Check:
    """Checks each function that Kairos wraps: as in which version, changed how, or gone."""
    of = {verdict.seam.target: verdict for verdict in verdicts}
    details: list[str] = []
    for version, names in _as_elsewhere(found).items():
        details.append(f"as in v{version}: {', '.join(names)}")
    open_ = [one for one in found.findings if one.problem]
    changed = {one.seam.target for one in found.all if one.problem}
    wrapped = {one.seam.target for one in found.findings}
    changed |= {t for t in wrapped if t in of and of[t].kind == "person"}
    judged = [of[target] for target in sorted(changed) if target in of]
    harmless = [v.seam.qualname for v in judged if v.kind == "harmless" and not v.like]
    if harmless:
        details.append(f"text changed, everything relied on is there: {', '.join(harmless)}")
    for verdict in judged:
        if verdict.kind == "harmless" or (verdict.kind == "as in" and not verdict.like):
            continue
        details += _in_words(verdict, tree)
    if changed:
        details.append(
            "what to do: docs/upstream.md; until then --kairos off serves stock SGLang, "
            "--kairos-strict seam all but what the functions named give"
        )
    same = len(found.findings) - len(open_)
    headline = f"{same} of {len(found.findings)} as Kairos knows them from v{found.version}"
    return Check("seams", not changed, headline, tuple(details))


def _as_elsewhere(found: Survey) -> dict[str, list[str]]:
    """Returns the functions that are not as in the closest version, by the newest they are as in."""
    by_version: dict[str, list[str]] = {}
    for finding in found.all:
        if finding.known_as and found.version not in finding.known_as:
            names = by_version.setdefault(finding.known_as[0], [])
            if finding.function.qualname not in names:
                names.append(finding.function.qualname)
    return by_version


def _in_words(verdict: SeamVerdict, tree: patch.SglangTree) -> Iterator[str]:
    seam = verdict.seam
    heads = {"another": "another seam serves", "compat": "text changed, compat serves"}
    if verdict.kind != "person":
        yield f"{heads.get(verdict.kind, verdict.kind)}: {seam.qualname}: {'; '.join(verdict.reasons)}"
        return
    state = "changed" if verdict.text else "gone"
    yield f"needs a person: {state}: {seam.target}: {verdict.reasons[0]}"
    yield from (f"      {reason}" for reason in verdict.reasons[1:])
    if not verdict.text:
        yield f"      same name: {', '.join(namesakes(seam, tree.root)) or 'nowhere'}"
        if seam.instead:
            yield f"      served in other versions by: {', '.join(seam.instead)}"
        if seam.elsewhere:
            yield f"      or not needed: {seam.elsewhere}"
    if seam.upstream:
        yield f"      see {seam.upstream}"


def about_callees(found: Survey) -> Check:
    """Checks each function that handlers call or replace without wrapping it."""
    details: list[str] = []
    for finding in found.relied_on:
        if finding.problem and finding.callee is not None:
            details.append(f"{finding.state}: {finding.problem}")
            details.append(f"      taken for granted: {finding.callee.taken}")
    same = sum(not finding.problem for finding in found.relied_on)
    headline = f"{same} of {len(found.relied_on)} as Kairos knows them from v{found.version}"
    return Check("relied on", not details, headline, tuple(details))


def about_patches(tree: patch.SglangTree, version: str) -> Check:
    """Checks whether the patches of the closest version fit the tree."""
    try:
        folder = patch.patches_dir()
    except patch.PatchError as error:  # a wheel of Kairos may lack them
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


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``kairos doctor``."""
    parser = parser_of("doctor", description=__doc__)
    parser.add_argument(
        "--sglang",
        metavar="WHERE",
        help="a checkout, a package folder, or the version of one beside the installed "
        "(default: the installed one)",
    )
    parser.add_argument(
        "--diff",
        action="store_true",
        help="show what changed in the functions that Kairos does not know (downloads the version "
        "to compare with where it is not here)",
    )
    more = parser.add_argument_group("add a version", "As `kairos port` does, with its flags.")
    more.add_argument("--port", metavar="VERSION|TREE", help="add this SGLang to what Kairos knows")
    port.add_flags(more)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print each check. Returns 0 when all is well, else 1."""
    args = build_parser().parse_args(argv)
    if args.port:
        return port.run(port.options_of(args.port, args))
    well = True
    for check in examine(args.sglang):
        print(check)
        well &= check.ok
    if args.diff:
        tree = locate(args.sglang)
        for text in diffs(tree, survey_seams(package=tree.root)):
            print(f"\n{text}")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
