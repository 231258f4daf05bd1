"""Checks what a function of SGLang must mean, as far as its source can tell.

Each check looks at one function of a source tree and returns the sentences that do not hold. None
means that all that the handler takes for granted is there. Checks are on the safe side: what they
cannot follow does not hold.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from sglang_kairos.engine.fingerprints.upstream_ast import Function, Signature, SourceTree

_CHANGES = frozenset(
    "append appendleft extend insert remove pop popleft clear sort reverse update add discard".split()
)
_BUILT_IN = frozenset(
    "all any enumerate getattr hasattr isinstance len list max min range setattr sum tuple zip".split()
)


class SourceCheck(Protocol):
    """One thing that must hold in a tree."""

    @property
    def target(self) -> str: ...

    def faults(self, tree: SourceTree) -> list[str]: ...


@dataclass(frozen=True)
class Mentions:
    """The function uses all these names: it calls them, or reads or sets them."""

    target: str
    names: tuple[str, ...]

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns the names that it does not use."""
        node = tree.function(self.target)
        used = set() if node is None else set(names_in(node))
        return [f"it does nothing with {name}" for name in self.names if name not in used]


@dataclass(frozen=True)
class Delegates:
    """The function uses all of `itself` directly, or leaves that to one of the seams."""

    target: str
    itself: tuple[str, ...]
    seams: tuple[str, ...]

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns that it leaves them to another function."""
        node = tree.function(self.target)
        used = set() if node is None else set(names_in(node))
        if used.issuperset(self.itself) or any(seam.split(".")[-1] in used for seam in self.seams):
            return []
        return [f"it leaves {', '.join(self.itself)} to a function that is no seam"]


@dataclass(frozen=True)
class Takes:
    """The function can be called with these arguments by place, and these by name."""

    target: str
    places: int
    names: tuple[str, ...] = ()

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns the parameters that it requires besides, or lacks."""
        node = tree.function(self.target)
        if node is None:
            return []
        has = Signature.of(node)
        wanted = [
            name
            for place, name in enumerate(has.needed)
            if place >= self.places and name not in self.names
        ]
        faults = [f"it wants an argument {name}" for name in wanted]
        if len(has.names) < self.places:
            faults.append(f"it takes {len(has.names)} arguments, not {self.places}")
        known = {*has.names, *has.keyword_only}
        return faults + [f"it has no argument {name}" for name in self.names if name not in known]


@dataclass(frozen=True)
class AskedBy:
    """These functions of a module still call it: a seam that nobody calls does nothing."""

    target: str
    module: str
    callers: tuple[str, ...]

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns the callers that are gone, or call others."""
        module, name = tree.module(self.module), self.target.rpartition(".")[2].rpartition(":")[2]
        found = {
            part.name: part
            for part in ([] if module is None else ast.walk(module))
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            and part.name in self.callers
        }
        return [
            f"{caller} does not ask for it" if caller in found else f"no {caller} that asks for it"
            for caller in self.callers
            if caller not in found or name not in set(names_in(found[caller]))
        ]


@dataclass(frozen=True)
class Decorated:
    """The function has this decorator."""

    target: str
    decorator: str

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns that it has not."""
        node = tree.function(self.target)
        found = [] if node is None else [ast.unparse(d) for d in node.decorator_list]
        return [] if self.decorator in found else [f"it is no {self.decorator} any more"]


@dataclass(frozen=True)
class Sets:
    """Whatever the function gives the attribute is one of these expressions."""

    target: str
    attribute: str
    values: tuple[str, ...]

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns the other values."""
        node = tree.function(self.target)
        found = [] if node is None else list(_assigned_values(node, self.attribute))
        return [f"it sets {self.attribute} to {v}" for v in found if v not in self.values]


@dataclass(frozen=True)
class Rebinds:
    """The function gives ``self`` new values and never changes the old ones.

    The same holds for whatever it passes ``self`` on to. `looks`: methods of what ``self`` holds
    that change nothing.
    """

    target: str
    looks: tuple[str, ...]

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns what is changed in place, and what cannot be followed."""
        node = tree.function(self.target)
        return [] if node is None else list(self._in(tree, self.target, node, {"self"}, 3))

    def _in(
        self, tree: SourceTree, target: str, node: Function, owners: set[str], depth: int
    ) -> Iterator[str]:
        for part in ast.walk(node):
            if isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store | ast.Del):
                if _root(part) in owners:
                    yield f"it changes {ast.unparse(part)} in place"
            elif isinstance(part, ast.AugAssign) and _root(part.target) in owners:
                yield f"it changes {ast.unparse(part.target)} in place"
            elif isinstance(part, ast.Call):
                yield from self._called(tree, target, part, owners, depth)

    def _called(
        self, tree: SourceTree, target: str, call: ast.Call, owners: set[str], depth: int
    ) -> Iterator[str]:
        of = call.func
        if isinstance(of, ast.Attribute) and _root(of) in owners:
            if isinstance(of.value, ast.Name):  # a method of its own
                inner, given = f"{target.rpartition('.')[0]}.{of.attr}", {"self"}
                if given != owners:
                    return
            elif of.attr in _CHANGES or (of.attr.endswith("_") and not of.attr.endswith("__")):
                yield f"it changes {ast.unparse(of.value)} in place ({of.attr})"
                return
            elif of.attr in self.looks:
                return
            else:
                yield f"it calls {ast.unparse(of)}"
                return
        elif isinstance(of, ast.Name) and any(
            isinstance(arg, ast.Name) and arg.id in owners for arg in call.args
        ):
            if of.id in _BUILT_IN:
                return
            inner, given = tree.origin(target.split(":")[0], of.id), set()
        else:
            return
        body = tree.function(inner)
        if body is None or not depth:
            yield f"it hands itself to {ast.unparse(of)}"
            return
        names = Signature.of(body).names
        yield from self._in(tree, inner, body, given & set(names) or set(names), depth - 1)


@dataclass(frozen=True)
class Flow:
    """Only these attributes of ``self`` decide the value of a local variable."""

    target: str
    variable: str
    sources: tuple[str, ...]

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns other attributes that take part, or that there is no such variable."""
        node = tree.function(self.target)
        if node is None:
            return []
        found = _sources(node, self.variable)
        if found is None:
            return [f"it has no variable {self.variable}"]
        return [
            f"{self.variable} also depends on self.{name}"
            for name in sorted(found.difference(self.sources))
        ]


def names_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _assigned_values(node: ast.AST, attribute: str) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Assign | ast.AnnAssign) and part.value is not None:
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr == attribute:
                    yield ast.unparse(part.value)


def _sources(node: Function, variable: str) -> set[str] | None:
    """Returns the attributes of ``self`` that reach `variable` by assignments.

    None if none does.
    """
    given: dict[str, list[ast.expr]] = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Assign | ast.AugAssign | ast.AnnAssign) and part.value is not None:
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    given.setdefault(target.id, []).append(part.value)
    if variable not in given:
        return None
    todo, seen, found = [variable], {variable}, set()
    while todo:
        for value in given.get(todo.pop(), []):
            for part in ast.walk(value):
                if isinstance(part, ast.Attribute) and is_self(part.value):
                    found.add(part.attr)
                elif isinstance(part, ast.Name) and part.id not in seen:
                    seen.add(part.id)
                    todo.append(part.id)
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
