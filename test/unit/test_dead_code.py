"""Nothing is defined in the package that only tests use, or nobody."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

USERS = ("python", "benchmark", "scripts", "patches")
# Used by what is not Python here, or from outside.
EXCUSED = {
    "Balancer": "the patch for SGLang's Python balancer (patches/sglang-router-0.3.2) makes one",
    "select_pair": "the same patch calls it",
    "assign_req_to_token_pool_cpu": "SGLang calls it: it stands in for a kernel",
    "handle_exit": "uvicorn calls it",
    "_get_help_string": "argparse calls it",
    "metrics_address": "tests ask which port the router's metrics got",
    "MINIMAX_M25_H200_TP4": "a shipped system by its short name",
}


def used(tree: ast.AST) -> Iterator[str]:
    """Names that a module reads, and the words of its short strings (handlers are named so)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if len(node.value) < 200:
                yield from re.findall(r"\w+", node.value)


def defined(tree: ast.Module) -> Iterator[str]:
    """Functions, methods, classes and the constants of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def unused(root: Path) -> set[str]:
    trees = {
        path: ast.parse(path.read_text("utf-8"))
        for folder in USERS
        for path in (root / folder).rglob("*.py")
    }
    known = {name for tree in trees.values() for name in used(tree)}
    package = root / "python"
    return {
        name
        for path, tree in trees.items()
        if package in path.parents
        for name in defined(tree)
        if name not in known and not name.startswith("__")
    }


def test_what_the_package_defines_is_used_outside_of_tests(repo_root: Path) -> None:
    assert unused(repo_root) - set(EXCUSED) == set()


def test_unused_names_are_found(tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "scripts").mkdir()
    text = "LIMIT = 1\nLOST = 2\nclass A:\n  def f(self): return LIMIT\n  def g(self): pass\n"
    (tmp_path / "python" / "a.py").write_text(text)
    (tmp_path / "scripts" / "b.py").write_text("from a import A\nprint(A().f(), 'a:h')\n")
    assert unused(tmp_path) == {"LOST", "g"}
