"""JSON records to canonical batches, for every format of JSON.

In: SQL of a file's records. Out: canonical batches. Details that DuckDB's error does not give plainly, such as the
number of the broken line, are looked up only after it has failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from moewh.ingest.prompts.canonical import (
    BATCH_ROWS,
    LONGEST_LINE,
    Bound,
    PromptFile,
    canonical,
    database,
    nested_null,
    run,
)
from moewh.ingest.prompts.plain_bytes import bad_utf8
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
from moewh.warehouse.errors import first_line, lacking
from moewh.warehouse.files.names import glob_literal

Relation = Callable[[duckdb.DuckDBPyConnection, Bound], str]
"""SQL for the relation of a file's records, with one `json` per row."""


def read_json(path: Path, file: PromptFile, kind: str, relation: Relation) -> Iterator[pa.RecordBatch]:
    """Convert JSON records to canonical batches. Raises MoewhError for a record or line that is not a prompt."""
    if path.stat().st_size == 1 and path.read_bytes().strip():  # DuckDB finds no value in a single byte
        raise file.error(_bad_json(path, kind) or "record 1 is not a JSON object.")
    read = conventions(file.text_column)
    columns = (name for item in read for name in (*item.columns, *item.left_out))
    names = {*columns, file.domain_column, "source", *TOKENIZER_COLUMNS}
    spellings = {name: _spellings(name) for name in sorted(names)}
    connection = database()
    try:
        batches = _with_values(connection, spellings, relation)
        other = connection.cursor()  # the first reads on meanwhile
        converted = (part for batch in batches for part in _converted(other, batch, spellings, read, file))
        yield from canonical(converted, read, file, "record")
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # without a number, it is DuckDB's, through Arrow
            raise
        if lack := lacking(error) or (isinstance(error, duckdb.OutOfMemoryException) and first_line(error)):
            raise file.error(f"cannot be read: {lack}") from error
        if "maximum_object_size" in str(error):
            raise file.error(f"holds a record of more than {LONGEST_LINE >> 20} MiB. Split it.") from None
        raise file.error(_bad_json(path, kind) or f"not valid JSON: {first_line(error)}") from None
    finally:
        connection.close()


def _spellings(name: str) -> dict[str, str]:
    """Return the paths of a column in a record, by the name of the Arrow column for each: as a key, then as nested."""
    keys = nested_path(name)
    nested = {f"nested {name}": "$." + ".".join(f'"{key}"' for key in keys)} if keys else {}
    return {f"key {name}": json_key(name), **nested}


def _with_values(
    connection: duckdb.DuckDBPyConnection, spellings: dict[str, dict[str, str]], relation: Relation
) -> Iterator[pa.RecordBatch]:
    """Yield the records, and the JSON values of the columns that matter, as Arrow columns named as in `spellings`."""
    bound = Bound()
    paths = {column: path for of_name in spellings.values() for column, path in of_name.items()}
    values = ", ".join(f'v[{index}] as "c{index}"' for index in range(1, len(paths) + 1))
    sql = f"""
        select json, {values}
        from (select json, json_extract(json, [{", ".join(map(bound, paths.values()))}]) as v
              from {relation(connection, bound)})
    """
    connection.execute("set arrow_large_buffer_size = true")
    for batch in connection.sql(sql, params=bound.values).to_arrow_reader(BATCH_ROWS):
        yield batch.rename_columns(["json", *paths])


