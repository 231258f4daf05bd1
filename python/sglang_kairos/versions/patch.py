"""Applies Kairos' patches to an SGLang tree and takes them back.

``list`` shows the patches, ``check`` reports which of them fit, ``apply`` and ``revert`` change the
tree. A tree is a checkout of SGLang's repository, its ``python`` folder, or the package itself.
Without ``--tree`` it is the installed one.

Matching is exact: every context and removed line must be where the patch says. Everything is worked
out in memory before the first byte is written, and a failed write is rolled back.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sglang_kairos.commands import parser_of
from sglang_kairos.engine.fingerprints.known_texts import release

# Contents by path inside the package; None is a file that does not exist.
Files = Mapping[str, bytes | None]

LAYOUT = "python/sglang/"  # where SGLang's repository keeps the package
SEAMS_SOURCE = "kairos_seams.py"
SOUND = ("applied", "not applied")

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
# As setuptools-scm writes it; the tuple below it may hold texts too.
_VERSION = re.compile(r"^__version__\s*=[^'\"\n]*['\"]([^'\"\n]+)['\"]", re.MULTILINE)


class PatchError(Exception):
    """The request cannot be done; the message is for the user."""


class Misfit(PatchError):
    """A patch's context differs from what the tree holds."""


@dataclass(frozen=True)
class Hunk:
    """One ``@@`` block: lines `old` from line `old_start` on become `new` from `new_start` on."""

    old_start: int
    old: list[bytes]
    new_start: int
    new: list[bytes]


@dataclass(frozen=True)
class FileChange:
    """The change of one file. `creates`: the file is new, and its one hunk is the content."""

    path: str
    creates: bool
    hunks: list[Hunk]


@dataclass(frozen=True)
class Patch:
    """One file of the series."""

    name: str
    subject: str
    changes: list[FileChange]


def rewrite(change: FileChange, content: bytes | None, forward: bool = True) -> bytes | None:
    """Returns a file's content with `change` made, or taken back if not `forward`. Raises Misfit."""
    if change.creates:
        whole = b"\n".join(change.hunks[0].new) + b"\n"
        if content != (None if forward else whole):
            found = "is missing" if content is None else "exists with other content"
            raise Misfit(f"{LAYOUT}{change.path}: the patch creates this file, but it {found}")
        return whole if forward else None
    if content is None:
        raise Misfit(f"{LAYOUT}{change.path}: no such file")
    lines = content.split(b"\n")
    result: list[bytes] = []
    done = 0
    for number, hunk in enumerate(change.hunks, 1):
        start, before, after = (
            (hunk.old_start - 1, hunk.old, hunk.new)
            if forward
            else (hunk.new_start - 1, hunk.new, hunk.old)
        )
        for at, expected in enumerate(before, start):
            if at >= len(lines) or lines[at] != expected:
                found = repr(_text(lines[at])) if at < len(lines) else "the end of the file"
                raise Misfit(
                    f"{LAYOUT}{change.path}: hunk {number}: line {at + 1} should be "
                    f"{_text(expected)!r}, found {found}"
                )
        result += lines[done:start] + after
        done = start + len(before)
    return b"\n".join(result + lines[done:])


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")


def parse(name: str, data: bytes) -> Patch:
    """Reads a mail-style unified diff of text files: edits and new files, nothing else."""
    lines = data.split(b"\n")
    first = next((i for i, line in enumerate(lines) if line.startswith(b"diff --git ")), None)
    if first is None:
        raise PatchError(f"{name}: holds no diff")
    subjects = [line for line in lines[:first] if line.startswith(b"Subject: ")]
    subject = re.sub(r"^Subject: (\[PATCH[^]]*\] )?", "", _text(subjects[0])) if subjects else ""
    changes: list[FileChange] = []
    at = first
    while at < len(lines) and lines[at].startswith(b"diff --git "):
        change, at = _parse_change(name, lines, at + 1)
        changes.append(change)
    if any(lines[at:]) and lines[at] != b"-- ":  # git's signature
        raise PatchError(f"{name}: line {at + 1}: cannot read {_text(lines[at])!r}")
    return Patch(name, subject, changes)


