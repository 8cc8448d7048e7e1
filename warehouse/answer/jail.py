"""The jail for untrusted SQL: it may read the warehouse and nothing else, and change nothing.

There are three layers. DuckDB may access only the warehouse's directory, and its settings are locked. A statement runs
as `select * from (<statement>)`, where COPY, DDL and data-modifying CTEs are syntax errors. Table functions must be
known to only read: the lock does not stop DuckDB 1.5's `enable_logging`, which writes files, or `query`, which runs SQL
hidden in a string.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.stopping import stop_requested
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.remote.published import Readable

_READ_ONLY = frozenset(
    """
    duckdb_columns duckdb_constraints duckdb_databases duckdb_dependencies duckdb_functions duckdb_indexes
    duckdb_keywords duckdb_memory duckdb_optimizers duckdb_schemas duckdb_sequences duckdb_settings duckdb_tables
    duckdb_temporary_files duckdb_types duckdb_variables duckdb_views generate_series glob histogram histogram_values
    icu_calendar_names json_each json_tree parquet_bloom_probe parquet_file_metadata parquet_full_metadata
    parquet_kv_metadata parquet_metadata parquet_scan parquet_schema pg_timezone_names pragma_collations
    pragma_database_size pragma_platform pragma_show pragma_table_info pragma_version range read_blob read_csv
    read_csv_auto read_json read_json_auto read_json_objects read_json_objects_auto read_ndjson read_ndjson_auto
    read_ndjson_objects read_parquet read_text repeat repeat_row show show_databases show_tables show_tables_expanded
    summary table_info test_all_types test_vector_types unnest version
    """.split()  # noqa: SIM905 - sixty quoted names hide what is in the list
)
"""The table functions of DuckDB 1.5 and 2.0 that only read, and only what `allowed_directories` permits."""


@dataclass(frozen=True)
class Limits:
    """A query's limits on time and memory, and whether it runs outside the jail."""

    unsafe: bool = False
    """True allows any statement and any file, as in the user's own DuckDB."""
    timeout: float | None = None
    """Seconds."""
    memory: str | None = None
    """Size in DuckDB's notation, such as 4GB."""


