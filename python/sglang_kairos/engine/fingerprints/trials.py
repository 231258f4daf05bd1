"""Runs a function of SGLang by itself, on made-up objects, where its text does not tell enough.

The function's module is not imported.
"""

from __future__ import annotations

import ast
import collections
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sglang_kairos.engine.fingerprints.meanings import is_self, names_in
from sglang_kairos.engine.fingerprints.upstream_ast import Function, SourceTree


@dataclass(frozen=True)
class BusyTime:
    """The function adds each prefill step's own time to a counter of microseconds.

    That is the time from its launch to the call; where steps overlap, from the end of the one
    before. The function is run by itself on made-up batches; its module is not imported.
    """

    target: str
    counter: str

    def faults(self, tree: SourceTree) -> list[str]:
        """Returns the steps for which it adds another time."""
        node = tree.function(self.target)
        if node is None:
            return []
        # Launch and end of each in seconds. The last two overlap, the others stand alone.
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


def _run_on_steps(
    tree: SourceTree,
    target: str,
    node: Function,
    counter: str,
    steps: tuple[tuple[float, float], ...],
) -> list[float]:
    """Returns the seconds that each call adds."""
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
    scope |= {name: 10_000_000 for name in names_in(node) if name.endswith("_MAX_US")}
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
    """Returns the function `node` with `scope` for its module."""
    bare = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(bare, ast.FunctionDef)
    bare.decorator_list = []
    futures = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*futures, bare], []), "sglang", "exec"), scope)
    function: Callable[..., Any] = scope[node.name]
    return function


def _first_values(tree: SourceTree, target: str, node: Function) -> dict[str, Any]:
    """Returns what the class gives the attributes that a function reads, if plain values."""
    owner = tree.find(target.rpartition(".")[0])
    read = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    values: dict[str, Any] = {}
    for part in [] if owner is None else ast.walk(owner):
        if not isinstance(part, ast.Assign | ast.AnnAssign) or part.value is None:
            continue
        for place in part.targets if isinstance(part, ast.Assign) else [part.target]:
            if isinstance(place, ast.Attribute) and is_self(place.value) and place.attr in read:
                if (value := _plain(part.value)) is not _UNKNOWN:
                    values.setdefault(place.attr, value)
    return values


_UNKNOWN = object()
_EMPTY: dict[str, Callable[[], Any]] = {"deque": collections.deque, "list": list, "dict": dict}


def _plain(value: ast.expr) -> Any:
    """Returns a constant, or an empty container however it is to be bounded."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in _EMPTY:
        return _EMPTY[ast.unparse(value.func)]()
    try:
        return ast.literal_eval(value)
    except ValueError:
        return _UNKNOWN


class _Batch:
    """A prefill of one request, launched at a given time, after a pause or not."""

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
