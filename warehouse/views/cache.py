"""The cache of bound views: files in the user's cache folder, to be copied instead of bound again.

DuckDB takes more than a tenth of a second to bind all views, and another to add their comments, but a few milliseconds
to copy them. So they are bound once, for any warehouse, and kept in `$XDG_CACHE_HOME/moewh`, or `~/.cache/moewh`. They
read the warehouse at `moewh_root()`, a macro that every copy defines. A file is named after a digest of its statements
and DuckDB's version, so it is never out of date. Without a usable cache, views are bound each time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import glob_literal
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    import duckdb

ROOT = "moewh_root()"
"""SQL for the path of a warehouse in cached views."""
STORAGE_VERSION = "v1.0.0"
"""The oldest storage format that supports comments; any DuckDB since 1.1 reads these views."""


def cached_views(statements: list[str]) -> Path | None:
    """Return a file of the views that statements create, from the cache or added to it; None without a usable cache."""
    import duckdb

    try:
        file = _cache() / f"views-{_digest(statements)}.duckdb"
        if not file.is_file():
            _add(file, statements)
    except (OSError, RuntimeError, duckdb.Error, MoewhError):  # no home, no room, no right to write there
        return None
    return file


def forget(file: Path) -> None:
    """Remove a damaged file from the cache; the next use adds it again."""
    with suppress(OSError):  # a cache that can only be read
        file.unlink()


def copy_views(connection: duckdb.DuckDBPyConnection, statements: list[str], database: str = "memory") -> bool:
    """Copy the views that statements create into a connection's database; return whether the cache has them."""
    import duckdb

    if (file := cached_views(statements)) is None:
        return False
    try:
        connection.execute(f"attach {sql_string(str(file))} as moewh_views (read_only)")
        connection.execute(f"copy from database moewh_views to {database}; detach moewh_views")
    except duckdb.Error:
        connection.execute("detach database if exists moewh_views")
        forget(file)
        return False
    return True


def read_at(root: Path) -> str:
    """Return the statement that lets copied views read the warehouse at a path."""
    return f"create or replace macro {ROOT} as {sql_string(glob_literal(root))}"


@contextmanager
def written_to(file: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection whose current schema is that of a database file, which is created if it is missing."""
    import duckdb

    with duckdb.connect() as connection:
        connection.execute(f"attach {sql_string(str(file))} as built (storage_version '{STORAGE_VERSION}')")
        connection.execute("use built")
        yield connection
        connection.execute("use memory")
        connection.execute("detach built")


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
        built = Path(scratch) / file.name
        with written_to(built) as connection:
            if any(ROOT in statement for statement in statements):
                empty = Layout(Path(scratch) / "wh")
                empty.create()
                connection.execute(read_at(empty.empty))
            connection.execute(";\n".join(["begin", *statements, "commit"]))
        built.replace(file)
