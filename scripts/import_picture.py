#!/usr/bin/env python3
"""Checks that the package imports one way only, and draws it.

    python scripts/import_picture.py            exit code 1 if an import goes up, or in a circle
    python scripts/import_picture.py --write    also writes the picture into docs/architecture.md

Imports inside functions count as well. A room may import from the layers below its own.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sglang_kairos"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports: written by scripts/import_picture.py -->", "<!-- /imports -->"

# Bottom to top. A room is a folder, or single modules where a folder has a ground floor and a roof.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("ground",),
    ("slo",),
    ("config", "predict"),
    ("policy", "cpu", "loads"),
    ("router", "engine.fingerprints", "reports"),
    ("router.fleet", "engine.seams"),
    ("router.request", "engine", "sim.hardware", "sim.baselines"),
    ("router.control", "engine.state", "sim.core", "versions"),
    ("router.app", "engine.hooks", "sim.bound", "sim.calibrate", "cluster"),
    ("engine.plugin", "sim.cli", "calibrate"),
    ("start",),
)
# Where a module lies, when it is not in the room of its folder.
ELSEWHERE = {
    "": "ground",
    "registry": "ground",
    "processes": "ground",
    "local_http": "ground",
    "other_sglang": "versions",
    "gpu_flags": "start",
    "__main__": "start",
    "cli": "start",
    "completion": "start",
    "tools": "start",
    "launch_pd": "start",
    "launch_router": "start",
    "launch_server": "start",
    "router.app": "router.app",
    "router.serve": "router.app",
    "router.mini_lb": "router.app",
    "engine.plugin": "engine.plugin",
    "engine.dynamo": "engine.plugin",
    "sim.__main__": "start",
}


def modules(package: Path) -> dict[str, Path]:
    """Every module by its name within the package; the package itself is ''."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


def imports(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Modules that each module imports, wherever in it the import stands."""
    return {name: set(_imports_of(name, path, known)) for name, path in known.items()}


def _imports_of(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        for target in targets:
            head, _, inner = target.partition(".")
            if head != PACKAGE:
                continue
            # The module itself, or the one that the imported name lies in.
            inner = inner if inner in known else inner.rpartition(".")[0]
            if inner != name:
                yield inner


def room_of(module: str) -> str:
    """The room that a module lies in: its own entry, or that of the nearest folder."""
    rooms = {room for layer in LAYERS for room in layer}
    name = module
    while True:
        if name in ELSEWHERE:
            return ELSEWHERE[name]
        if name in rooms:
            return name
        if not name:
            raise SystemExit(f"{module}: in no room; add it to scripts/import_picture.py")
        name = name.rpartition(".")[0]


def upwards(edges: Mapping[str, set[str]]) -> list[str]:
    """Imports from a room that is not in a lower layer, as lines to print."""
    level = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    wrong = []
    for name, targets in edges.items():
        for target in sorted(targets):
            mine, theirs = room_of(name), room_of(target)
            if mine != theirs and level[theirs] >= level[mine]:
                wrong.append(f"{name} ({mine}) imports {target} ({theirs}), which is not below it")
    return wrong


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, in order; empty if there is none."""
    done: set[str] = set()
    for start in edges:
        path: list[str] = []
        found = _walk(start, edges, done, path)
        if found:
            return [*path[path.index(found) :], found]
    return []


def _walk(name: str, edges: Mapping[str, set[str]], done: set[str], path: list[str]) -> str:
    if name in path:
        return name
    if name in done:
        return ""
    path.append(name)
    for target in sorted(edges.get(name, ())):
        if found := _walk(target, edges, done, path):
            return found
    path.pop()
    done.add(name)
    return ""


def picture(edges: Mapping[str, set[str]]) -> str:
    """The rooms as a Mermaid graph: an arrow for each import that no longer way explains."""
    direct: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        for target in targets:
            if room_of(name) != room_of(target) != "ground":
                direct[room_of(name)].add(room_of(target))
    lines = ["```mermaid", "flowchart TD"]
    for layer in reversed(LAYERS):
        for room in layer:
            beyond = set().union(*(_reach(other, direct) for other in direct[room]))
            for target in sorted(direct[room] - beyond):
                lines.append(f"    {_id(room)}[{room}] --> {_id(target)}[{target}]")
    return "\n".join([*lines, "```"])


def _reach(room: str, direct: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(direct.get(room, ()))
    while todo:
        here = todo.pop()
        if here not in found:
            found.add(here)
            todo += direct.get(here, ())
    return found


def _id(room: str) -> str:
    return room.replace(".", "_")


def main() -> int:
    """Prints what is wrong; 1 if anything is, or if the picture in the page is an old one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the picture into the page")
    args = parser.parse_args()
    edges = imports(modules(ROOT / "python" / PACKAGE))
    wrong = upwards(edges)
    if found := circle(edges):
        wrong.append("a circle: " + " -> ".join(found))
    text = PAGE.read_text("utf-8")
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        fresh = f"{before}{BEGIN}\n{picture(edges)}\n{END}{rest.partition(END)[2]}"
        if args.write:
            PAGE.write_text(fresh, "utf-8")
        elif fresh != text:
            wrong.append(f"{PAGE.name}: an old picture; run scripts/import_picture.py --write")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
