"""JSON records to canonical batches, for every format of JSON.

In: SQL of a file's records. Out: canonical batches. Details that DuckDB's error does not give plainly, such as the
number of the broken line, are looked up only after it has failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
    first_line,
    nested_null,
)
from moewh.ingest.prompts.plain import bad_utf8
from moewh.ingest.prompts.records import BESIDE, Convention, RecordColumns, conventions, nested_path, prompts_sql
from moewh.warehouse.files.layout import glob_literal

Relation = Callable[[duckdb.DuckDBPyConnection, Bound], str]
"""SQL for the relation of a file's records, with one `json` per row."""


def read_json(path: Path, file: PromptFile, kind: str, relation: Relation) -> Iterator[pa.RecordBatch]:
    """Convert JSON records to canonical batches. Raises MoewhError for a record or line that is not a prompt."""
    bound = Bound()
    names = {*(name for item in conventions(file.text_column) for name in item.columns), file.domain_column}
    paths: list[str] = []
    offsets: dict[str, list[int]] = {}
    for name in sorted(names | {*BESIDE, "source"}):
        keys = nested_path(name)
        spellings = [json_key(name), *(["$." + ".".join(f'"{key}"' for key in keys)] if keys else [])]
        offsets[name] = [len(paths) + offset + 1 for offset in range(len(spellings))]
        paths += spellings

    def value(name: str) -> str:
        return f"coalesce({', '.join(f'v[{offset}]' for offset in offsets[name])})"

    def text(name: str) -> str:
        return f"{value(name)} ->> '$'"

    def metadata(convention: Convention) -> str:
        used = dict.fromkeys((*convention.columns, file.domain_column, "source"))
        patches = [bound(json.dumps(used)), *(_nested_patch(name, offsets[name], bound) for name in used)]
        record = "case when record_kind = 'OBJECT' then json else '{}' end"
        return f"nullif(json_merge_patch({', '.join([record, *filter(None, patches)])})::varchar, '{{}}')"

    connection = database()
    try:
        records = f"""
            select json, json_type(json) as record_kind, v, {value(file.domain_column)} is not null as labelled,
                   {value(file.domain_column)} ->> '$' as domain, {value("source")} ->> '$' as source
            from (select json, json_extract(json, [{", ".join(map(bound, paths))}]) as v
                  from {relation(connection, bound)})
        """
        read = conventions(file.text_column)
        query = prompts_sql(records, read, RecordColumns(value, text, metadata, "json_keys(json)"))
        batches = connection.sql(query, params=bound.values).to_arrow_reader(BATCH_ROWS)
        yield from canonical(batches, read, file, "record")
    except (duckdb.Error, pa.ArrowException) as error:
        if "maximum_object_size" in str(error):
            raise file.error(f"holds a record of more than {LONGEST_LINE >> 20} MiB. Split it.") from None
        raise file.error(_bad_json(path, kind) or f"not valid JSON: {first_line(error)}") from None
    finally:
        connection.close()


def json_objects(path: Path, kind: str, bound: Bound) -> str:
    """Return SQL for the JSON values of a file, one `json` per row; the file is jsonl, an array or a document."""
    form = {"jsonl": "newline_delimited", "array": "array", "document": "unstructured"}[kind]
    options = f"format = '{form}', compression = 'uncompressed', maximum_object_size = {LONGEST_LINE}"
    return f"read_json_objects({bound(glob_literal(path))}, {options})"


def _nested_patch(name: str, offsets: list[int], bound: Bound) -> str | None:
    """Return SQL for the merge patch that removes a nested column; None for a column that is not nested."""
    keys = nested_path(name)
    if keys is None:
        return None
    literal, nested = (f"v[{offset}] is not null" for offset in offsets)
    return f"case when not {literal} and {nested} then {bound(nested_null(keys))} else '{{}}' end"


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
