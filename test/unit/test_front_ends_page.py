"""The conformance table of docs/front_ends.md: complete, and in the words the test writes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from helpers.front_ends import (
    ALL,
    DYNAMO,
    FRONT_ENDS,
    MARKS,
    NOTHING,
    PAGE,
    PATHS,
    WAYS,
    FrontEnd,
    Table,
    cell,
    renew,
    table_of,
)
from sglang_kairos.slo.request import SLO_HEADERS

ENDPOINTS = tuple(PATHS.values())
LEGAL = {ALL, NOTHING} | {
    ", ".join(some) for count in (1, 2) for some in combinations(ENDPOINTS, count)
}


def test_every_way_has_a_row_every_front_end_a_column_and_no_cell_is_empty() -> None:
    table = Table.read(table_of(PAGE.read_text("utf-8")))
    assert list(table.cells) == [front_end.title for front_end in FRONT_ENDS]
    for title, column in table.cells.items():
        assert list(column) == [way.name for way in WAYS]
        assert set(column.values()) <= LEGAL, title


def test_every_header_that_counts_has_a_row() -> None:
    named = " ".join(way.name for way in WAYS)
    assert [header for header in sorted(SLO_HEADERS) if f"`{header}`" not in named] == []


@pytest.mark.parametrize(
    ("paths", "arrives", "expected"),
    [
        (tuple(PATHS), (True, True, True), "yes"),
        (tuple(PATHS), (True, False, True), "generate, chat"),
        (tuple(PATHS), (False, False, False), "no"),
        (tuple(PATHS)[1:], (False, True, True), "yes"),
        (tuple(PATHS)[1:], (False, False, True), "chat"),
    ],
)
def test_a_cell_names_the_endpoints_where_it_is_not_all_or_none(
    paths: tuple[str, ...], arrives: tuple[bool, ...], expected: str
) -> None:
    assert cell(FrontEnd("x", paths), dict(zip(PATHS, arrives, strict=True))) == expected


def test_a_measured_column_replaces_its_own_cells_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    old = Table({DYNAMO.title: {way.name: "yes" for way in WAYS}})
    page.write_text(f"before\n{MARKS[0]}{old.write()}\n{MARKS[1]}\nafter\n")
    renew(page, FRONT_ENDS[0].title, {way.name: "no" for way in WAYS})
    text = page.read_text()
    cells = Table.read(table_of(text)).cells
    assert set(cells[DYNAMO.title].values()) == {"yes"}
    assert set(cells[FRONT_ENDS[0].title].values()) == {"no"}
    assert text.startswith("before\n") and text.endswith(f"{MARKS[1]}\nafter\n")


@pytest.mark.parametrize("page", ["", MARKS[0], MARKS[1], MARKS[1] + MARKS[0], 2 * "".join(MARKS)])
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="marks"):
        table_of(page)
