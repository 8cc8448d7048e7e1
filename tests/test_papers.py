"""docs/papers.md agrees with the queries: each row names an existing query, and one of its columns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moewh.warehouse.answer.catalog import answer_columns, describe_views
from moewh.warehouse.answer.query import find_query, saved_names
from moewh.warehouse.views.shipped import canned_names

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "papers.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| paper")]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: cells(row)[2])
def test_row_names_a_query_and_its_columns(row: str) -> None:
    _, _, queries, chance = cells(row)
    named = re.findall(r"`(\w+)`(?:\.(\w+))?", queries)
    assert named, row
    assert chance
    known: set[str] = set()
    for name, column in named:
        assert name in {*canned_names(), *saved_names()}, name
        columns = [
            c.name
            for c in (describe_views()[name].columns if name in canned_names() else answer_columns(find_query(name)))
        ]
        assert not column or column in columns, (name, column)
        known.update(columns)
    assert {*re.findall(r"`(\w+)`", chance)} <= known, row


def test_every_query_that_cites_a_paper_is_on_the_page() -> None:
    """Each arXiv number in the header of a view or saved query is on the page, next to that query."""
    headers = {name: describe_views()[name].header for name in canned_names()}
    headers |= {name: find_query(name).header for name in saved_names()}
    cited = {name: re.findall(r"arXiv:(\d{4}\.\d{5})", header) for name, header in headers.items()}
    assert sum(map(bool, cited.values())) > 10
    for name, papers in cited.items():
        assert not papers or f"`{name}`" in PAGE, name
        assert all(paper in PAGE for paper in papers), (name, papers)
