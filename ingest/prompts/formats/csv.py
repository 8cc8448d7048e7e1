"""CSV: a header, then one row per record, with the given delimiter or the header's. An empty cell is null."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from moewh.ingest.prompts.canonical import BLOCK_BYTES, LONGEST_LINE, Format, PromptFile
from moewh.ingest.prompts.plain_bytes import bad_utf8
from moewh.ingest.prompts.records import conventions
from moewh.ingest.prompts.tables import read_tables
from moewh.warehouse.errors import first_line

DELIMITERS = ",\t;|"
"""Candidate delimiters; the first that gives the header a prompt column is used."""


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_delimited(path, file, _delimiter(path, file) if file.delimiter is None else file.delimiter)


def read_delimited(path: Path, file: PromptFile, delimiter: str) -> Iterator[pa.RecordBatch]:
    """Yield the canonical batches of a table with this delimiter."""
    return read_tables(_tables(path, file, delimiter), file, empty_is_null=True)


def _tables(path: Path, file: PromptFile, delimiter: str) -> Iterator[pa.Table]:
    """Yield tables with every column as text. A row too long for a block is read again with a larger block."""
    if not path.stat().st_size:
        return
    if misquoted := _misquoted(path, delimiter):
        raise file.error(misquoted)
    done = 0
    for block_bytes in (BLOCK_BYTES, LONGEST_LINE):
        seen = 0
        try:
            for batch in _batches(path, delimiter, block_bytes):
                if seen + batch.num_rows > done:
                    yield pa.Table.from_batches([batch.slice(done - seen)])
                seen += batch.num_rows
                done = max(done, seen)
            return
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            too_long = "straddling" in str(error)
            if too_long and block_bytes < LONGEST_LINE:
                continue
            what = (
                f"holds a row of more than {block_bytes >> 20} MiB, or a quote that never ends." if too_long else None
            )
            raise file.error(bad_utf8(path) or what or f"not valid CSV: {first_line(error)}") from None


def _batches(path: Path, delimiter: str, block_bytes: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows block by block, with every column as text."""
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pacsv.ReadOptions(block_size=block_bytes, use_threads=False)
    with path.open("rb") as handle:
        names = pacsv.open_csv(handle, read_options=read, parse_options=parse).schema.names
    strings = pacsv.ConvertOptions(column_types={name: pa.string() for name in names})
    with path.open("rb") as handle:
        yield from pacsv.open_csv(handle, read_options=read, parse_options=parse, convert_options=strings)


def _misquoted(path: Path, delimiter: str) -> str | None:
    """Describe a quoted field that never ends, or that continues after its closing quote; None without one.

    Arrow ends the first at the end of the file and drops the quotes of the second, which changes its text. Python's
    reader reports both; it reads only files with quotes.
    """
    with path.open("rb") as handle:
        if not any(b'"' in block for block in iter(lambda: handle.read(BLOCK_BYTES), b"")):
            return None
    csv.field_size_limit(LONGEST_LINE)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for _ in reader:
                pass
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                return "ends within a quoted field: the file is cut off, or a quote never ends. Fetch it again."
            if "expected after" in str(error):
                return (
                    f"line {reader.line_num} has a quoted field that goes on after its closing quote. Double the "
                    'quotes within it: "a ""b"" c".'
                )
    return None


def _delimiter(path: Path, file: PromptFile) -> str:
    """Return the first delimiter that gives the header a prompt column."""
    with path.open("rb") as handle:
        header = handle.readline().decode("utf-8-sig", errors="replace").strip("\r\n")
    heads = {item.head for item in conventions(file.text_column)}
    for delimiter in DELIMITERS:
        if heads & {name.strip('"') for name in header.split(delimiter)}:
            return delimiter
    return ","


FORMAT = Format((".csv",), _read)
