"""Output: an `Answer` in; a table, CSV, JSON, JSON lines, Markdown or Parquet out, on stdout or in a file.

Text formats are written as rows arrive. In CSV, JSON and Parquet, every value of every DuckDB type can be read back
(see `moewh.warehouse.answer.texts`). A table is complete, except on a terminal. A file appears under its name only when
it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from moewh.warehouse.answer import texts
from moewh.warehouse.errors import UsageError, require_utf8
from moewh.warehouse.files.commit import sync
from moewh.warehouse.files.folders import real_path
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    from moewh.warehouse.answer.query import Answer
    from moewh.warehouse.answer.retry import HeldBack

FORMATS = ("table", "csv", "json", "jsonl", "parquet", "markdown")
_SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".md": "markdown",
    ".markdown": "markdown",
    ".txt": "table",
}
_MARKDOWN = re.compile(r"[\\|`*~]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")
"""Characters that Markdown would not show as text."""
_LINE_END = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def choose_format(name: str | None, output: Path | None) -> str:
    """Return the requested format, else that of the file's suffix, else `table`. Raises UsageError."""
    if output is not None:
        _require_file(output, "; rows are printed without -o")
    chosen = name or (_SUFFIXES.get(output.suffix.lower()) if output else "table")
    if chosen is None:
        raise UsageError(f"cannot tell the format of {output} from its name. Add --format {'|'.join(FORMATS)}.")
    if chosen == "parquet" and output is None:
        raise UsageError("Parquet cannot be printed. Name a file with -o.")
    return chosen


def write(answer: Answer, form: str, output: Path | None, printed: HeldBack | TextIO | None = None) -> int:
    """Write a result in one of FORMATS to a file, or without one to `printed` (default: stdout).

    Returns the number of rows; on a terminal, of those that were counted. Raises OSError.
    """
    if output is None:
        if form != "table":
            print_utf8()
        stream = sys.stdout if printed is None else cast(TextIO, printed)
        rows = _TEXT_WRITERS[form](answer, stream)
        stream.flush()
        return rows
    with replaced(output) as path:
        if form == "parquet":
            return _write_parquet(answer, path)
        with path.open("w", encoding="utf-8", newline="") as stream:
            return _TEXT_WRITERS[form](answer, stream)


def print_utf8() -> None:
    """Make stdout UTF-8, as a file is, whatever the locale: in another encoding, data would lose characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def _write_parquet(answer: Answer, path: Path) -> int:
    """Write Parquet. It has no 128-bit integers: they become DECIMAL(38, 0), or text if one has more digits."""
    import duckdb

    answer = texts.as_select(answer)
    columns = texts.columns_of(answer)
    try:
        return _copy_parquet(texts.converted(answer, columns, texts.as_parquet("DECIMAL(38, 0)")), path)
    except duckdb.ConversionException:
        if not any(texts.holds_large_integers(column.type) for column in columns):
            raise
        return _copy_parquet(texts.converted(answer, columns, texts.as_parquet("VARCHAR")), path)


def _copy_parquet(answer: Answer, path: Path) -> int:
    import duckdb

    sql = f"copy ({answer.statement}) to {sql_string(str(path))} (format parquet, compression zstd)"
    try:
        ((rows,),) = answer.connection.execute(sql, dict(answer.values)).fetchall()
    except duckdb.IOException as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if str(path) in str(error) and os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code)) from error
        raise
    return int(rows)


def written_path(output: Path, suffixes: tuple[str, ...] = ()) -> Path:
    """Return the path that `write` writes to: beside `output`, or `output` itself if it is a pipe or device.

    `suffixes` are those of the one format that is written, if there is only one. Raises UsageError for what is not a
    file, for a file whose directory does not exist, and for one with the suffix of another format.
    """
    _require_file(output)
    if output.exists() and not output.is_file():
        return output
    output = _resolved(output)
    require_outside(output)
    if not output.parent.is_dir():
        raise UsageError(f"there is no directory {output.parent}.")
    if suffixes and output.suffix and output.suffix.lower() not in suffixes:
        raise UsageError(
            f"{output} would hold {suffixes[0]}, not {output.suffix}. Name a file that ends in {suffixes[0]} with -o."
        )
    return output.with_name(f".{output.name}.{os.getpid()}")


def _require_file(output: Path, hint: str = "") -> None:
    """Raise UsageError for a directory, and for `-`, with which other programs mean stdout; `hint` ends that line."""
    if Path(require_utf8(str(output))).is_dir():
        raise UsageError(f"{output} is a directory. Name a file with -o.")
    if str(output) == "-":
        raise UsageError(f"- is not a file. Name one with -o{hint}.")


def _resolved(output: Path) -> Path:
    """Follow the links of a path. Raises UsageError if they lead in a circle."""
    found = real_path(output)
    if found.is_symlink():
        raise UsageError(f"{output} is a link that leads back to itself. Name another file with -o.")
    return found


def require_outside(output: Path) -> None:
    """Raise UsageError for a path among the files of a warehouse, where nothing else may be written."""
    if (outer := Layout(output).inside_of()) is not None:
        raise UsageError(f"{output} is among the files of the warehouse {outer}. Choose another place.")


@contextlib.contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it is renamed to `output` in one step, on failure it is removed."""
    partial = written_path(output)
    device = partial == output
    target = output if device else _resolved(output)
    try:
        yield partial
        if not device:
            sync(partial)
            partial.replace(target)
    except OSError as error:
        error.filename = error.filename or str(target)  # a full disk is reported without the file
        raise
    finally:
        if not device:
            partial.unlink(missing_ok=True)


