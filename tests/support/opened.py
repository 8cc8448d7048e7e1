"""Shared connections: creating the views of a warehouse takes longer than most queries.

`viewed` is for tests that read what was written; tests of the views themselves open the warehouse as users do.
"""

from __future__ import annotations

import atexit
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Engine
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import glob_literal
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    import duckdb


@lru_cache(maxsize=4)
def opened(root: Path) -> duckdb.DuckDBPyConnection:
    """Return a cached connection with the views over a warehouse; they read its current files."""
    return open_warehouse(Layout(root))


@cache
def _views() -> duckdb.DuckDBPyConnection:
    """Return a connection with every view, created once, over a warehouse that no longer exists."""
    atexit.register(_views.cache_clear)  # DuckDB reports objects that are not freed at exit
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder) / "wh")
        layout.create()
        return open_warehouse(layout)


def viewed(layout: Layout) -> duckdb.DuckDBPyConnection:
    """Return the views over a warehouse, read as in a moved one: through the variable `moewh_root`."""
    cursor = _views().cursor()
    cursor.execute(f"set variable moewh_root = {sql_string(glob_literal(layout.require().root))}")
    return cursor


def engine_of(layout: Layout) -> Engine:
    """Return an engine that answers queries as the command does, from values as typed."""
    connection = opened(layout.root)
    return Engine(lambda query, values: queries.prepare(connection, query, values))
