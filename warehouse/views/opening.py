"""Every view of a warehouse in memory, as moewh's own commands read it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.cache import ROOT, copy_views, read_at
from moewh.warehouse.views.statements import create_views, derived_statements, view_statements

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.remote.published import Readable


def open_warehouse(warehouse: Readable) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB with every view of this warehouse.

    DuckDB spills to the warehouse's `.staging/`, or to the system's temporary folder for a published one.
    Raises MoewhError if there is no warehouse, if a link in it is broken, or if it is a copy that lacks segments.
    """
    import duckdb

    warehouse.require()
    if isinstance(warehouse, Layout):
        warehouse.require_whole()
    spill = warehouse.staging if isinstance(warehouse, Layout) else Path(gettempdir())
    connection = duckdb.connect(config={"temp_directory": str(spill / f"duckdb.{os.getpid()}")})
    try:
        if not isinstance(warehouse, Layout):
            derived = not copy_views(connection, list(derived_statements(comments=True)))
            create_views(connection, warehouse, comments=False, derived=derived)
        elif not _copy_views(connection, warehouse):
            create_views(connection, warehouse, comments=False)
    except BaseException:
        connection.close()
        raise
    return connection


def _copy_views(connection: duckdb.DuckDBPyConnection, layout: Layout) -> bool:
    """Copy the views of a warehouse from the user's cache; return whether that is usable."""
    layout.linked_folders()
    if not copy_views(connection, list(view_statements(layout, comments=False, root=ROOT))):
        return False
    connection.execute(read_at(layout.root))
    return True