def _parse_change(name: str, lines: list[bytes], at: int) -> tuple[FileChange, int]:
    unknown = False
    while at < len(lines) and not lines[at].startswith(b"--- "):
        unknown |= not lines[at].startswith((b"index ", b"new file mode 100644"))
        at += 1
    if unknown or at + 1 >= len(lines) or not lines[at + 1].startswith(b"+++ b/"):
        raise PatchError(f"{name}: line {at + 1}: only edits and new files are supported")
    creates = lines[at] == b"--- /dev/null"
    path = _text(lines[at + 1].removeprefix(b"+++ b/"))
    if not creates and lines[at] != b"--- a/" + path.encode():
        raise PatchError(f"{name}: line {at + 1}: renames are not supported")
    if not path.startswith(LAYOUT) or ".." in PurePosixPath(path).parts:
        raise PatchError(f"{name}: {path} is outside {LAYOUT}")
    at += 2
    hunks: list[Hunk] = []
    while at < len(lines) and (header := _HUNK.match(lines[at])):
        hunk, at = _parse_hunk(name, header, lines, at + 1)
        if hunks and hunk.old_start < hunks[-1].old_start + len(hunks[-1].old):
            raise PatchError(f"{name}: {path}: hunks overlap")
        hunks.append(hunk)
    if not hunks or (creates and (len(hunks) > 1 or hunks[0].old)):
        raise PatchError(f"{name}: {path}: malformed hunks")
    if not creates and any(not hunk.old or not hunk.new for hunk in hunks):
        raise PatchError(f"{name}: {path}: a hunk without context cannot be placed exactly")
    return FileChange(path.removeprefix(LAYOUT), creates, hunks), at


