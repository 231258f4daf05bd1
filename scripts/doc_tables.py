"""Writes the tables in docs/ that come from tables in the code.

    PYTHONPATH=python python scripts/doc_tables.py

Each table stands between ``<!-- NAME: … -->`` and ``<!-- end of NAME -->``. A test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sglang_kairos.engine.features import FEATURES, Action
from sglang_kairos.engine.seams.table import SEAMS, Seam
from sglang_kairos.names import RENAMED

DOCS = Path(__file__).resolve().parent.parent / "docs"
MIXIN = "SchedulerDisaggregationPrefillMixin."
UPSTREAM = "https://github.com/sgl-project/sglang/issues/"  # leads to pull requests as well


def features_table() -> str:
    """Returns the table of what SGLang's features forbid Kairos to do."""
    actions: tuple[Action, ...] = ("pause", "park", "reserve")
    lines = [
        "| SGLang feature | pausing | parking | steps limit admission | found |",
        "|---|---|---|---|---|",
    ]
    for row in FEATURES:
        name = row.name + (f" (`{row.flag}`)" if row.flag else "")
        refused = not set(row.forbids).isdisjoint(("start", "serve"))
        cells = [
            "refused" if refused else "off" if action in row.forbids else "on" for action in actions
        ]
        where = "each batch" if row.server is None else "at start-up"
        lines.append(f"| {name} | {' | '.join(cells)} | {where} |")
    return "\n".join(lines)


def seams_table() -> str:
    """Returns the table of seams that rely on more of SGLang, or have something close upstream."""
    lines = [
        "| wraps | its handler also calls or replaces | nearest upstream |",
        "|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(s) for s in SEAMS if s.relies_on or s.upstream)])


def _row(seam: Seam) -> str:
    names = [callee.qualname.removeprefix(MIXIN) for callee in seam.relies_on]
    relied_on = ", ".join(f"`{name}`" for name in names)
    _, _, reference = seam.upstream.partition("#")
    number, _, what = reference.partition(": ")
    link = f"[#{number}]({UPSTREAM}{number}): {what}" if number else "–"
    return f"| `{seam.qualname}` | {relied_on or '–'} | {link} |"


def names_table() -> str:
    """Returns the table of public names that have changed."""
    rows = [f"| {row.kind} | `{row.old}` | `{row.new}` |" for row in RENAMED]
    return "\n".join(["| what | old | new |", "|---|---|---|", *rows])


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "names": ("glossary.md", names_table),
    "features": ("architecture.md", features_table),
    "seams": ("upstream.md", seams_table),
}


def renewed(page: str, name: str, table: str) -> str:
    """Returns `page` with `table` between the marks of `name`.

    Raises ValueError unless the marks are there exactly once.
    """
    marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)", re.S)
    text, count = marks.subn(lambda found: f"{found[1]}{table}\n{found[2]}", page)
    if count != 1:
        raise ValueError(f"the marks of the table {name!r} are there {count} times")
    return text


def main() -> None:
    for name, (file, table) in TABLES.items():
        path = DOCS / file
        path.write_text(renewed(path.read_text("utf-8"), name, table()), "utf-8")


if __name__ == "__main__":
    main()
