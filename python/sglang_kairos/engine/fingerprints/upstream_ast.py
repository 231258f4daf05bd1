"""Reads from source what SGLang's classes have: attributes, functions, parameters.

Nothing is imported. An attribute counts as there if its class or a base defines it,
declares it, or assigns it to ``self`` in one of its functions.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Signature:
    """The parameters of a function: names in order, which of them are required, and `**` names."""

    names: tuple[str, ...]
    needed: tuple[str, ...]
    keyword_only: tuple[str, ...]
    open_ended: bool

    @classmethod
    def of(cls, node: Function) -> Signature:
        """Returns those of a function's definition."""
        args = node.args
        names = tuple(arg.arg for arg in (*args.posonlyargs, *args.args))
        needed = names[: len(names) - len(args.defaults)]
        only = tuple(arg.arg for arg in args.kwonlyargs)
        return cls(names, needed, only, args.vararg is not None and args.kwarg is not None)


class SourceTree:
    """The source of one SGLang, each module parsed once. `package`: its folder ``sglang``."""

    def __init__(self, package: Path) -> None:
        self._package = package
        self._modules: dict[str, ast.Module | None] = {}
        self._members: dict[str, frozenset[str] | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """Returns a module by its full name, or None."""
        if name not in self._modules:
            base = self._package.joinpath(*name.split(".")[1:])
            found = (p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file())
            path = next(found, None)
            self._modules[name] = ast.parse(path.read_text("utf-8")) if path else None
        return self._modules[name]

    def find(self, target: str) -> Function | ast.ClassDef | None:
        """Returns the definition ``module:qualified.name``; the last of several, as in Python."""
        name, _, qualname = target.partition(":")
        module = self.module(name)
        body = [] if module is None else module.body
        found: Function | ast.ClassDef | None = None
        for part in qualname.split("."):
            found = _last_named(body, part)
            if found is None:
                return None
            body = found.body
        return found

    def function(self, target: str) -> Function | None:
        """Returns the same, if it is a function."""
        found = self.find(target)
        return None if isinstance(found, ast.ClassDef) else found

    def origin(self, module: str, name: str) -> str:
        """Returns where the thing that a module calls `name` is defined, as ``module:name``."""
        tree = self.module(module)
        return f"{(tree and _imports(tree).get(name)) or module}:{name}"

    def has(self, target: str) -> bool:
        """Returns whether a module has such a function, class or name (imported ones count)."""
        name, _, wanted = target.partition(":")
        module = self.module(name)
        if module is None:
            return False
        return self.find(target) is not None or wanted in _names_of(module.body)

    def members(self, place: str) -> frozenset[str] | None:
        """Returns attributes of the class ``module:Class`` and its bases; None if there is none.

        ``package.*:*`` is all classes of all modules in a package, ``module:*`` those of one
        module.
        """
        if place not in self._members:
            self._members[place] = None  # a class among its own bases
            found = list(self._classes(place))
            if found:
                of_all = (self._of_class(module, node) for module, node in found)
                self._members[place] = frozenset().union(*of_all)
        return self._members[place]

    def takes_new(self, place: str) -> bool:
        """Returns whether objects of the class may be given attributes that it does not know."""
        found = list(self._classes(place))
        return bool(found) and not any(_closed(node) for _, node in found)

    def assigned(self, module: str) -> frozenset[str]:
        """Returns the attributes that a module gives any object, by whatever name it calls it."""
        node = self.module(module)
        return frozenset() if node is None else frozenset(_assigned(node))

    def _classes(self, place: str) -> Iterator[tuple[str, ast.ClassDef]]:
        name, _, wanted = place.partition(":")
        modules = [name]
        if name.endswith(".*"):
            folder = self._package.joinpath(*name.split(".")[1:-1])
            modules = [f"{name[:-2]}.{path.stem}" for path in sorted(folder.glob("*.py"))]
        for module in modules:
            tree = self.module(module)
            for node in [] if tree is None else _classes_in(tree.body):
                if wanted in ("*", node.name):
                    yield module, node

    def _of_class(self, module: str, node: ast.ClassDef) -> frozenset[str]:
        own = _names_of(node.body) | set(_assigned(node, "self"))
        bases = [self._place_of(module, base) for base in node.bases]
        theirs = (self.members(base) or frozenset() for base in bases if base)
        return frozenset(own).union(*theirs)

    def _place_of(self, module: str, base: ast.expr) -> str | None:
        if isinstance(base, ast.Subscript):
            base = base.value
        if not isinstance(base, ast.Name):
            return None
        tree = self.module(module)
        assert tree is not None
        imported = _imports(tree).get(base.id)
        return f"{imported}:{base.id}" if imported else f"{module}:{base.id}"


def _classes_in(body: list[ast.stmt]) -> Iterator[ast.ClassDef]:
    """Yields the classes of a module, in its branches too.

    Not those within functions or classes.
    """
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _classes_in([*node.body, *node.orelse])


def _closed(node: ast.ClassDef) -> bool:
    bases = {ast.unparse(base) for base in node.bases}
    options = " ".join(map(ast.unparse, node.decorator_list)).replace(" ", "")
    closed = "slots=True" in options or "frozen=True" in options
    return closed or "__slots__" in _names_of(node.body) or "msgspec.Struct" in bases


def _last_named(body: list[ast.stmt], name: str) -> Function | ast.ClassDef | None:
    named = [
        node
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name == name
    ]
    return named[-1] if named else None


def _names_of(body: list[ast.stmt]) -> set[str]:
    """Returns names that statements define: functions, classes, assignments and imports.

    Branches are included.
    """
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            found |= _names_of([*node.body, *node.orelse, *getattr(node, "finalbody", [])])
    return found


def _assigned(tree: ast.AST, owner: str | None = None) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if owner is None or (isinstance(node.value, ast.Name) and node.value.id == owner):
                yield node.attr


@functools.lru_cache(maxsize=64)
def _imports(tree: ast.Module) -> dict[str, str]:
    """Returns the module that each imported name comes from."""
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
        for alias in node.names
    }
