"""`warehouse.duckdb`: the file that a plain DuckDB shell opens. It holds views and comments, but no rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.files.layout import sync
from moewh.warehouse.views.base import create_views, sql_string

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.files.layout import Layout
    from moewh.warehouse.remote.published import Readable

STORAGE_VERSION = "v1.0.0"
"""The oldest storage format that supports comments; any DuckDB since 1.1 reads these views."""


def publish(layout: Layout) -> None:
    """Rewrite `warehouse.duckdb` and replace it in one step, even while shells have it open.

    A killed shell leaves a write-ahead log that belongs to the old file, and DuckDB would replay it over the new one.
    So it is removed first. Raises MoewhError.
    """
    with layout.writing(), layout.staged("publish") as folder:
        built = folder / layout.database.name
        with tempfile.TemporaryDirectory(prefix="moewh-") as scratch:
            build(layout, Path(scratch) / "built.duckdb")
            shutil.copyfile(Path(scratch) / "built.duckdb", built)
        sync(built)
        layout.database.with_name(f"{layout.database.name}.wal").unlink(missing_ok=True)
        built.replace(layout.database)
        sync(layout.root)


def build(warehouse: Readable, file: Path) -> None:
    """Write the views to a new database file, whose path must not hold a `?`: DuckDB takes it for a URL's query."""
    with written_to(file) as connection:
        create_views(connection, warehouse, comments=True, guarded=True)


@contextmanager
def written_to(file: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection whose current schema is that of a new database file."""
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(f"attach {sql_string(str(file))} as built (storage_version '{STORAGE_VERSION}')")
        connection.execute("use built")
        yield connection
        connection.execute("use memory")
        connection.execute("detach built")
