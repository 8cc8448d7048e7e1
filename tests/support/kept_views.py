"""The views of a warehouse that is opened often: DuckDB binds each anew, which takes longer than most answers.

Whoever opens a warehouse for the third time with the same statements over the same zero-row files gets a copy of the
views that the second time made. `create_views` itself has run on them twice by then.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moewh.warehouse.files.layout import SCHEMA_RUN, Layout
from moewh.warehouse.views import base

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.remote.published import Readable

_CREATE = base.create_views
_Made = tuple[object, ...]
_seen: set[_Made] = set()
_kept: dict[_Made, Path] = {}


def copy_what_was_made(patch: pytest.MonkeyPatch) -> None:
    """Have `open_warehouse` copy views that were made before."""
    patch.setattr(base, "create_views", _create_views)


def fresh_copy(source: Layout) -> Layout:
    """Copy a warehouse, each time to the same path, whose views are made twice and kept from then on."""
    folder = source.root.parent / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source.root, folder / source.root.name, symlinks=True)
    return Layout(folder / source.root.name)


def _create_views(
    connection: duckdb.DuckDBPyConnection, warehouse: Readable, *, comments: bool, guarded: bool = False
) -> None:
    if not isinstance(warehouse, Layout):
        _CREATE(connection, warehouse, comments=comments, guarded=guarded)
        return
    warehouse.linked_folders()  # raises for a link that leads nowhere, as the real one does
    statements = base.view_statements(warehouse, base.zero_rows_of(warehouse), comments=comments, guarded=guarded)
    made: _Made = (*statements, *_zero_row_files(warehouse))
    if made in _kept:
        connection.execute(_copy("kept", "memory", _kept[made], "(read_only)"))
        return
    _CREATE(connection, warehouse, comments=comments, guarded=guarded)
    if made in _seen:
        _kept[made] = Path(_scratch().name) / f"{len(_kept)}.duckdb"
        connection.execute(_copy("memory", "kept", _kept[made]))
    _seen.add(made)


def _copy(source: str, target: str, file: Path, options: str = "") -> str:
    attach = f"attach {base.sql_string(str(file))} as kept {options}"
    return f"{attach}; copy from database {source} to {target}; detach kept"


def _zero_row_files(layout: Layout) -> list[tuple[str, int, int]]:
    """What the views are bound to as they are made, with all that shows a change."""
    folders = (layout.empty, *layout.root.glob(f"*/run_id={SCHEMA_RUN}"))
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return [(str(file), (found := file.stat()).st_mtime_ns, found.st_size) for file in files]


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
