"""The Python API over a warehouse: open one, ask it, get DuckDB relations back."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.answer.engine import Engine
from moewh.warehouse.answer.query import Query, Value, find_query, prepare
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.runs import LIST_SQL
from moewh.warehouse.trust import verify
from moewh.warehouse.views.base import open_warehouse

if TYPE_CHECKING:
    import duckdb


class Warehouse:
    """A warehouse on disk, read through an in-memory DuckDB that has all its views."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the warehouse at `path`. Raises MoewhError if there is none."""
        self._layout = Layout(Path(path).absolute()).require()

    @property
    def path(self) -> Path:
        """The warehouse's directory."""
        return self._layout.root

    @cached_property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The DuckDB connection, with a view for every table and canned view."""
        return open_warehouse(self._layout)

    def sql(self, sql: str, **parameters: Value) -> duckdb.DuckDBPyRelation:
        """Return the answer to one SQL statement; `parameters` are bound as $name and readable with getvariable."""
        return self._ask(Query("sql", sql), parameters)

    def query(self, name: str, **parameters: Value) -> duckdb.DuckDBPyRelation:
        """Return the answer of a canned view or saved query.

        Raises UsageError for an unknown name or parameter, and MoewhError for a run or layer that does not exist.
        """
        return self._ask(find_query(name), parameters)

    def runs(self) -> duckdb.DuckDBPyRelation:
        """Return one row per run, oldest first."""
        return self.connection.sql(LIST_SQL)

    def verify(self) -> list[verify.Fault]:
        """Compare every file with its manifest and return the faults, none if all is as it was committed."""
        return verify.check(verify.plan(self._layout))

    def _ask(self, query: Query, parameters: dict[str, Value]) -> duckdb.DuckDBPyRelation:
        engine = Engine(lambda asked, values: prepare(self.connection, asked, values))
        answer = engine(query, parameters)
        assert answer is not None  # only an unsafe statement has none
        return answer.relation()


def open(path: str | os.PathLike[str] = "wh") -> Warehouse:
    """Open the warehouse at `path`. Raises MoewhError if there is none."""
    return Warehouse(path)
