"""What Kairos' handlers use of SGLang's objects, read from their own source: the check on `relied`.

Handlers get SGLang's objects untyped, so what is whose follows from the names of variables. One
that is in neither list is an error: nothing slips through.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sglang_kairos.engine.seams import table
from sglang_kairos.predict.learnt_file import KERNEL_SETTINGS

ENGINE = Path(table.__file__).parents[1]
PACKAGES = ("sglang_kairos.engine", "sglang_kairos.engine.hooks", "sglang_kairos.engine.state")
# No handlers: the tables, what reads SGLang's source, and the installer.
NO_HANDLERS = ("judge", "on_import", "plugin", "survey")
FOLDERS = (ENGINE, ENGINE / "hooks", ENGINE / "state")

# Variables that hold SGLang's objects. ``module.name`` goes before a bare name.
THEIRS = set(
    (
        "adder batch before decode.plan e entry envs gone graphs kv manager model output owner queue "
        "recv_req reporter req r prefill.one result scheduler server_args args slot_req snapshot "
        "subset_view.view tokenizer_manager AddReqResult BaseGrammarObject KVPoll LogitsProcessorOutput "
        "pool algorithm model_runner in_flight holder"
    ).split()
)
# Expressions that begin with a name of ours and hold an object of SGLang's.
THEIRS_WITHIN = (
    "state.scheduler",
    "self.scheduler",
    "self.batch",
    "state.subset",
    "watched.chunk",
    "get_parallel()",
    "type(req.grammar)",
    "state.launched",
)
OURS = set(
    (
        "KairosConfig CURRENT HTTPStatus Key RequestLimits SchedulerMetrics _LOST _MEMORIES abort "
        "active_config decision_log.record admission asked carried choice columns compat config "
        "copy counters dataclasses dict dist ended error fcntl features file first found functools "
        "int item itertools json kept key known kwargs last logger logging memory memory_of message "
        "metric mine aborts.one aborts.text np operator orjson os parked path pickle plan planner "
        "platform preferred promise random reqs rest roster row row_of self scheduler_infos scope "
        "set state statistics str table text through threading losses slo_middleware aborts prefill_step "
        "stamps seams fingerprints tp_sync scheduler_state graph_sizes time torch type value values "
        "verdict view views wire weakref watched len next getattr base chunks app name b more "
        "Counter gauge histogram counter metrics text_ silences sum max min sorted list tuple id "
        "map names each "
    ).split()
)
# Attributes of plain values: lists, dictionaries, texts, numbers, arrays, tensors.
PLAIN = set(
    "append copy extend index_copy items get pop remove rstrip setdefault startswith numpy sum device "
    "tolist split union intersection difference values __dict__ value".split()
)


# Modules that look attributes up by texts which they keep elsewhere, and what such a text looks like.
PATHS = {
    "aborts": re.compile(r"\w+_\w+(\.\w+)?"),
    "tp_sync": re.compile(r"\w+_cpu_group"),
}


@dataclass
class Node:
    """A function, class or constant of a module: the names of SGLang that it uses, and who is in it."""

    uses: set[str] = field(default_factory=set)
    refers: set[tuple[str, str]] = field(default_factory=set)


class Unknown(Exception):
    """A variable that is in neither list."""


def of_handler(handler: str) -> set[str]:
    """All that the function ``package.module:name`` and whatever it calls of ours use of SGLang."""
    module, name = handler.rsplit(".", 1)[-1].split(":")
    return _closure((module, name))


def of_state() -> set[str]:
    """What the scheduler's state uses, which every handler has."""
    return _closure(("scheduler_state", "KairosState"))


def _closure(start: tuple[str, str]) -> set[str]:
    seen: dict[tuple[str, str], Node] = {}
    todo = [start]
    while todo:
        here = todo.pop()
        if here in seen or here not in _definitions():
            continue
        # The state belongs to the seam that makes it.
        if here == ("scheduler_state", "KairosState") and start not in (
            here,
            ("lifecycle", "run_event_loop"),
        ):
            continue
        seen[here] = _node(here)
        todo += seen[here].refers
    return set().union(*(node.uses for node in seen.values()))


