"""`warehouse.duckdb`: the file that a plain DuckDB shell opens.

It holds views and comments, and the path of the warehouse as a macro that they read, but no rows.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.files.commit import sync
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.cache import ROOT, cached_views, copy_views, forget, read_at, written_to
from moewh.warehouse.views.statements import create_views, derived_statements, view_statements

if TYPE_CHECKING:
    from moewh.warehouse.remote.published import Readable


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
    if isinstance(warehouse, Layout) and _copied(warehouse, file):
        return
    with written_to(file) as connection:
        derived = not copy_views(connection, list(derived_statements(comments=True)), "built")
        create_views(connection, warehouse, comments=True, guarded=True, derived=derived)


def _copied(layout: Layout, file: Path) -> bool:
    """Write the views of a warehouse from the user's cache; return whether that is usable."""
    import duckdb

    layout.linked_folders()
    if (kept := cached_views(list(view_statements(layout, comments=True, guarded=True, root=ROOT)))) is None:
        return False
    shutil.copyfile(kept, file)
    try:
        with written_to(file) as connection:
            connection.execute(read_at(layout.root))
    except duckdb.Error:  # a damaged file in the cache
        forget(kept)
        file.unlink()
        return False
    return True
