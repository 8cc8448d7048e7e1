"""JSON documents: an array of records, a record, or an object with one list of records; and JSON lines named .json."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from moewh.ingest.prompts.canonical import Bound, Format, PromptFile
from moewh.ingest.prompts.json_records import json_key, json_objects, read_json
from moewh.ingest.prompts.records import conventions


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    kind = _kind(path, file)
    return read_json(path, file, kind, partial(_records, kind=kind, path=path, file=file))


def _kind(path: Path, file: PromptFile) -> str:
    """Return what a .json file is: an array, JSON lines (common), or a document. Raises for an unfinished array."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        if not first.lstrip().startswith(b"["):
            return "jsonl" if _is_json(first) else "document"
        lines.seek(-min(lines.seek(0, io.SEEK_END), 4_096), io.SEEK_END)
        if not lines.read().rstrip().endswith(b"]"):  # DuckDB accepts an array that ends after a comma
            raise file.error("is cut off: its array has no end. Get the file again.")
    return "array"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _records(connection: duckdb.DuckDBPyConnection, bound: Bound, kind: str, path: Path, file: PromptFile) -> str:
    """Return SQL for the records: every value of the file, or those in the one list of its single value."""
    records = json_objects(path, kind, bound)
    if kind == "array":
        return records
    alone = Bound()
    first = f"select json from {json_objects(path, kind, alone)} limit 2"
    whole = connection.execute(first, alone.values).fetchall()
    try:
        key = _list_of_records(json.loads(whole[0][0]), file) if len(whole) == 1 else None
    except ValueError as error:  # what DuckDB reads and JSON does not have: a comma before a bracket
        raise file.error(f"is not valid JSON: {error}.") from None
    if key is None:
        return records
    return f"(select unnest(json_extract(json, {bound(json_key(key))})::json[]) as json from {records})"


def _list_of_records(document: Any, file: PromptFile) -> str | None:
    """Return the only key of a document that holds a list of records; None if the document is a record."""
    if not isinstance(document, dict):
        return None
    heads = {name for item in conventions(file.text_column) for name in (item.head, item.head.split(".")[0])}
    lists = [key for key, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 and not heads & document.keys() else None


FORMAT = Format((".json",), _read)
