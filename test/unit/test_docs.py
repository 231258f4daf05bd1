"""What the documentation says of the code, where a machine can tell."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


doc_tables = script("doc_tables")


@pytest.mark.parametrize("name", doc_tables.TABLES)
def test_a_table_in_the_docs_is_the_one_in_the_code(name: str) -> None:
    file, table = doc_tables.TABLES[name]
    page = (ROOT / "docs" / file).read_text("utf-8")
    assert page == doc_tables.renewed(page, name, table()), "run scripts/doc_tables.py"


def test_a_page_without_the_marks_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="features"):
        doc_tables.renewed("# A page\n", "features", "| new |")