def uses_in(source: str) -> set[str]:
    """What the functions in a text use of SGLang."""
    trees: list[ast.AST] = list(ast.parse(source).body)
    return _read("", trees, {}).uses


@functools.cache
def _node(here: tuple[str, str]) -> Node:
    return _read(here[0], *_definitions()[here])


@functools.cache
def _definitions() -> dict[tuple[str, str], tuple[list[ast.AST], dict[str, tuple[str, str]]]]:
    """Every definition in the folder by module and name, and what names mean in its module."""
    return {
        (path.stem, name): (trees, imported)
        for folder in FOLDERS
        for path in sorted(folder.glob("*.py"))
        if path.stem not in NO_HANDLERS
        for imported, defined in [_module(path)]
        for name, trees in defined.items()
    }


def _module(path: Path) -> tuple[dict[str, tuple[str, str]], dict[str, list[ast.AST]]]:
    """What its names mean elsewhere in the folder, and its definitions by name."""
    imported: dict[str, tuple[str, str]] = {}
    defined: dict[str, list[ast.AST]] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            folder, _, module = (node.module or "").rpartition(".")
            for alias in node.names:
                if node.module in PACKAGES:
                    imported[alias.name] = (alias.name, "*")
                elif folder in PACKAGES:
                    imported[alias.name] = (module, alias.name)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                defined.setdefault(ast.unparse(target), []).append(node.value)
    for name in defined:
        imported[name] = (path.stem, name)
    return imported, defined


def _read(module: str, trees: list[ast.AST], imported: dict[str, tuple[str, str]]) -> Node:
    node = Node()
    for part in (part for tree in trees for part in _without_annotations(tree)):
        if isinstance(part, ast.Name) and part.id in imported:
            node.refers.add(imported[part.id])
        elif isinstance(part, ast.Attribute):
            head = imported.get(part.value.id) if isinstance(part.value, ast.Name) else None
            if head is not None and head[1] == "*":
                node.refers.add((head[0], part.attr))
            elif part.attr not in PLAIN and _is_theirs(module, part.value):
                node.uses.add(part.attr)
        elif isinstance(part, ast.Call):
            node.uses |= set(_by_name(module, part))
        elif isinstance(part, ast.Constant) and module in PATHS:
            if isinstance(part.value, str) and PATHS[module].fullmatch(part.value):
                node.uses |= set(part.value.split("."))
        elif isinstance(part, ast.ImportFrom) and (part.module or "").startswith("sglang."):
            node.uses |= {alias.name for alias in part.names}
    return node


def _without_annotations(tree: ast.AST) -> Iterator[ast.AST]:
    yield tree
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _without_annotations(child)


def _is_theirs(module: str, value: ast.expr) -> bool:
    text = ast.unparse(value)
    if text.startswith(THEIRS_WITHIN):
        return True
    while not isinstance(value, ast.Name):
        if isinstance(value, ast.Attribute | ast.Subscript | ast.Starred):
            value = value.value
        elif isinstance(value, ast.Call):
            looks_up = ast.unparse(value.func) == "getattr"
            value = value.args[0] if looks_up else value.func
        elif isinstance(value, ast.Constant | ast.JoinedStr | ast.NamedExpr | ast.Dict | ast.IfExp):
            return False
        else:
            raise Unknown(f"{module}: {text}")
    name = f"{module}.{value.id}"
    if name in THEIRS or (value.id in THEIRS and name not in OURS):
        return True
    if name in OURS or value.id in OURS or value.id.startswith("_"):
        return False
    raise Unknown(
        f"{module}: whose is {value.id!r} in {text!r}? (OURS or THEIRS in helpers/harvest.py)"
    )


def _by_name(module: str, call: ast.Call) -> Iterator[str]:
    """Names that are looked up as texts."""
    function = ast.unparse(call.func)
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    names = [text for text in texts if isinstance(text, str)]
    looks = function in ("getattr", "hasattr") and _is_theirs(module, call.args[0])
    if looks or function in ("_on", "told", "compat.feature"):
        yield from names[:1]
    elif function == "Key.of_server":
        yield from ("served_model_name", "model_path", *KERNEL_SETTINGS)
