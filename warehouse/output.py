"""The result of a query as a table, CSV, JSON, Markdown or Parquet, on stdout or in a file.

Text formats are written as rows arrive. CSV and JSON carry every number in full precision. A file
appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from warehouse.errors import UsageError
from warehouse.layout import sync

if TYPE_CHECKING:
    import duckdb

    from warehouse.query import Answer

FORMATS = ("table", "csv", "json", "parquet", "markdown")
_SUFFIXES = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".md": "markdown", ".txt": "table"}
_BATCH = 10_000
_TABLE_ROWS = 40
_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "U")


def choose_format(name: str | None, output: Path | None) -> str:
    """Return the format asked for, else the one of the file's suffix, else `table`. Raises UsageError."""
    chosen = name or (_SUFFIXES.get(output.suffix.lower()) if output else "table")
    if chosen is None:
        raise UsageError(f"cannot tell the format of {output} from its name. Add --format {'|'.join(FORMATS)}.")
    if chosen == "parquet" and output is None:
        raise UsageError("Parquet cannot be printed. Name a file with -o.")
    return chosen


def write(answer: Answer, form: str, output: Path | None) -> None:
    """Write a result in one of FORMATS to a file, or to stdout without one. Raises OSError."""
    if output is None:
        _TEXT_WRITERS[form](answer, sys.stdout)
        sys.stdout.flush()
        return
    with _replaced(output) as path:
        if form == "parquet":
            answer.relation().write_parquet(str(path), compression="zstd")
        else:
            with path.open("w", encoding="utf-8", newline="") as stream:
                _TEXT_WRITERS[form](answer, stream)


def written_path(output: Path) -> Path:
    """Return the path that `write` will write to: beside `output`, unless that is no regular file (a pipe, a device).

    Raises UsageError for a directory and for a file in no directory.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a directory. Name a file with -o.")
    if output.exists() and not output.is_file():
        return output
    output = output.resolve()
    if not output.parent.is_dir():
        raise UsageError(f"there is no directory {output.parent}.")
    return output.with_name(f".{output.name}.{os.getpid()}")


@contextlib.contextmanager
def _replaced(output: Path) -> Iterator[Path]:
    """Yield a path to write to; afterwards it becomes `output` in one step, or nothing does."""
    partial = written_path(output)
    if partial == output:
        yield output
        return
    output = output.resolve()
    try:
        yield partial
        sync(partial)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _rows(cursor: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while batch := cursor.fetchmany(_BATCH):
        yield from batch


def _write_table(answer: Answer, stream: TextIO) -> None:
    """DuckDB's own box, as wide as the terminal ($COLUMNS, else 120); of many rows the first and last."""
    box = io.StringIO()
    with contextlib.redirect_stdout(box):
        answer.relation().show(max_width=shutil.get_terminal_size((120, 40)).columns, max_rows=_TABLE_ROWS)
    stream.write(box.getvalue().rstrip("\n") + "\n")


def _write_csv(answer: Answer, stream: TextIO) -> None:
    cursor = answer.execute()
    stream.write(",".join(_csv_field(name) for name, *_ in cursor.description or ()) + "\n")
    for row in _rows(cursor):
        stream.write(",".join(_csv_field(value) for value in row) + "\n")


def _csv_field(value: object) -> str:
    """NULL is nothing, an empty string is `""`."""
    text = _text(value)
    if isinstance(value, str) and (not text or text != text.strip() or any(mark in text for mark in ',"\r\n')):
        return '"' + text.replace('"', '""') + '"'
    return f'"{text}"' if "," in text else text


def _write_json(answer: Answer, stream: TextIO) -> None:
    """An array with one object a line; NaN and infinity, which JSON lacks, are null."""
    cursor = answer.execute()
    names = [name for name, *_ in cursor.description or ()]
    separator = "["
    for row in _rows(cursor):
        values = {name: _jsonable(value) for name, value in zip(names, row, strict=True)}
        stream.write(f"{separator}\n{json.dumps(values, ensure_ascii=False, default=_text)}")
        separator = ","
    stream.write("[]\n" if separator == "[" else "\n]\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return value


def _write_markdown(answer: Answer, stream: TextIO) -> None:
    cursor = answer.execute()
    columns = cursor.description or []
    heads = " | ".join(_markdown_cell(name) for name, *_ in columns)
    marks = " | ".join("---:" if str(kind).startswith(_NUMBERS) else "---" for _, kind, *_ in columns)
    stream.write(f"| {heads} |\n| {marks} |\n")
    for row in _rows(cursor):
        stream.write(f"| {' | '.join(_markdown_cell(value) for value in row)} |\n")


def _markdown_cell(value: object) -> str:
    return _text(value).replace("\\", "\\\\").replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def _text(value: object) -> str:
    """Return a value as text: NULL is nothing, booleans as in SQL, nested values as JSON."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple | dict):
        return json.dumps(_jsonable(value), ensure_ascii=False, default=_text)
    return str(value)


_TEXT_WRITERS: dict[str, Callable[[Answer, TextIO], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "markdown": _write_markdown,
}
