"""One DuckDB for all that reads prompts: an ingest starts two, which takes a tenth of a small one."""

from __future__ import annotations

import atexit
from functools import cache

import duckdb
import pytest

from moewh.ingest.prompts import canonical, json_records, tables

_READERS = (json_records, tables)


def share_one_database(patch: pytest.MonkeyPatch) -> None:
    """Give each reader of prompts a session of its own in one database, in place of a database of its own."""
    for module in _READERS:
        assert module.database is canonical.database, "another test's"
        patch.setattr(module, "database", _session)


@cache
def _database() -> duckdb.DuckDBPyConnection:
    atexit.register(_database.cache_clear)  # DuckDB reports what is not freed in the end
    return canonical.database()


def _session() -> duckdb.DuckDBPyConnection:
    try:
        return _session_of(_database())
    except duckdb.Error:  # some errors leave a database of no use
        _database.cache_clear()
        return _session_of(_database())


def _session_of(database: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    session = database.cursor()
    session.execute("set TimeZone = 'UTC'")
    return session
