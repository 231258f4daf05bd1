"""Writes the seams patch anew from the table in `sglang_kairos.engine.seams`.

    PYTHONPATH=python python patches/make.py --pristine DIR

Run it whenever the table or ``kairos_seams.py`` changes; a test compares the result with the file.
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

from sglang_kairos.engine.seams import SEAMS, Seam
from sglang_kairos.engine.sources import fingerprint
from sglang_kairos.tools.patch import (
    LAYOUT,
    SEAMS_SOURCE,
    Files,
    PatchError,
    Tree,
    find_tree,
    parse,
    rewrite,
    series,
    supported_version,
    survey,
    versions,
)

FOLDER = Path(__file__).resolve().parent
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
    tree: Tree, folder: Path, version: str, seams: Iterable[Seam] = SEAMS
) -> tuple[str, bytes]:
    """Name and content of the seams patch for `tree`, which may be patched or not.

    Raises PatchError where the tree is not what the table of seams was written for.
    """
    by_hand = [p for p in series(folder, version) if not p.name.endswith(SEAMS_PATCH)]
    seams = [seam for seam in seams if version in seam.fingerprints]
    paths = {seam.module: seam.module.replace(".", "/") + ".py" for seam in seams}
    paths = {module: path.removeprefix("sglang/") for module, path in paths.items()}
    standing = survey(tree, series(folder, version))
    before = {**tree.read(paths.values()), **standing.base}
    for change in (change for patch in by_hand for change in patch.changes):
        before[change.path] = rewrite(change, before[change.path])
    new_file = SEAMS_MODULE.removeprefix("sglang.").replace(".", "/") + ".py"
    before[new_file] = None
    after = dict(before)
    after[new_file] = (folder / SEAMS_SOURCE).read_bytes()
    for module, path in paths.items():
        source = before[path]
        if source is None:
            raise PatchError(f"{tree.root} has no module {module}")
        after[path] = mark(
            source.decode(), [s for s in seams if s.module == module], version
        ).encode()
    listed = "\n\n".join(
        textwrap.fill(f"- {seam.qualname} ({seam.module}): {seam.why}", 72, subsequent_indent="  ")
        for seam in seams
    )
    body = (
        "Let a scheduling plugin step in at the functions below. Without a handler\n"
        "each of them runs as before: one dictionary look-up per call.\n\n" + listed
    )
    name = f"{len(by_hand) + 1:04d}-{SEAMS_PATCH}"
    return name, render("Add seams for SLO-aware scheduling", body, before, after)


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
    parser = argparse.ArgumentParser(description="Write the seams patch anew.")
    parser.add_argument(
        "--pristine", type=Path, help="SGLang tree (default: the installed package)"
    )
    parser.add_argument("--version", help="SGLang version of a tree that does not say it")
    args = parser.parse_args(argv)
    try:
        tree = find_tree(args.pristine)
        version = supported_version(tree, args.version, versions(FOLDER))
        name, content = make(tree, FOLDER, version)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for old in (FOLDER / f"v{version}").glob(f"*-{SEAMS_PATCH}"):
        old.unlink()
    path = FOLDER / f"v{version}" / name
    path.write_bytes(content)
    print(f"{path}: {len(parse(name, content).changes)} files")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