def _parse_hunk(
    name: str, header: re.Match[bytes], lines: list[bytes], at: int
) -> tuple[Hunk, int]:
    old_start, old_count, new_start, new_count = (int(n or 1) for n in header.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    while len(old) < old_count or len(new) < new_count:
        line = lines[at] if at < len(lines) else b""
        sides = {b" ": (old, new), b"-": (old,), b"+": (new,)}.get(line[:1])
        if sides is None:
            raise PatchError(f"{name}: line {at + 1}: cannot read {_text(line)!r} in a hunk")
        for side in sides:
            side.append(line[1:])
        at += 1
    if len(old) != old_count or len(new) != new_count:
        raise PatchError(f"{name}: line {at}: the hunk is longer than its header says")
    return Hunk(old_start, old, new_start, new), at


def patches_dir() -> Path:
    """Returns the ``patches`` folder: inside the installed package, or at the root of the checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "patches", package.parent.parent / "patches"):
        if (folder / SEAMS_SOURCE).is_file():
            return folder
    raise PatchError("Kairos' patches are not here: give their folder with --patches")


def versions(folder: Path) -> list[str]:
    """Returns the SGLang versions that `folder` has patches for."""
    return sorted(path.name.removeprefix("v") for path in folder.glob("v*") if path.is_dir())


def series(folder: Path, version: str) -> list[Patch]:
    """Returns the patches for one version, in the order in which they apply."""
    paths = sorted((folder / f"v{version}").glob("*.patch"))
    return [parse(path.name, path.read_bytes()) for path in paths]


@dataclass(frozen=True)
class SglangTree:
    """An SGLang package folder. `version`: what it says it is; None: it does not say."""

    root: Path
    version: str | None

    def read(self, paths: Iterable[str]) -> dict[str, bytes | None]:
        """Returns the contents of these files."""
        return {
            path: (self.root / path).read_bytes() if (self.root / path).is_file() else None
            for path in paths
        }


def find_tree(where: Path | None = None) -> SglangTree:
    """Returns the package in or at `where`, or the installed one, which is not imported."""
    if where is None:
        spec = importlib.util.find_spec("sglang")
        places = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
        missing = "SGLang is not installed in this environment; name a tree with --tree"
    else:
        places = [where / "python" / "sglang", where / "sglang", where]
        missing = (
            f"{where} holds no SGLang: no python/sglang, no sglang, and not the package itself"
        )
    for root in places:
        if (root / "__init__.py").is_file() and (root / "srt").is_dir():
            return SglangTree(root, _tree_version(root))
    raise PatchError(missing)


def _tree_version(root: Path) -> str | None:
    generated = root / "_version.py"
    if generated.is_file() and (match := _VERSION.search(generated.read_text(encoding="utf-8"))):
        return match[1]
    infos = list(root.parent.glob("sglang-*.dist-info"))
    names = [info.name.removeprefix("sglang-").removesuffix(".dist-info") for info in infos]
    return names[0] if len(names) == 1 else None


def supported_version(tree: SglangTree, stated: str | None, supported: list[str]) -> str:
    """Returns the version whose patches are for `tree`; a local part (``+cu129``) does not count.

    Raises PatchError if there are none, or if the tree contradicts `stated`.
    """
    known = f"Kairos has patches for {', '.join(supported) or 'no version'}"
    if tree.version is None and stated is None:
        raise PatchError(
            f"{tree.root} does not say which SGLang it is (a source tree knows only after an "
            f"install): state it with --version. {known}"
        )
    found = release(tree.version or stated or "")
    if stated is not None and found != stated.removeprefix("v"):
        raise PatchError(f"{tree.root} is SGLang {tree.version}, not {stated}. {known}")
    if found not in supported:
        raise PatchError(f"{tree.root} is SGLang {tree.version or stated}. {known}")
    return found


@dataclass(frozen=True)
class Standing:
    """How a tree relates to a series of patches.

    `base` holds the touched files without any of the patches, `full` with all of them. `states` has
    a line for each patch, by name. `fits` is False when one of them is a misfit; then `base` and
    `full` must not be written.
    """

    found: Files
    base: Files
    full: Files
    states: Mapping[str, str]
    fits: bool


def survey(tree: SglangTree, patches: list[Patch]) -> Standing:
    """Takes the applied patches off each file, last one first, then puts all of them on.

    This works file by file. A tree may have lost some files to a reinstall, or this process to a
    kill. Such a tree is recognised, and can be completed or cleaned.
    """
    changes = [(patch.name, change) for patch in patches for change in patch.changes]
    found = tree.read(sorted({change.path for _, change in changes}))
    base = dict(found)
    applied: Counter[str] = Counter()
    for name, change in reversed(changes):
        with contextlib.suppress(Misfit):
            base[change.path] = rewrite(change, base[change.path], forward=False)
            applied[name] += 1
    full = dict(base)
    misfits: dict[str, Misfit] = {}
    for name, change in changes:
        try:
            full[change.path] = rewrite(change, full[change.path])
        except Misfit as error:
            misfits.setdefault(name, error)
    states: dict[str, str] = {}
    for patch in patches:
        done, files = applied[patch.name], len(patch.changes)
        states[patch.name] = "applied" if done == files else "not applied"
        if 0 < done < files:
            states[patch.name] = (
                f"partly applied: {done} of {files} files (apply or revert mends it)"
            )
        if patch.name in misfits:
            states[patch.name] = f"does not fit: {misfits[patch.name]}"
    return Standing(found, base, full, states, not misfits)


class _PatchStep(NamedTuple):
    path: Path
    before: bytes | None
    after: bytes | None
    mode: int


def write(root: Path, before: Files, after: Files) -> list[str]:
    """Turns `before` into `after` under `root`, completely or not at all. Returns what changed."""
    changed = [path for path in after if after[path] != before.get(path)]
    steps = [_plan(root / path, before.get(path), after[path]) for path in changed]
    staged: list[Path | None] = []
    done: list[_PatchStep] = []
    try:
        for step in steps:
            staged.append(None if step.after is None else _stage(step.path, step.after, step.mode))
        for step, temporary in zip(steps, staged, strict=True):
            done.append(step)
            _put(step.path, temporary)
    except BaseException as error:
        stuck = _roll_back(done)
        if stuck:
            raise PatchError(f"{error}; could not restore {', '.join(stuck)}") from error
        if isinstance(error, OSError):
            raise PatchError(f"{error}; nothing was changed") from error
        raise
    finally:
        for leftover in filter(None, staged):
            leftover.unlink(missing_ok=True)
    return changed


def _plan(path: Path, before: bytes | None, after: bytes | None) -> _PatchStep:
    mode = path.stat().st_mode & 0o777 if before is not None else 0o644
    # The mode bits count too: a rename would replace a read-only file, and root may write anything.
    if not os.access(path.parent, os.W_OK) or (
        before is not None and not (mode & 0o222 and os.access(path, os.W_OK))
    ):
        raise PatchError(f"{path} is read-only for this user; nothing was changed")
    return _PatchStep(path, before, after, mode)


def _stage(path: Path, content: bytes, mode: int) -> Path:
    # Write a new file: installers such as uv hard-link packages to their cache.
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _put(path: Path, temporary: Path | None) -> None:
    if temporary is None:
        path.unlink(missing_ok=True)
        return
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _roll_back(steps: list[_PatchStep]) -> list[str]:
    stuck: list[str] = []
    for step in reversed(steps):
        try:
            if step.before is None:
                _put(step.path, None)
            elif step.path.read_bytes() != step.before:
                _put(step.path, _stage(step.path, step.before, step.mode))
        except OSError:
            stuck.append(str(step.path))
    return stuck


def _list(args: argparse.Namespace) -> int:
    folder: Path = args.patches or patches_dir()
    for version in versions(folder):
        print(f"SGLang {version}")
        for patch in series(folder, version):
            files = ", ".join(change.path for change in patch.changes)
            print(f"  {patch.name}: {patch.subject}\n    {files}")
    return 0


def _survey(args: argparse.Namespace) -> tuple[SglangTree, Standing]:
    folder: Path = args.patches or patches_dir()
    tree = find_tree(args.tree)
    version = supported_version(tree, args.version, versions(folder))
    print(f"SGLang {version} in {tree.root}")
    return tree, survey(tree, series(folder, version))


def _report(standing: Standing) -> str:
    return "\n".join(f"  {name}: {state}" for name, state in standing.states.items())


def _check(args: argparse.Namespace) -> int:
    _, standing = _survey(args)
    print(_report(standing))
    return 0 if set(standing.states.values()) <= set(SOUND) else 1


def _apply(args: argparse.Namespace) -> int:
    tree, standing = _survey(args)
    return _change(tree, standing, standing.full, "applied", "already applied")


def _revert(args: argparse.Namespace) -> int:
    tree, standing = _survey(args)
    return _change(tree, standing, standing.base, "reverted", "nothing to revert")


def _change(tree: SglangTree, standing: Standing, goal: Files, verb: str, idle: str) -> int:
    if not standing.fits:
        raise Misfit(f"not every patch fits, nothing was changed\n{_report(standing)}")
    changed = write(tree.root, standing.found, goal)
    if not changed:
        print(idle)
        return 0
    print(f"{verb}: {len(changed)} files\n  " + "\n  ".join(changed))
    if list(tree.root.parent.glob("sglang-*.dist-info/RECORD")):
        print(
            "The wheel's RECORD is left as it is, so an integrity check of the installation will "
            "report a patched tree; revert before you upgrade or uninstall SGLang."
        )
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of ``kairos patch``."""
    parser = parser_of("patch", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--patches", type=Path, help="folder of the patches (default: Kairos' own)")
    versioned = argparse.ArgumentParser(add_help=False)
    versioned.add_argument("--version", help="SGLang version of a tree that does not say it")
    treed = argparse.ArgumentParser(add_help=False)
    treed.add_argument("--tree", type=Path, help="SGLang tree (default: the installed package)")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("list", parents=[common], help="show the patches of each version")
    verb.set_defaults(run=_list)
    for name, run, text in (
        ("check", _check, "report for each patch: applied, not applied or does not fit"),
        ("apply", _apply, "apply what is not applied yet"),
        ("revert", _revert, "take every applied patch back"),
    ):
        verb = verbs.add_parser(name, parents=[common, versioned, treed], help=text)
        verb.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a verb. Returns 0 when all is well, 1 when a patch does not fit, 2 on other errors."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except Misfit as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (PatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
