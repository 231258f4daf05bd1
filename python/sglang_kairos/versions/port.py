"""Adds an SGLang version to Kairos: ``kairos port VERSION`` or ``kairos port TREE``.

It judges each seam (`engine.judge`) and writes the changes beside it. Where nothing needs a person,
it writes the table's column and the patches. Then it imports that SGLang and runs the identity test
on it. An installed Kairos has neither tests nor a table to write: there it writes a file for
``KAIROS_SEAMS``.

Exit codes: 0 done; 1 a person is needed and nothing was written; 2 no such SGLang; 3 written, and a
check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_kairos.commands import parser_of
from sglang_kairos.engine.fingerprints import known_texts
from sglang_kairos.engine.judge import Judge, SeamVerdict
from sglang_kairos.other_sglang import NoSuchSglang, fetch, folder_of
from sglang_kairos.versions import patch, upstream_texts

DONE, PERSON, NO_SGLANG, FAILED = range(4)
_VERSION = re.compile(r"v?\d+\.\d+[\w.+]*")
# The pins that decide in which environment a version runs.
_PINS = re.compile(
    r"^Requires-Dist: ((?:torch|transformers|tokenizers|xgrammar)==[^\s;]+)$", re.MULTILINE
)


@dataclass(frozen=True)
class PortPlan:
    """What is known of a version: a verdict per seam, and the column that follows from the verdicts.

    `accepted`: seams, by qualified name, that a person has looked at, whatever the verdict.
    """

    version: str
    verdicts: list[SeamVerdict]
    accepted: Collection[str] = ()

    @property
    def open(self) -> list[SeamVerdict]:
        """Returns the verdicts that need a person."""
        return [v for v in self.verdicts if v.kind == "person" and not self._accepted(v)]

    @property
    def new(self) -> list[SeamVerdict]:
        """Returns the verdicts on texts that no version has."""
        return [v for v in self.verdicts if self._wrapped(v) and not v.known]

    def column(self) -> dict[str, dict[str, str]]:
        """Returns the table's entries for this version, as in ``fingerprints.json``."""
        wrapped = [verdict for verdict in self.verdicts if self._wrapped(verdict)]
        seams = {verdict.seam.target: verdict.text for verdict in wrapped}
        relied_on = {
            callee.target: text for verdict in wrapped for callee, text, _ in verdict.callees
        }
        return {
            "seams": dict(sorted(seams.items())),
            "relied_on": dict(sorted(relied_on.items())),
        }

    def _accepted(self, verdict: SeamVerdict) -> bool:
        return bool(verdict.text) and verdict.seam.qualname in self.accepted

    def _wrapped(self, verdict: SeamVerdict) -> bool:
        return verdict.wrapped or self._accepted(verdict)


@dataclass(frozen=True)
class Options:
    """The options of one run. `write`: a file for ``KAIROS_SEAMS`` instead of Kairos' own table."""

    where: str
    version: str = ""
    dry_run: bool = False
    write: str = ""
    accept: Collection[str] = ()
    identity: bool = True


def add_flags(group: argparse._ActionsContainer) -> None:
    """Every flag of ``kairos port``; ``kairos doctor --port`` takes them too."""
    group.add_argument("--version", default="", help="of a tree that does not say it")
    group.add_argument("--dry-run", action="store_true", help="judge, write and start nothing")
    group.add_argument(
        "--write", default="", metavar="FILE", help="write a file for KAIROS_SEAMS instead"
    )
    group.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="NAME",
        help="a seam that you have looked at",
    )
    group.add_argument("--no-identity", action="store_true", help="do not start a pair")


def options_of(where: str, args: argparse.Namespace) -> Options:
    """What the flags of `add_flags` ask for."""
    return Options(where, args.version, args.dry_run, args.write, args.accept, not args.no_identity)


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``kairos port``."""
    parser = parser_of("port", description=__doc__)
    parser.add_argument("where", metavar="VERSION|TREE", help="the SGLang to add")
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Add a version. Returns one of the exit codes above."""
    args = build_parser().parse_args(argv)
    return run(options_of(args.where, args))


