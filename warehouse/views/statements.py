"""The statements that create the views of a warehouse, and how they are run.

`moewh.warehouse.views.opening` creates the views in memory for moewh's own use; `moewh.warehouse.views.publishing`
writes the same statements, with comments and a guard against newer rows, to the file that a DuckDB shell opens. The
views are bound to zero-row files when they are created, so opening takes the same time for any number of segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import glob_literal
from moewh.warehouse.remote.published import Readable
from moewh.warehouse.views.base import base_views, columns_in_order
from moewh.warehouse.views.shipped import View, derived_views
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    import duckdb


def create_views(
    connection: duckdb.DuckDBPyConnection,
    warehouse: Readable,
    *,
    comments: bool,
    guarded: bool = False,
    derived: bool = True,
) -> None:
    """Create every view in the connection's current schema, in one transaction.

    `derived` is False if the schema has what `derived_statements` create.
    """
    if isinstance(warehouse, Layout):
        warehouse.linked_folders()
        zero_rows = zero_rows_of(warehouse)
    else:
        zero_rows = warehouse.connect(connection)
    statements = list(base_statements(warehouse, comments=comments, guarded=guarded))
    if derived:
        statements[:0] = derived_statements(comments=comments)
    connection.execute(";\n".join(["begin", *bound_to(zero_rows, statements), "commit"]))


def zero_rows_of(layout: Layout) -> str | None:
    """Return the folder with only the zero-row files of a warehouse on this machine; None if it is missing."""
    return glob_literal(layout.empty) if layout.empty.is_dir() else None


def bound_to(zero_rows: str | None, statements: Iterable[str]) -> Iterator[str]:
    """Yield statements that make views, and those that let DuckDB find the files of each in `zero_rows` meanwhile.

    DuckDB looks at the files of each view it makes: of a whole warehouse, it would list all segments once per view.
    """
    if zero_rows is not None:
        yield f"set variable moewh_root = {sql_string(zero_rows)}"
    yield from statements
    yield "reset variable moewh_root"


def view_statements(
    warehouse: Readable, *, comments: bool, guarded: bool = False, root: str | None = None
) -> Iterator[str]:
    """Yield the statements that create every view, each after those it reads.

    `guarded` views also check whether the warehouse has become newer than they are, as moewh itself does on opening.
    `root` is SQL for the path of the warehouse; without it the views contain the path itself.

    DuckDB binds again everything that a view reads. So the canned views are created over views that only have the
    columns, which the views of the files then replace; this halves the time.
    """
    yield from derived_statements(comments=comments)
    yield from base_statements(warehouse, comments=comments, guarded=guarded, root=root)


def derived_statements(*, comments: bool) -> Iterator[str]:
    """Yield the statements that create the staging and canned views, over views that only have the columns."""
    yield from (_columns_only(table) for table in schema.TABLES)
    yield from _statements(derived_views(), comments=comments)


def base_statements(
    warehouse: Readable, *, comments: bool, guarded: bool = False, root: str | None = None
) -> Iterator[str]:
    """Yield the statements that create or replace the views over the stored tables, as `view_statements` does."""
    yield from _statements(base_views(warehouse, guarded=guarded, root=root), comments=comments)


def _statements(views: Iterable[View], *, comments: bool) -> Iterator[str]:
    for view in views:
        yield view.create
        if comments:
            yield from view.comments


def _columns_only(table: schema.Table) -> str:
    """Return the statement that creates a stored table's view without rows and without opening any file."""
    columns = ", ".join(f"null::{column.type} as {column.name}" for column in columns_in_order(table))
    return f"create or replace view {table.name} as select {columns} where false"