def _converted(
    connection: duckdb.DuckDBPyConnection,
    batch: pa.RecordBatch,
    spellings: dict[str, dict[str, str]],
    read: Sequence[Convention],
    file: PromptFile,
) -> list[pa.RecordBatch]:
    """Run `prompts_sql` on records, with SQL for those columns only that any of them has."""
    bound = Bound()
    _, *columns = batch.schema.names
    there = ["json", *(name for name in columns if batch.column(name).null_count < batch.num_rows)]
    sql_of = {name: f"c{index}" for index, name in enumerate(there)}
    found = {name: [sql_of[column] for column in of_name if column in sql_of] for name, of_name in spellings.items()}

    def value(name: str) -> str:
        return f"coalesce({', '.join(found[name])})" if found[name] else "null::json"

    def text(name: str) -> str:
        return json_text(value(name))

    def label(name: str) -> str:
        """A label that is NaN, as in pandas' records, is missing."""
        infinite = f"json_type({value(name)}) = 'DOUBLE' and {text(name)} in ('NaN', 'Infinity', '-Infinity')"
        return f"case when {infinite} then null else {text(name)} end"

    def metadata(convention: Convention) -> str:
        used = dict.fromkeys((*convention.columns, file.domain_column, "source"))
        patches = [bound(json.dumps(used)), *(_nested_patch(name, sql_of, bound) for name in used)]
        record = "case when record_kind = 'OBJECT' then json else '{}' end"
        return f"nullif(json_merge_patch({', '.join([record, *filter(None, patches)])})::varchar, '{{}}')"

    records = f"""
        select *, json_type(json) as record_kind, {value(file.domain_column)} is not null as labelled,
               {label(file.domain_column)} as domain, {label("source")} as source
        from (select *, {sql_of["json"]} as json from given)
    """
    columns = RecordColumns(
        value, text, metadata, "json_keys(json)", [name for name in TOKENIZER_COLUMNS if found[name]]
    )
    query = prompts_sql(records, present(read, lambda name: bool(found[name])), columns)
    connection.register("given", pa.Table.from_batches([batch.select(there).rename_columns(list(sql_of.values()))]))
    _check_keys(connection, f"given.{sql_of['json']}", read, file)
    return run(connection, query, bound.values)


def _check_keys(
    connection: duckdb.DuckDBPyConnection, record: str, read: Sequence[Convention], file: PromptFile
) -> None:
    """Raise the file's error for a record with a key twice, or with one that is misspelled."""
    for (keys,) in connection.execute(f"select distinct json_keys({record}) from given").fetchall():
        for key in keys or []:
            if keys.count(key) > 1:
                raise file.error(f"has the key {key!r} twice in one record. Keep one.")
        if keys and (problem := misnamed(keys, read, file.domain_column)):
            raise file.error(f"{problem}.")


def json_objects(path: Path, kind: str, bound: Bound) -> str:
    """Return SQL for the JSON values of a file, one `json` per row; the file is jsonl, an array or a document."""
    form = {"jsonl": "newline_delimited", "array": "array", "document": "unstructured"}[kind]
    options = f"format = '{form}', compression = 'uncompressed', maximum_object_size = {LONGEST_LINE}"
    return f"read_json_objects({bound(glob_literal(path))}, {options})"


def _nested_patch(name: str, sql_of: dict[str, str], bound: Bound) -> str | None:
    """Return SQL for the merge patch that removes a nested column; None where no record has it nested."""
    keys, nested = nested_path(name), sql_of.get(f"nested {name}")
    if keys is None or nested is None:
        return None
    literal = f"{sql_of[f'key {name}']} is null and " if f"key {name}" in sql_of else ""
    return f"case when {literal}{nested} is not null then {bound(nested_null(keys))} else '{{}}' end"


def json_key(name: str) -> str:
    """Return the JSON pointer to a top-level key with any characters; a JSON path cannot express the empty key."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def _bad_json(path: Path, kind: str) -> str | None:
    """Describe the first line that is not UTF-8 or not JSON; None if Python's reader finds none."""
    if not_utf8 := bad_utf8(path):
        return not_utf8
    if kind != "jsonl":
        return _bad_json_text(path.read_bytes(), "")
    with path.open("rb") as lines:
        found = (_bad_json_text(line, f"line {number} ") for number, line in enumerate(lines, 1) if line.strip())
        return next((problem for problem in found if problem), None)


def _bad_json_text(content: bytes, where: str) -> str | None:
    try:
        json.dumps(json.loads(content), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return f"{where}holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character."
    except RecursionError:
        return f"{where}is nested too deeply."
    except ValueError as error:
        return f"{where}is not valid JSON: {error}."
    return None
