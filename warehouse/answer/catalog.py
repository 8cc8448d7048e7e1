"""The catalog: which views and saved queries exist, and what they and their columns mean.

Everything comes from the schema and the `.sql` files, so no warehouse is needed: the canned views are
created over empty tables in memory, and DuckDB reports their types and comments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from moewh.warehouse.answer.query import Query, find_query, saved_names, single_statement, unknown
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.views.cache import copy_views
from moewh.warehouse.views.shipped import canned_views
from moewh.warehouse.views.statements import derived_statements

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class ViewColumn:
    """A column of a view: its DuckDB type and its comment."""

    name: str
    type: str
    comment: str


@dataclass(frozen=True)
class ViewDescription:
    """A view: its one-line comment, the header of its file, and its columns in order."""

    name: str
    comment: str
    header: str
    columns: tuple[ViewColumn, ...]


@cache
def describe_views() -> dict[str, ViewDescription]:
    """Return every view by name: the stored tables first, then the canned views.

    A missing comment is an empty string.
    """
    described = {table.name: describe_table(table) for table in schema.TABLES}
    return described | _describe_canned()


def list_views() -> str:
    """Return a list of the views, one line each."""
    return _columns((view.name, view.comment) for view in describe_views().values())


def list_queries() -> str:
    """Return a list of what `moewh query` accepts by name, one line each: canned views and saved queries."""
    described = describe_views()
    views = [(view.name, described[view.name].comment) for view in canned_views()]
    return _columns([*views, *((name, _first_line(name)) for name in saved_names())])


def describe_query(query: Query) -> str:
    """Return a query's header and the columns of its answer, with types and, for views, comments.

    Raises duckdb.Error for SQL that cannot be bound to the views.
    """
    if query.source in describe_views():
        return describe_view(query.source)
    columns = answer_columns(query)
    width = max(len(column.name) for column in columns)
    lines = [f"{column.name:{width}}  {column.type}" for column in columns]
    return "\n".join([query.header, "", *lines] if query.header else lines)


def answer_columns(query: Query) -> tuple[ViewColumn, ...]:
    """Return the columns of a query's answer over an empty warehouse, without comments.

    The SQL is not trusted: it is checked as in the jail and cannot reach a file. Raises UsageError as the jail does.
    """
    from moewh.warehouse.answer.jail import jailed_statement
    from moewh.warehouse.answer.pivot import make_type, name_pivots

    with empty_warehouse() as connection:
        pivots = name_pivots(connection, query.source, query.sql)
        bound = single_statement(connection, replace(query, sql=pivots.sql)).named_parameters
        statement = jailed_statement(connection, query.source, pivots.sql)
        for name in pivots.types:  # their columns come from the rows, and there are none here
            make_type(connection, name, [])
        described = connection.execute(f"describe {statement}", dict.fromkeys(bound)).fetchall()
    return tuple(ViewColumn(name, type_, "") for name, type_, *_ in described)


def describe_view(name: str) -> str:
    """Return a view's header and its columns with type and meaning. Raises UsageError if there is no such view."""
    described = describe_views()
    if name not in described:
        raise UsageError(unknown("view", name, list(described)))
    view = described[name]
    width = max(len(column.name) for column in view.columns)
    lines = [f"{column.name:{width}}  {column.type:9}  {column.comment}" for column in view.columns]
    return "\n".join([view.header, "", *lines])


def describe_table(table: schema.Table) -> ViewDescription:
    """Return the description of a stored table, from the schema."""
    described = tuple(ViewColumn(column.name, column.type, column.description) for column in table.viewed)
    return ViewDescription(table.name, table.description, f"{table.name}: {table.description}", described)


def empty_warehouse() -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB with every table, without rows, and the staging and canned views over them.

    It is locked: SQL that is not trusted can reach no file through it.
    """
    import duckdb

    connection = duckdb.connect()
    statements = list(derived_statements(comments=True))
    if not copy_views(connection, statements):
        connection.execute(";\n".join(statements))
    connection.execute("set enable_external_access = false; set lock_configuration = true")
    return connection


def _describe_canned() -> dict[str, ViewDescription]:
    with empty_warehouse() as connection:
        comments = dict(
            connection.execute(
                "select view_name, coalesce(comment, '') from duckdb_views() where not internal"
            ).fetchall()
        )
        columns = connection.execute(
            "select table_name, column_name, data_type, coalesce(comment, '') from duckdb_columns() "
            "where not internal order by table_name, column_index"
        ).fetchall()
    return {
        view.name: ViewDescription(
            view.name,
            comments[view.name],
            view.header,
            tuple(ViewColumn(*column) for name, *column in columns if name == view.name),
        )
        for view in canned_views()
    }


def _first_line(name: str) -> str:
    """Return the first line of a saved query's header, without its name."""
    return find_query(name).header.partition("\n")[0].removeprefix(f"{name}:").strip()


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return "\n".join(f"{name:{width}}  {line}" for name, line in listed)