@contextmanager
def open_jailed(warehouse: Readable, limits: Limits, output: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield an in-memory connection to the warehouse, locked to its files and the one file `output`.

    DuckDB spills to a directory of this query's own, which is removed at the end. Raises UsageError for an invalid
    memory limit, and MoewhError when the time is up.
    """
    warehouse.require()
    with _scratch(warehouse) as scratch, open_warehouse(warehouse) as connection:
        connection.execute(f"set temp_directory = {sql_string(str(scratch))}; set enable_progress_bar = false")
        _limit_memory(connection, limits)
        if not limits.unsafe:
            _lock(connection, [*warehouse.folders(), str(scratch)], output)
        with _interruptible(connection, limits):
            yield connection


def _lock(connection: duckdb.DuckDBPyConnection, folders: list[str], output: Path | None) -> None:
    """Restrict the connection to the allowed files and lock its settings."""
    roots = ", ".join(map(sql_string, folders))
    files = sql_string(str(output)) if output is not None else ""
    connection.execute(
        f"""
        set allowed_directories = [{roots}];
        set allowed_paths = [{files}];
        set python_enable_replacements = false;
        set autoinstall_known_extensions = false;
        set autoload_known_extensions = false;
        set allow_community_extensions = false;
        set enable_external_access = false;
        set lock_configuration = true;
        """
    )


def jailed_statement(connection: duckdb.DuckDBPyConnection, source: str, sql: str) -> str:
    """Return the one statement of `sql` as a subquery, where only a query is valid syntax.

    The returned SQL is exactly what was checked. Raises UsageError, naming `source`, for a statement that is not a
    query and for a table function that is not known to only read.
    """
    import duckdb

    inside = as_subquery(sql)
    tree = json.loads(connection.execute("select json_serialize_sql($sql)", {"sql": inside}).fetchall()[0][0])
    kinds = {statement.type for statement in connection.extract_statements(sql)}  # "(begin)" would be a table
    if tree["error"] or len(tree["statements"]) != 1 or kinds != {duckdb.StatementType.SELECT}:
        raise UsageError(
            f"{source} is not a query that moewh can check. Use one SELECT (or FROM, WITH, VALUES, DESCRIBE, SHOW, "
            "SUMMARIZE, PIVOT), or --unsafe to run any statement."
        )
    if unknown := sorted(_table_functions(tree) - _READ_ONLY):
        raise UsageError(
            f"{source} calls {unknown[0]}(), which may do more than read the warehouse. Use --unsafe to run it."
        )
    if unclear := next(_unclear_files(tree), None):
        raise UsageError(
            f"{source} passes {unclear} a file name that moewh cannot check. Write the name as a plain string without "
            "'..', or use --unsafe."
        )
    return inside


def as_subquery(sql: str) -> str:
    """Return the one statement of `sql` as a subquery, without looking into it."""
    return f"select * from ({without_semicolon(sql)}\n)"


def _unclear_files(node: Any) -> Iterator[str]:
    """Yield the functions and tables that read a file whose name is computed or contains `..`.

    If a folder is a symbolic link, DuckDB 2.0 resolves `link/../file` beside the link when it checks access, but the
    system resolves it beside the link's target when it opens the file.
    """
    if isinstance(node, list):
        for child in node:
            yield from _unclear_files(child)
    elif isinstance(node, dict):
        if node.get("type") == "TABLE_FUNCTION":
            name = str(node["function"]["function_name"]).lower()
            if name == "glob" or name.startswith(("read_", "parquet_")):
                given = [argument for argument in _arguments(node["function"]) if argument["class"] != "COMPARISON"]
                if not all(_is_literal(argument) for argument in given) or _has_parent_reference(given):
                    yield f"{name}()"
        elif node.get("type") == "BASE_TABLE" and _has_parent_reference(_full_names(node)):
            yield "FROM"
        yield from _unclear_files(list(node.values()))


def _full_names(table: dict[str, Any]) -> list[str]:
    """Return the file names that DuckDB may read for a table name: it joins the parts, as in `"link/."."/file.csv"`."""
    parts = [table["catalog_name"], table["schema_name"], table["table_name"]]
    return [".".join(filter(None, parts)), ".".join(table.get("qualified_name", {}).get("path", []))]


def _arguments(function: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a function's argument expressions, as DuckDB 1.5 and 2.0 serialise them."""
    if "arguments" in function:
        return [argument["expression"] for argument in function["arguments"]]
    children: list[dict[str, Any]] = function["children"]
    return children


def _is_literal(expression: dict[str, Any]) -> bool:
    """Return whether an expression is a constant or a list of constants; a cast is not, as it can change the value."""
    if expression["class"] == "FUNCTION" and expression["function_name"] == "list_value":
        return all(_is_literal(child) for child in _arguments(expression))
    return bool(expression["class"] == "CONSTANT")


def _has_parent_reference(node: Any) -> bool:
    """Return whether any string in this part of the tree is a path that contains `..`."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return any(_has_parent_reference(child) for child in node)
    return isinstance(node, str) and re.search(r"(^|[/\\:])\.\.($|[/\\])", node) is not None


def without_semicolon(sql: str) -> str:
    """Return a single statement without its final semicolon; semicolons in strings and comments are kept."""
    import duckdb

    text = sql.encode()
    ends = (
        offset
        for offset, kind in duckdb.tokenize(sql)
        if kind == duckdb.token_type.operator and text[offset : offset + 1] == b";"
    )
    return text[: next(ends, None)].decode()


def _table_functions(node: Any) -> set[str]:
    """Return the names of all table functions in a serialised statement, in lower case."""
    found: set[str] = set()
    if isinstance(node, dict):
        if node.get("type") == "TABLE_FUNCTION":
            found.add(str(node["function"]["function_name"]).lower())
        node = list(node.values())
    if isinstance(node, list):
        found = found.union(*(_table_functions(child) for child in node))
    return found


def _limit_memory(connection: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    import duckdb

    if limits.memory is None:
        return
    try:
        if limits.memory.strip().startswith("-"):  # which DuckDB takes for no limit
            raise duckdb.ParserException(limits.memory)
        connection.execute(f"set memory_limit = {sql_string(limits.memory)}")
    except duckdb.Error as error:
        raise UsageError(f"--memory-limit {limits.memory} is not a size. Write it like 512MB or 4GB.") from error


@contextmanager
def _interruptible(connection: duckdb.DuckDBPyConnection, limits: Limits) -> Iterator[None]:
    """Interrupt the query when its time is up or a signal arrives, and report which.

    While DuckDB waits for its own threads it checks no signals, and Python's handlers wait for DuckDB. Only Python's C
    handler runs; it writes a byte to the wake-up descriptor, and a thread waits for that byte.
    """
    wake_reader, wake_writer = os.pipe()
    os.set_blocking(wake_writer, False)
    done, late = threading.Event(), threading.Event()

    def watch() -> None:
        began = time.monotonic()
        # A signal may have arrived earlier, when no exception could be raised for it.
        while not select.select([wake_reader], [], [], 0.2)[0] and not stop_requested():
            if limits.timeout is not None and time.monotonic() - began > limits.timeout:
                late.set()
                break
        while not done.wait(0.05):  # repeatedly, because an interrupt between two statements is lost
            connection.interrupt()

    main = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False) if main else -1
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        if late.is_set():
            raise MoewhError(f"the query took longer than --timeout {limits.timeout:g} seconds.") from error
        raise
    finally:
        done.set()
        os.write(wake_writer, b"\0")
        watcher.join()
        if main:
            signal.set_wakeup_fd(before)
        os.close(wake_reader)
        os.close(wake_writer)


@contextmanager
def _scratch(warehouse: Readable) -> Iterator[Path]:
    """Yield a private folder for DuckDB's spill files, removed at the end.

    It is in the warehouse's `.staging/`, whose disk has room for data of the warehouse's size; for a read-only or
    published warehouse, it is in the system's folder for temporary files.
    """
    if isinstance(warehouse, Layout) and os.access(warehouse.staging, os.W_OK):
        with warehouse.staged("query") as folder:
            folder.chmod(0o700)
            yield folder
    else:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="moewh-query.") as name:
            yield Path(name)
