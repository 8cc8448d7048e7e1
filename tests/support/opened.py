"""One connection for many questions about a warehouse: making its views takes longer than most answers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Engine
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.base import open_warehouse

if TYPE_CHECKING:
    import duckdb


@lru_cache(maxsize=4)
def opened(root: Path) -> duckdb.DuckDBPyConnection:
    """Return the views over a warehouse, made when it was first asked for; they read the files as they are now."""
    return open_warehouse(Layout(root))


def engine_of(layout: Layout) -> Engine:
    """Return what answers queries as the command does, with values as they were typed."""
    connection = opened(layout.root)
    return Engine(lambda query, values: queries.prepare(connection, query, values))
