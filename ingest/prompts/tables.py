"""Arrow tables to canonical batches, for every tabular format and every data set.

In: Arrow tables of one schema. Out: canonical batches. Columns of types that DuckDB lacks are converted to JSON first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import duckdb
import pyarrow as pa

from moewh.ingest.prompts.arrow_columns import as_json_text, as_text, holds, unwrapped, with_texts
from moewh.ingest.prompts.canonical import Bound, PromptFile, canonical, database, nested_null, run
from moewh.ingest.prompts.records import (
    TOKENIZER_COLUMNS,
    Convention,
    RecordColumns,
    conventions,
    json_text,
    misnamed,
    nested_path,
    present,
    prompts_sql,
)
from moewh.warehouse.errors import first_line


def read_tables(
    tables: Iterable[pa.Table], file: PromptFile, *, empty_is_null: bool = False
) -> Iterator[pa.RecordBatch]:
    """Convert Arrow tables of one schema to canonical batches; columns outside the prompt become JSON metadata.

    `empty_is_null`: an empty text is NULL, as in CSV.
    """
    tables = iter(tables)
    first = next(tables, None)
    if first is None:
        return
    read = _table_conventions(first.schema, file)
    yield from canonical(
        _converted_tables(chain([first], tables), read, file, empty_is_null=empty_is_null), read, file, "row"
    )


def _table_conventions(columns: pa.Schema, file: PromptFile) -> tuple[Convention, ...]:
    """Return the conventions for the possible prompt columns of a table. Raises MoewhError if it has none."""
    names = columns.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise file.error(f"has two columns of the same name, {twice!r}. Rename one.")
    listed = ", ".join(map(repr, names))
    if file.domain_column != "domain" and _root(file.domain_column, names) is None:
        raise file.error(f"has no column {file.domain_column!r}; it has {listed}. Check --domain-column.")
    known = conventions(file.text_column)
    if problem := misnamed(names, known, file.domain_column):
        raise file.error(f"{problem}.")
    there = [item for item in known if _root(item.head, names) is not None]
    kinds = {item.head: columns.field(item.head).type for item in there if item.head in names}
    read = [item for item in there if item.head not in kinds or holds(kinds[item.head], item.form)]
    texts = [item for item in there if item.form == "text"]
    if texts and texts[0] not in read and (len(there) == 1 or not pa.types.is_null(kinds[texts[0].head])):
        raise file.error(f"column {texts[0].head!r} holds {kinds[texts[0].head]}, not text.")
    if there and not read:
        raise file.error(f"column {there[0].head!r} holds {kinds[there[0].head]}, not a list of {there[0].form}.")
    if not read:
        raise file.error(f"has no column {known[0].head!r}; it has {listed}. Name it with --text-column.")
    return tuple(read)


def _root(name: str, names: list[str]) -> str | None:
    """Return the table's column for a name: the column itself, or the one that `a.b` is nested in; None without one."""
    if name in names:
        return name
    keys = nested_path(name)
    return keys[0] if keys and keys[0] in names else None


def _converted_tables(
    tables: Iterable[pa.Table], read: tuple[Convention, ...], file: PromptFile, *, empty_is_null: bool
) -> Iterator[pa.RecordBatch]:
    """Yield the tables that `prompts_sql` gives. Columns that DuckDB cannot read are converted to JSON first."""
    connection = database()
    try:
        for table in tables:
            given = _with_plain_columns(table, read, file)
            try:
                batches = _converted(connection, given, frozenset(), read, file, empty_is_null=empty_is_null)
            except duckdb.Error:
                connection.close()
                connection = database()  # some errors leave the old one unusable
                given, as_json = as_json_text(given)
                batches = _converted(connection, given, as_json, read, file, empty_is_null=empty_is_null)
            yield from batches
    except duckdb.Error as error:
        raise file.error(f"holds data that DuckDB cannot read: {first_line(error)}") from None
    finally:
        connection.close()


def _with_plain_columns(table: pa.Table, read: tuple[Convention, ...], file: PromptFile) -> pa.Table:
    """Return a table whose prompts and labels are strings, and whose others DuckDB reads correctly or not at all."""
    names = table.column_names
    texts = {name for item in read for name in item.columns}
    for index, name in enumerate(names):
        try:
            column = as_text(table.column(index)) if name in texts else table.column(index)
        except pa.ArrowInvalid:
            raise _no_utf8(name, file) from None
        table = table.set_column(index, name, unwrapped(column))
    labels = ("source",) if file.domain is not None else (file.domain_column, "source")
    for name in (*texts, *TOKENIZER_COLUMNS, *labels):
        root = _root(name, names)
        if root is None:
            continue
        keys = () if root == name else (nested_path(name) or [])[1:]
        try:
            table = table.set_column(names.index(root), root, with_texts(table.column(root), keys))
        except pa.ArrowInvalid:
            raise _no_utf8(name, file) from None
    return table