def checkout() -> Path | None:
    """Returns the root of Kairos' own source tree, if this runs from one."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "patches" / "make.py").is_file() else None


@contextmanager
def found(options: Options) -> Iterator[patch.SglangTree]:
    """Yields the SGLang to port. Raises NoSuchSglang, NoText or PatchError.

    A version that is not here is installed beside the others; for a dry run it is unpacked for a
    while.
    """
    where = options.where
    if not _VERSION.fullmatch(where) or Path(where).exists():
        try:
            yield patch.find_tree(folder_of(where))
        except NoSuchSglang:
            yield patch.find_tree(Path(where))
        return
    version = where.removeprefix("v")
    package = upstream_texts.package_of(version)
    if package is not None:
        yield patch.find_tree(package.parent)
    elif options.dry_run or options.write:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(upstream_texts.wheel_of(version)) as wheel:
                wheel.extractall(folder)
            yield patch.find_tree(Path(folder))
    else:
        yield patch.find_tree(fetch(version))


def plan(tree: patch.SglangTree, version: str, accepted: Collection[str] = ()) -> PortPlan:
    """Judges a tree."""
    return PortPlan(version, Judge(tree.root, version).verdicts(), accepted)


def run(options: Options, say: Callable[[str], object] = print) -> int:
    """Runs the whole port. Returns an exit code."""
    try:
        with found(options) as tree:
            version = known_texts.release(options.version or tree.version or "")
            if not version:
                say(f"error: {tree.root} does not say its version; state it with --version")
                return NO_SGLANG
            return _port(tree, version, options, say)
    except (NoSuchSglang, upstream_texts.NoText, patch.PatchError) as error:
        say(f"error: {error}")
        return NO_SGLANG


def _port(
    tree: patch.SglangTree, version: str, options: Options, say: Callable[[str], object]
) -> int:
    say(f"SGLang {version} in {tree.root}{_pins(tree)}")
    made = plan(tree, version, options.accept)
    beside = Path("out") / f"port-{version}"
    for verdict in made.verdicts:
        say(f"{'!!' if verdict in made.open else '  '}  {verdict.seam.qualname}: {verdict}")
        for name, text in _diffs(verdict, tree, version):
            if options.dry_run:
                continue
            beside.mkdir(parents=True, exist_ok=True)
            (beside / f"{name}.diff").write_text(text + "\n", encoding="utf-8")
            say(f"        {beside / name}.diff")
    if made.open:
        say(
            f"{len(made.open)} of {len(made.verdicts)} need a person; nothing was written. Once looked "
            "at, a text is taken with --accept NAME; for what is gone see docs/upstream.md"
        )
        return PERSON
    return _write(made, tree, options, say)


def _write(
    made: PortPlan, tree: patch.SglangTree, options: Options, say: Callable[[str], object]
) -> int:
    root = checkout()
    if options.dry_run:
        say("nothing needs a person; a dry run writes nothing")
        return DONE
    if options.write or root is None:
        file = Path(options.write or f"kairos-seams-{made.version}.json")
        file.write_text(_json({made.version: made.column()}), encoding="utf-8")
        say(f"written: {file}; start with {known_texts.VOUCHED_FOR}={file}")
        return DONE
    add_column(known_texts.own_file(), made)
    say(f"written: the column {made.version} in {known_texts.own_file()}")
    checks = {"patches": _patches(root, tree, made.version), "import": _import(tree)}
    if options.identity:
        checks["identity"] = _identity(root, tree, made.version)
    well = True
    for name, command in checks.items():
        if not well:
            break
        well = _ran(name, command, root, say)
    _left(made, say)
    return DONE if well else FAILED


def add_column(file: Path, made: PortPlan) -> None:
    """Puts a version's column into a file of fingerprints, newest first."""
    table = {**known_texts.read(file), made.version: made.column()}
    newest_first = sorted(table, key=known_texts.order, reverse=True)
    file.write_text(_json({version: table[version] for version in newest_first}), encoding="utf-8")


def _json(table: Mapping[str, object]) -> str:
    return json.dumps(table, indent=1) + "\n"


def _diffs(verdict: SeamVerdict, tree: patch.SglangTree, version: str) -> Iterator[tuple[str, str]]:
    """Yields name and diff of each text of a seam that is new, against the nearest version."""
    functions = [(verdict.seam, verdict.text, bool(verdict.like)), *verdict.callees]
    for function, text, known in functions:
        others = [other for other in function.fingerprints if other != version]
        if not text or known or not others:
            continue
        near = max(others, key=lambda other: _nearness(other, version))
        try:
            shown = upstream_texts.diff(function.target, near, tree.root, f"v{version}")
        except upstream_texts.NoText as error:
            shown = f"no v{near} to compare with: {error}"
        yield function.qualname, shown


def _nearness(other: str, version: str) -> tuple[bool, tuple[tuple[int, ...], int, int]]:
    """Returns a sort key: the newest before `version` comes first, then the newest after."""
    return known_texts.order(other) <= known_texts.order(version), known_texts.order(other)


def _pins(tree: patch.SglangTree) -> str:
    files = list(tree.root.parent.glob("sglang-*.dist-info/METADATA"))
    pins = _PINS.findall(files[0].read_text("utf-8")) if len(files) == 1 else []
    return f", wants {', '.join(pins)}" if pins else ""


def _patches(root: Path, tree: patch.SglangTree, version: str) -> list[str]:
    stated = [] if tree.version else ["--version", version]
    return [
        sys.executable,
        str(root / "patches" / "make.py"),
        "--pristine",
        str(tree.root),
        *stated,
    ]


def _import(tree: patch.SglangTree) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(tree.root.parent)!r}); "
    return [sys.executable, "-c", f"{code}import sglang.srt.managers.scheduler"]


def _identity(root: Path, tree: patch.SglangTree, version: str) -> list[str]:
    """Returns the command of the identity test; it looks for versions here and in ``out/``."""
    link = root / "out" / f"sglang-{version}"
    if upstream_texts.package_of(version) is None and not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tree.root.parent)
    command = [sys.executable, "-m", "pytest", "-q", "test/e2e/test_versions.py"]
    return [*command, "-k", f"{version} and plugin"]


def _ran(name: str, command: list[str], root: Path, say: Callable[[str], object]) -> bool:
    path = [str(root / "python"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    env |= {"KAIROS_TEST_VERSIONS": "all"}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).strip().splitlines()
    mark = "  " if run.returncode == 0 else "!!"
    say(f"{mark}  {name}: {'done' if name == 'import' or not lines else lines[-1]}")
    if run.returncode:
        say("\n".join(f"        {line}" for line in lines[-12:]))
    return run.returncode == 0


def _left(made: PortPlan, say: Callable[[str], object]) -> None:
    names = ", ".join(verdict.seam.qualname for verdict in made.new) or "none"
    say(
        "left for a person:\n"
        f"    read the diffs of the texts that are new: {names}\n"
        "    a GPU: step times are not measured on a CPU as they are there\n"
        "    docs/upstream.md, Add a version, from step 3 on"
    )
