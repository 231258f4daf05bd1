#!/usr/bin/env python3
"""Finds sentences of more than 25 words in docs, docstrings, help texts and error messages.

    python scripts/english.py [--longest N] [PATH …]     default: everything; exit code 1 if any is
    found

Names in code style, links and numbers count as one word each. Tables and code blocks are not read.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = (
    "README.md",
    "CONTRIBUTING.md",
    "docs",
    "patches",
    "findings",
    "python",
    "benchmark",
    "contrib",
)
# Evidence, dated: it is read beside the run that made it.
NOT_READ = ("docs/results/",)
LIMIT = 25
# Calls and keywords whose texts a user reads.
HELP_KEYWORDS = {"help", "description", "epilog", "why", "how", "gone_when"}

_CODE = re.compile(r"``[^`]*``|`[^`]*`")
_LINK = re.compile(r"!?\[([^]]*)\]\([^)]*\)")
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?](?:[)\"'*]*)(?=\s|$)")


class Found(NamedTuple):
    """A sentence that is too long: where it begins, how many words it has, and the sentence."""

    path: Path
    line: int
    words: int
    text: str


def too_long(text: str, limit: int = LIMIT) -> Iterator[tuple[int, int, str]]:
    """Offset in `text`, number of words and text of each sentence with more than `limit` words."""
    flat = _LINK.sub(lambda match: match[1].ljust(len(match[0])), text)
    flat = _CODE.sub(lambda match: "x" * len(match[0]), flat)
    begin = 0
    ends = [match.end() for match in _SENTENCE_END.finditer(flat)]
    for end in [*ends, len(flat)]:
        words = [word for word in flat[begin:end].split() if re.search(r"\w", word)]
        if len(words) > limit:
            shown = " ".join(text[begin:end].split())
            yield begin + len(text[begin:end]) - len(text[begin:end].lstrip()), len(words), shown
        begin = end


def paragraphs(markdown: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each paragraph and list item; no code, tables, headings, comments."""
    block: list[str] = []
    began, fenced = 0, False
    for number, line in enumerate([*markdown.split("\n"), ""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        stop = fenced or not line.strip() or re.match(r"\s*(\||#|<!--|<|>?\s*$)", line)
        item = re.match(r"\s*([-*+]|\d+\.)\s+", line)
        if (stop or item) and block:
            yield began, "\n".join(block)
            block = []
        if not stop:
            if not block:
                began = number
            block.append(line[item.end() :] if item else line)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line number and text of every docstring, paragraph by paragraph, indented examples left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text and isinstance(node.body[0], ast.Expr):
                for number, block in paragraphs(text):
                    lines = [line for line in block.split("\n") if not line.startswith("    ")]
                    yield node.body[0].lineno + number - 1, "\n".join(lines)


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line number and text of help texts and of what is raised; a value put in is one word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            asked = [word.value for word in node.keywords if word.arg in HELP_KEYWORDS]
            if isinstance(node.func, ast.Name) and node.func.id == "_setting":
                asked += node.args[1:2]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            asked = list(node.exc.args)
        else:
            continue
        for value in asked:
            if text := _text(value):
                yield value.lineno, text


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "x" for part in node.values)
    if isinstance(node, ast.BinOp):
        return f"{_text(node.left)}{_text(node.right)}"
    return ""


def read(path: Path) -> Iterator[Found]:
    """What is too long in a file."""
    source = path.read_text("utf-8")
    if path.suffix == ".md":
        blocks = list(paragraphs(source))
    else:
        tree = ast.parse(source)
        blocks = [*docstrings(tree), *messages(tree)]
    for line, block in blocks:
        for offset, words, text in too_long(block):
            yield Found(path, line + block[:offset].count("\n"), words, text)


def files(named: list[str]) -> Iterator[Path]:
    """The Markdown and Python files that are named, or lie in folders that are."""
    for name in named:
        path = Path(name).resolve()
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for each in inside:
            if each.suffix in (".md", ".py") and each.is_file():
                shown = str(each.relative_to(ROOT)) if each.is_relative_to(ROOT) else str(each)
                if not shown.startswith(NOT_READ):
                    yield each


def main() -> int:
    """Prints what it finds; 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", metavar="PATH")
    parser.add_argument(
        "--longest", type=int, default=0, metavar="N", help="show the N longest only"
    )
    args = parser.parse_args()
    named = args.paths or [str(ROOT / name) for name in EVERYTHING if (ROOT / name).exists()]
    found = [each for path in files(named) for each in read(path)]
    if args.longest:
        found = sorted(found, key=lambda each: -each.words)[: args.longest]
    for each in found:
        where = each.path.relative_to(ROOT) if each.path.is_relative_to(ROOT) else each.path
        print(f"{where}:{each.line}: {each.words} words: {each.text}")
    print(f"{len(found)} sentences of more than {LIMIT} words", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