def _write_table(answer: Answer, stream: TextIO) -> int:
    """Write a box like DuckDB's: complete, except on a terminal, where a line reports what is left out."""
    from moewh.warehouse.answer import box

    answer = texts.as_select(answer)
    columns = texts.columns_of(answer)
    shown = texts.converted(answer, columns, texts.as_shown)
    if not stream.isatty():
        return box.write_whole(columns, texts.rows_of(shown), stream)
    head = replace(shown, statement=f"select * from ({shown.statement}) limit {box.LIMIT + 1}")
    room = shutil.get_terminal_size((120, 40)).columns
    rows = list(texts.rows_of(head))
    box.write_cut(columns, rows, room, stream)
    return len(rows)


def _write_csv(answer: Answer, stream: TextIO) -> int:
    """Write CSV: NULL is an empty field and an empty text is `""`, so that they differ; nested values are JSON."""
    columns, rows = texts.text_rows(answer)
    stream.write(",".join(_csv_field(column.name) for column in columns) + "\n")
    return _write_lines((",".join("" if cell is None else _csv_field(cell) for cell in row) for row in rows), stream)


def _csv_field(text: str) -> str:
    if text and text == text.strip() and not any(mark in text for mark in ',"\r\n'):
        return text
    return '"' + text.replace('"', '""') + '"'


def _write_json(answer: Answer, stream: TextIO) -> int:
    """Write a JSON array with one object per line."""
    count = 0
    for count, line in enumerate(_json_lines(answer), 1):
        stream.write(f"{'[' if count == 1 else ','}\n{line}")
    stream.write("\n]\n" if count else "[]\n")
    return count


def _write_jsonl(answer: Answer, stream: TextIO) -> int:
    return _write_lines(_json_lines(answer), stream)


def _write_lines(lines: Iterable[str], stream: TextIO) -> int:
    """Write one line per row; return how many."""
    count = 0
    for line in lines:
        stream.write(f"{line}\n")
        count += 1
    return count


def _json_lines(answer: Answer) -> Iterator[str]:
    """Yield each row as a JSON object; NULL is null."""
    answer = texts.as_select(answer)
    columns = texts.columns_of(answer)
    keys = [json.dumps(column.name, ensure_ascii=False) for column in columns]
    for row in texts.rows_of(texts.converted(answer, columns, texts.as_json)):
        pairs = (f"{key}: {'null' if value is None else value}" for key, value in zip(keys, row, strict=True))
        yield texts.strict_json("{" + ", ".join(pairs) + "}")


def _write_markdown(answer: Answer, stream: TextIO) -> int:
    columns, rows = texts.text_rows(answer)
    heads = " | ".join(_markdown_cell(column.name) for column in columns)
    marks = " | ".join("---:" if column.type.id in texts.NUMBERS else "---" for column in columns)
    stream.write(f"| {heads} |\n| {marks} |\n")
    return _write_lines((f"| {' | '.join(_markdown_cell(cell or '') for cell in row)} |" for row in rows), stream)


def _markdown_cell(text: str) -> str:
    """Escape a text so that Markdown shows it unchanged in one cell; a line end becomes `<br>`."""
    return _LINE_END.sub("<br>", _MARKDOWN.sub(r"\\\g<0>", text))


_TEXT_WRITERS: dict[str, Callable[[Answer, TextIO], int]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
    "markdown": _write_markdown,
}
