"""Every view of a warehouse in memory, as moewh's own commands read it.

DuckDB takes more than a tenth of a second to bind all views, and a tenth of that to copy bound ones. So they are bound
once, for any warehouse, and kept in the user's cache: `$XDG_CACHE_HOME/moewh`, or `~/.cache/moewh`. They read the
warehouse at `moewh_root()`, a macro that each connection defines. The file is named after a digest of its statements
and DuckDB's version, so it is never out of date. Without a usable cache, the views are bound again for each connection.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout, glob_literal
from moewh.warehouse.views.base import create_views, sql_string, view_statements
from moewh.warehouse.views.publishing import written_to

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.remote.published import Readable

_ROOT = "moewh_root()"


def open_warehouse(warehouse: Readable) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB with every view of this warehouse.

    DuckDB spills to the warehouse's `.staging/`, or to the system's temporary folder for a published one.
    Raises MoewhError if there is no warehouse, or if a link in it is broken.
    """
    import duckdb

    warehouse.require()
    spill = warehouse.staging if isinstance(warehouse, Layout) else Path(gettempdir())
    connection = duckdb.connect(config={"temp_directory": str(spill / f"duckdb.{os.getpid()}")})
    try:
        if not (isinstance(warehouse, Layout) and _copy_views(connection, warehouse)):
            create_views(connection, warehouse, comments=False)
    except BaseException:
        connection.close()
        raise
    return connection


def _copy_views(connection: duckdb.DuckDBPyConnection, layout: Layout) -> bool:
    """Copy the views of a warehouse from the user's cache, after adding them there if they are missing.

    Return whether this worked: the cache may be unusable.
    """
    import duckdb

    layout.linked_folders()
    statements = list(view_statements(layout, comments=False, root=_ROOT))
    try:
        file = _cache() / f"views-{_digest(statements)}.duckdb"
        if not file.is_file():
            _add(file, statements)
    except (OSError, RuntimeError, duckdb.Error, MoewhError):  # no home, no room, no right to write there
        return False
    try:
        connection.execute(f"attach {sql_string(str(file))} as moewh_views (read_only)")
        connection.execute("copy from database moewh_views to memory; detach moewh_views")
    except duckdb.Error:  # a damaged file: the next opening replaces it
        connection.execute("detach database if exists moewh_views")
        with suppress(OSError):  # a cache that can only be read
            file.unlink()
        return False
    connection.execute(f"create or replace macro {_ROOT} as {sql_string(glob_literal(layout.root))}")
    return True


def _cache() -> Path:
    """Return the user's cache folder, created if necessary.

    Raises RuntimeError for a user without a home, and OSError for a folder that cannot be created or that belongs to
    another user: its views would run as ours.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored if relative, as the XDG standard asks
    folder = (base if base.is_absolute() else Path.home() / ".cache") / "moewh"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _digest(statements: list[str]) -> str:
    import duckdb

    return hashlib.sha256("\0".join([duckdb.__version__, *statements]).encode()).hexdigest()[:32]


def _add(file: Path, statements: list[str]) -> None:
    """Write a file of bound views and put it in place at once."""
    with TemporaryDirectory(prefix=".", dir=file.parent) as scratch:
        empty = Layout(Path(scratch) / "wh")
        empty.create()
        built = Path(scratch) / file.name
        with written_to(built) as connection:
            connection.execute(f"create macro {_ROOT} as {sql_string(glob_literal(empty.empty))}")
            connection.execute(";\n".join(["begin", *statements, "commit"]))
        built.replace(file)
