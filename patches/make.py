"""Writes the patches of one SGLang version anew: the fixes it needs, then the seams.

    PYTHONPATH=python python patches/make.py --pristine DIR

Fixes come from ``fixes.py``, seams from the table in `sglang_kairos.engine.seams.table`. Run it whenever
they or ``kairos_seams.py`` change; a test compares the result with the files.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from sglang_kairos.engine.seams.table import SEAMS, SUPPORTED_VERSIONS, Seam
from sglang_kairos.engine.survey import fingerprint
from sglang_kairos.versions.patch import LAYOUT, SEAMS_SOURCE, Files, PatchError, SglangTree, find_tree, parse, series, supported_version, survey

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from fixes import FIXES, Fix, Unfit  # noqa: E402

SEAMS_MODULE = "sglang.srt.kairos_seams"
SEAMS_PATCH = "kairos-seams.patch"
AUTHOR = "The Kairos authors <kairos-authors@example.invalid>"
UPSTREAM_LINE_LENGTH = 88


def render(subject: str, body: str, before: Files, after: Files) -> bytes:
    """A mail-style patch that `parse`, ``git am`` and ``git apply`` read. The same on every run."""
    head = (
        "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"
        f"From: {AUTHOR}\nSubject: [PATCH] {subject}\n\n{body.strip()}\n---\n\n"
    )
    parts = [head.encode()]
    for path in sorted(after):
        if after[path] != before.get(path):
            parts.append(_diff(path, before.get(path), after[path] or b""))
    return b"".join(parts)


def _diff(path: str, old: bytes | None, new: bytes) -> bytes:
    name = f"{LAYOUT}{path}"
    mode = "" if old is not None else "new file mode 100644\n"
    suffix = " 100644" if old is not None else ""
    head = f"diff --git a/{name} b/{name}\n{mode}index {_blob(old)}..{_blob(new)}{suffix}\n"
    lines = difflib.diff_bytes(
        difflib.unified_diff,
        (old or b"").splitlines(keepends=True),
        new.splitlines(keepends=True),
        b"/dev/null" if old is None else f"a/{name}".encode(),
        f"b/{name}".encode(),
    )
    return head.encode() + b"".join(lines)


def _blob(content: bytes | None) -> str:
    """Abbreviated git object name: lets ``git am -3`` find the version a patch was made for."""
    if content is None:
        return "0" * 12
    data = b"blob %d\0" % len(content) + content
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]


def make(
    tree: SglangTree, folder: Path, version: str, seams: Iterable[Seam] = SEAMS
) -> dict[str, bytes]:
    """The patches for `tree`, which may be patched or not: contents by name, in order.

    Raises PatchError where the tree is not what the tables were written for.
    """
    seams = [seam for seam in seams if version in seam.fingerprints]
    paths = {seam.module: _path_of(seam.module) for seam in seams}
    patched = series(folder, version)
    standing = survey(tree, patched) if patched else None
    before: dict[str, bytes | None] = dict(
        tree.read({*paths.values(), *(fix.path for fix in FIXES)})
    )
    if standing is not None:
        before |= {path: standing.base[path] for path in before if path in standing.base}
    made: dict[str, bytes] = {}
    for fix in FIXES:
        after = _fixed(fix, before)
        if after is not None:
            made[f"{len(made) + 1:04d}-{fix.name}.patch"] = render(
                fix.subject, fix.body, before, after
            )
            before = after
    made[f"{len(made) + 1:04d}-{SEAMS_PATCH}"] = _seams_patch(
        tree, folder, version, seams, paths, before
    )
    return made


def _path_of(module: str) -> str:
    return module.removeprefix("sglang.").replace(".", "/") + ".py"


def _fixed(fix: Fix, before: dict[str, bytes | None]) -> dict[str, bytes | None] | None:
    source = before[fix.path]
    try:
        fixed = fix.made(None if source is None else source.decode())
    except Unfit as error:
        raise PatchError(f"{fix.path}: {error}") from None
    return None if fixed is None else {**before, fix.path: fixed.encode()}


def _seams_patch(
    tree: SglangTree,
    folder: Path,
    version: str,
    seams: list[Seam],
    paths: dict[str, str],
    fixed: dict[str, bytes | None],
) -> bytes:
    new_file = _path_of(SEAMS_MODULE)
    before = {**{path: fixed[path] for path in paths.values()}, new_file: None}
    after = {**before, new_file: (folder / SEAMS_SOURCE).read_bytes()}
    for module, path in paths.items():
        source = before[path]
        if source is None:
            raise PatchError(f"{tree.root} has no module {module}")
        marked = mark(source.decode(), [s for s in seams if s.module == module], version)
        after[path] = marked.encode()
    listed = "\n\n".join(
        textwrap.fill(f"- {seam.qualname} ({seam.module}): {seam.why}", 72, subsequent_indent="  ")
        for seam in seams
    )
    body = (
        "Let a scheduling plugin step in at the functions below. Without a handler\n"
        "each of them runs as before: one dictionary look-up per call.\n\n" + listed
    )
    return render("Add seams for SLO-aware scheduling", body, before, after)


def mark(source: str, seams: list[Seam], version: str) -> str:
    """`source` with an import line and a decorator above each seam."""
    module = ast.parse(source)
    insertions: list[tuple[int, str]] = [(_import_line(module), _import_text())]
    for seam in seams:
        found = fingerprint(source, seam.qualname)
        if found != seam.fingerprints[version]:
            raise PatchError(
                f"{seam.target} is {found or 'missing'}, the table of seams says "
                f"{seam.fingerprints[version]} for {version}"
            )
        insertions.append(_decorator(module, seam))
    lines = source.split("\n")
    for line, text in sorted(insertions, reverse=True):
        lines.insert(line - 1, text)
    return "\n".join(lines)


def _import_text() -> str:
    return f"from {SEAMS_MODULE} import kairos_seam"


def _import_line(module: ast.Module) -> int:
    """The line that the import goes before: its place in isort's order, in the longest block."""
    runs: list[list[ast.Import | ast.ImportFrom]] = [[]]
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            runs[-1].append(node)
        else:
            runs.append([])
    block = max(runs, key=len)
    for node in block:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
            if (node.module or "") > SEAMS_MODULE:
                return node.lineno
    if not block:
        raise PatchError("a module without imports has no place for one")
    return (block[-1].end_lineno or block[-1].lineno) + 1


