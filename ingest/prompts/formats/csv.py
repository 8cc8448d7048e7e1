"""CSV: a header, then one row per record, delimited as asked for or as the header shows. An empty cell is null."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from moewh.ingest.prompts.canonical import BLOCK_BYTES, LONGEST_LINE, Format, PromptFile, first_line
from moewh.ingest.prompts.plain import bad_utf8
from moewh.ingest.prompts.records import conventions
from moewh.ingest.prompts.tables import read_tables

_DELIMITERS = ",\t;|"
"""What may stand between the columns; the first that makes a prompt's column of the header is taken."""


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_delimited(path, file, _delimiter(path, file) if file.delimiter is None else file.delimiter)


def read_delimited(path: Path, file: PromptFile, delimiter: str) -> Iterator[pa.RecordBatch]:
    """Yield the canonical batches of a table whose columns are delimited by this character."""
    return read_tables(_tables(path, file, delimiter), file, empty_is_null=True)


def _tables(path: Path, file: PromptFile, delimiter: str) -> Iterator[pa.Table]:
    """Every column is read as text. A row that does not fit into a block is read again in a larger one."""
    if not path.stat().st_size:
        return
    if _ends_within_quotes(path, delimiter):
        raise file.error("ends within a quoted field: the file is cut off, or a quote never ends. Fetch it again.")
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    done = 0
    for block_bytes in (BLOCK_BYTES, LONGEST_LINE):
        read = pacsv.ReadOptions(block_size=block_bytes, use_threads=False)
        try:
            with path.open("rb") as handle:
                names = pacsv.open_csv(handle, read_options=read, parse_options=parse).schema.names
            strings = pacsv.ConvertOptions(column_types={name: pa.string() for name in names})
            seen = 0
            with path.open("rb") as handle:
                for batch in pacsv.open_csv(handle, read_options=read, parse_options=parse, convert_options=strings):
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


def _ends_within_quotes(path: Path, delimiter: str) -> bool:
    """Tell whether a quoted field never ends, which Arrow takes for one that ends with the file.

    Only a file with an odd number of quotes can be so; it alone is read by Python's reader, which says so.
    """
    with path.open("rb") as handle:
        quotes = sum(block.count(b'"') for block in iter(lambda: handle.read(BLOCK_BYTES), b""))
    if quotes % 2 == 0:
        return False
    csv.field_size_limit(LONGEST_LINE)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            for _ in csv.reader(lines, delimiter=delimiter, strict=True):
                pass
        except csv.Error as error:
            return "unexpected end of data" in str(error)
    return False


def _delimiter(path: Path, file: PromptFile) -> str:
    """Return what stands between columns: what makes a prompt's column of the header."""
    with path.open("rb") as handle:
        header = handle.readline().decode("utf-8-sig", errors="replace").strip("\r\n")
    heads = {item.head for item in conventions(file.text_column)}
    for delimiter in _DELIMITERS:
        if heads & {name.strip('"') for name in header.split(delimiter)}:
            return delimiter
    return ","


FORMAT = Format((".csv",), _read)
