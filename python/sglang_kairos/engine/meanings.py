"""What a function of SGLang must mean, as far as its source can tell: checks that `relied` declares.

Each check looks at one function of a source tree and gives the sentences that are not so; none: all
that the handler takes for granted is there. They are on the safe side: what they cannot follow is not so.
"""

from __future__ import annotations

import ast
import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from sglang_kairos.engine.upstream_ast import Function, Signature, Tree

_CHANGES = frozenset(
    "append appendleft extend insert remove pop popleft clear sort reverse update add discard".split()
)
_BUILT_IN = frozenset(
    "all any enumerate getattr hasattr isinstance len list max min range setattr sum tuple zip".split()
)


class Check(Protocol):
    """One thing that must be so in a tree."""

    @property
    def target(self) -> str: ...

    def faults(self, tree: Tree) -> list[str]: ...


@dataclass(frozen=True)
class Mentions:
    """The function uses all these names: it calls them, or reads or sets them."""

    target: str
    names: tuple[str, ...]

    def faults(self, tree: Tree) -> list[str]:
        """Names that it does without."""
        node = tree.function(self.target)
        used = set() if node is None else set(_names(node))
        return [f"it does nothing with {name}" for name in self.names if name not in used]


@dataclass(frozen=True)
class Takes:
    """It can be called with these arguments, given by place, and these by name."""

    target: str
    places: int
    names: tuple[str, ...] = ()

    def faults(self, tree: Tree) -> list[str]:
        """Parameters that it wants besides, or has not."""
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
class Decorated:
    """It has this decorator."""

    target: str
    decorator: str

    def faults(self, tree: Tree) -> list[str]:
        """That it has not."""
        node = tree.function(self.target)
        found = [] if node is None else [ast.unparse(d) for d in node.decorator_list]
        return [] if self.decorator in found else [f"it is no {self.decorator} any more"]


@dataclass(frozen=True)
class Sets:
    """Whatever it gives the attribute is one of these expressions."""

    target: str
    attribute: str
    values: tuple[str, ...]

    def faults(self, tree: Tree) -> list[str]:
        """Other values."""
        node = tree.function(self.target)
        found = [] if node is None else list(_assigned_values(node, self.attribute))
        return [f"it sets {self.attribute} to {v}" for v in found if v not in self.values]