def _decorator(module: ast.Module, seam: Seam) -> tuple[int, str]:
    """Line to insert before, and text: outermost, save for what makes descriptors."""
    node = _definition(module, seam.qualname)
    line = node.lineno
    for decorator in reversed(node.decorator_list):
        if ast.unparse(decorator) in ("staticmethod", "classmethod", "property"):
            break
        line = decorator.lineno
    pad = " " * node.col_offset
    text = f'{pad}@kairos_seam("{seam.target}")'
    if len(text) > UPSTREAM_LINE_LENGTH:
        text = f'{pad}@kairos_seam(\n{pad}    "{seam.target}"\n{pad})'
    return line, text


def _definition(module: ast.Module, qualname: str) -> ast.FunctionDef:
    body: list[ast.stmt] = module.body
    *classes, name = qualname.split(".")
    for outer in classes:
        body = next(n.body for n in body if isinstance(n, ast.ClassDef) and n.name == outer)
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise PatchError(f"{qualname} is not a plain function: a seam cannot wrap it")


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0, or 2 when the tree is not what the table was written for."""
    parser = argparse.ArgumentParser(description="Write the patches of a version anew.")
    parser.add_argument(
        "--pristine", type=Path, help="SGLang tree (default: the installed package)"
    )
    parser.add_argument("--version", help="SGLang version of a tree that does not say it")
    args = parser.parse_args(argv)
    try:
        tree = find_tree(args.pristine)
        version = supported_version(tree, args.version, list(SUPPORTED_VERSIONS))
        made = make(tree, FOLDER, version)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    target = FOLDER / f"v{version}"
    target.mkdir(exist_ok=True)
    for old in target.glob("*.patch"):
        old.unlink()
    for name, content in made.items():
        (target / name).write_bytes(content)
        print(f"{target / name}: {len(parse(name, content).changes)} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