def _no_utf8(column: str, file: PromptFile) -> Exception:
    return file.error(f"column {column!r} holds bytes that are not UTF-8.")


class _TableColumns:
    """SQL expressions for the columns of one table, renamed by index: to DuckDB, `Text` and `text` are one name."""

    def __init__(
        self,
        table: pa.Table,
        as_json: frozenset[int],
        read: tuple[Convention, ...],
        file: PromptFile,
        bound: Bound,
        *,
        empty_is_null: bool,
    ) -> None:
        self._file, self._bound, self._empty_is_null = file, bound, empty_is_null
        self._schema, self._names = table.schema, table.column_names
        self._sql = {
            name: f"c{index}" + ("::json" if index in as_json else "") for index, name in enumerate(self._names)
        }
        texts = {name for item in read if item.form == "text" for name in item.columns if name in self._names}
        self._strings = {name for name in texts if pa.types.is_large_string(table.schema.field(name).type)}

    def has(self, name: str) -> bool:
        """Return whether the table has a column of this name, or one that it is nested in."""
        return _root(name, self._names) is not None

    def value(self, name: str) -> str:
        """Return the JSON of a column: see `RecordColumns`."""
        root = _root(name, self._names)
        if root is None:
            return "null::json"
        if root != name:
            path = "$." + ".".join(f'"{key}"' for key in (nested_path(name) or [])[1:])
            return f"json_extract(to_json({self._sql[root]}), {self._bound(path)})"
        if name in self._strings:  # only its presence matters here; `text` gives its value
            return f"case when {self.text(name)} is not null then '\"\"'::json else 'null'::json end"
        return f"coalesce(to_json({_filled(self._sql[name], self._empty_is_null)}), 'null'::json)"

    def text(self, name: str) -> str:
        """Return a column's text."""
        return _filled(self._sql[name], self._empty_is_null) if name in self._strings else json_text(self.value(name))

    def label(self, name: str) -> str:
        """Return a label's text; a label that is NaN is missing."""
        plain = name in self._sql and not self._sql[name].endswith("json")
        if plain and pa.types.is_floating(self._schema.field(name).type):
            return f"case when isfinite({self._sql[name]}) then {self._sql[name]}::varchar end"
        return _filled(f"{self._sql[name]}::varchar", self._empty_is_null) if plain else json_text(self.value(name))

    def metadata(self, convention: Convention) -> str:
        """Return the JSON of all columns except those that a convention uses."""
        used = (*convention.columns, self._file.domain_column, "source")
        rest = ", ".join(f"{self._bound(name)}, {self._sql[name]}" for name in self._names if name not in used)
        nested = [name for name in used if _root(name, self._names) not in (None, name)]
        patches = [
            f"case when {self.value(name)} is not null "
            f"then {self._bound(nested_null(nested_path(name) or []))} else '{{}}' end"
            for name in nested
        ]
        packed = f"json_object({rest})" if rest else "null"
        return f"json_merge_patch({', '.join([packed, *patches])})::varchar" if patches else f"{packed}::varchar"


def _converted(
    connection: duckdb.DuckDBPyConnection,
    table: pa.Table,
    as_json: frozenset[int],
    read: tuple[Convention, ...],
    file: PromptFile,
    *,
    empty_is_null: bool,
) -> list[pa.RecordBatch]:
    """Run `prompts_sql` on a table; the columns in `as_json`, by index, hold JSON text."""
    bound = Bound()
    names = table.column_names
    columns = _TableColumns(table, as_json, read, file, bound, empty_is_null=empty_is_null)
    followed, for_tokenizer = present(read, columns.has), list(filter(columns.has, TOKENIZER_COLUMNS))
    used = (name for item in followed.values() for name in (*item.columns, *item.left_out))
    needed = sorted({*used, *for_tokenizer})
    v = {name: f"v{index}" for index, name in enumerate(needed)}
    records = f"""
        select *, 'OBJECT' as record_kind, {columns.value(file.domain_column)} is not null as labelled,
               {columns.label(file.domain_column)} as domain, {columns.label("source")} as source,
               {", ".join(f"{columns.value(name)} as {v[name]}" for name in needed)}
        from given
    """
    keys = f"[{', '.join(map(bound, names))}]"
    query = prompts_sql(
        records, followed, RecordColumns(v.__getitem__, columns.text, columns.metadata, keys, for_tokenizer)
    )
    connection.register("given", table.rename_columns([f"c{index}" for index in range(len(names))]))
    return run(connection, query, bound.values)


def _filled(column: str, empty_is_null: bool) -> str:
    """Return SQL for a text column, with empty texts as NULL if `empty_is_null`."""
    return f"nullif({column}, '')" if empty_is_null else column