@dataclass(frozen=True)
class Rebinds:
    """It gives ``self`` new values and never changes the old ones; the same of whatever it passes
    ``self`` on to. `looks`: methods of what ``self`` holds that are no matter."""

    target: str
    looks: tuple[str, ...]

    def faults(self, tree: Tree) -> list[str]:
        """What is changed in place, and what cannot be followed."""
        node = tree.function(self.target)
        return [] if node is None else list(self._in(tree, self.target, node, {"self"}, 3))

    def _in(
        self, tree: Tree, target: str, node: Function, owners: set[str], depth: int
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
        self, tree: Tree, target: str, call: ast.Call, owners: set[str], depth: int
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

    def faults(self, tree: Tree) -> list[str]:
        """Others that take part, or that there is no such variable."""
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


@dataclass(frozen=True)
class BusyTime:
    """It adds each prefill step's own time to a counter of microseconds: from its launch, or from the
    end of the one before where they overlap, to the call.

    The function is run, by itself, on batches made up for it. Its module is not imported.
    """

    target: str
    counter: str

    def faults(self, tree: Tree) -> list[str]:
        """Steps for which it adds another time."""
        node = tree.function(self.target)
        if node is None:
            return []
        # Launch and end of each, s; the second pair overlaps, the others stand alone.
        steps = ((10.0, 10.5), (20.0, 21.0), (30.0, 31.0), (30.4, 32.0))
        try:
            counted = _run_on_steps(tree, self.target, node, self.counter, steps)
        except Exception as error:
            return [f"its counting could not be tried: {type(error).__name__}: {error}"]
        wanted, before = [], 0.0
        for launched, ended in steps:
            wanted.append(ended - max(launched, before))
            before = ended
        return [
            f"a step launched at {step[0]:g} s that ends at {step[1]:g} s adds {got:g} s to "
            f"{self.counter}, not {want:g}"
            for step, got, want in zip(steps, counted, wanted, strict=True)
            if abs(got - want) > 1e-3
        ][:1]


def _names(node: ast.AST) -> Iterator[str]:
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
    """Attributes of ``self`` that reach `variable` by assignments; None if nothing does."""
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
                if isinstance(part, ast.Attribute) and _is_self(part.value):
                    found.add(part.attr)
                elif isinstance(part, ast.Name) and part.id not in seen:
                    seen.add(part.id)
                    todo.append(part.id)
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _run_on_steps(
    tree: Tree, target: str, node: Function, counter: str, steps: tuple[tuple[float, float], ...]
) -> list[float]:
    """Seconds that each call adds."""
    now = [0.0]
    scope: dict[str, Any] = {
        "time": SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0]),
        "is_health_check_generate_req": lambda req: False,
    }
    module = tree.module(target.split(":")[0])
    assert module is not None
    for statement in module.body:  # numbers by name
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            scope |= {ast.unparse(name): statement.value.value for name in statement.targets}
    scope |= {name: 10_000_000 for name in _names(node) if name.endswith("_MAX_US")}
    function = _alone(node, scope)
    owner = SimpleNamespace(**_first_values(tree, target, node))
    setattr(owner, counter, 0)
    added = []
    for place, (launched, ended) in enumerate(steps):
        now[0], before = ended, getattr(owner, counter)
        alone = place == 0 or launched > steps[place - 1][1]
        function(owner, _Batch(place, launched, alone), SimpleNamespace())
        added.append((getattr(owner, counter) - before) / 1e6)
    return added


def _alone(node: Function, scope: dict[str, Any]) -> Callable[..., Any]:
    """The function `node` with `scope` for its module."""
    bare = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(bare, ast.FunctionDef)
    bare.decorator_list = []
    futures = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*futures, bare], []), "sglang", "exec"), scope)
    function: Callable[..., Any] = scope[node.name]
    return function


def _first_values(tree: Tree, target: str, node: Function) -> dict[str, Any]:
    """What the class gives the attributes that a function reads, where that is a plain value."""
    owner = tree.find(target.rpartition(".")[0])
    read = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    values: dict[str, Any] = {}
    for part in [] if owner is None else ast.walk(owner):
        if not isinstance(part, ast.Assign | ast.AnnAssign) or part.value is None:
            continue
        for place in part.targets if isinstance(part, ast.Assign) else [part.target]:
            if isinstance(place, ast.Attribute) and _is_self(place.value) and place.attr in read:
                if (value := _plain(part.value)) is not _UNKNOWN:
                    values.setdefault(place.attr, value)
    return values


_UNKNOWN = object()
_EMPTY: dict[str, Callable[[], Any]] = {"deque": collections.deque, "list": list, "dict": dict}


def _plain(value: ast.expr) -> Any:
    """A constant, or an empty container however it is to be bounded."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in _EMPTY:
        return _EMPTY[ast.unparse(value.func)]()
    try:
        return ast.literal_eval(value)
    except ValueError:
        return _UNKNOWN


class _Batch:
    """A prefill of one request, launched at a time; after a pause or not."""

    def __init__(self, place: int, launched_s: float, after_idle_gap: bool) -> None:
        self.launch_ts, self.forward_iter = launched_s, place
        self.after_idle_gap = after_idle_gap
        self.reqs = [SimpleNamespace(rid="a")]
        self.extend_num_tokens = 1
        self.forward_mode = SimpleNamespace(
            is_extend_without_speculative=lambda: True,
            is_split_prefill=lambda: False,
            is_decode=lambda: False,
            is_target_verify=lambda: False,
        )
