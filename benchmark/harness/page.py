"""Markdown of results: tables, means with their range, and pages from templates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table, without a line break at its end."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float], digits: int = 1, unit: str = "", always: bool = False) -> str:
    """Returns the mean and, of several values or `always`, the lowest and the highest."""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1 or always:
        text += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return f"{text} {unit}".strip()


def render(template: Path, **values: Any) -> str:
    """Returns the template with its `$names` replaced. KeyError for a name without a value."""
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def parts_of(path: Path) -> tuple[str, str]:
    """Returns what stands before and behind the figures of a page. ValueError without the marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: needs a line {BEGIN} and, below it, {END}")
    return before, after


def drop_in(path: Path, text: str) -> None:
    """Puts `text` between the marks of a page. ValueError without them."""
    before, after = parts_of(path)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
