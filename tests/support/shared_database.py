"""One DuckDB for all readers of prompts: an ingest starts two, which takes a tenth of a small ingest."""

from __future__ import annotations

import atexit
from functools import cache

import duckdb
import pytest

from moewh.ingest.prompts import canonical, json_records, tables

_READERS = (json_records, tables)


def share_one_database(patch: pytest.MonkeyPatch) -> None:
    """Give each reader of prompts a session of one shared database instead of its own database."""
    for module in _READERS:
        assert module.database is canonical.database, "already patched"
        patch.setattr(module, "database", _session)


@cache
def _database() -> duckdb.DuckDBPyConnection:
    atexit.register(_database.cache_clear)  # DuckDB reports objects that are not freed at exit
    return canonical.database()


def _session() -> duckdb.DuckDBPyConnection:
    try:
        return _session_of(_database())
    except duckdb.Error:  # some errors make a database unusable
        _database.cache_clear()
        return _session_of(_database())


def _session_of(database: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    session = database.cursor()
    session.execute("set TimeZone = 'UTC'")
    return session
