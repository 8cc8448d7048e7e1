"""How a stored table becomes a Parquet file (compression, page checksums, each column's encoding), and is read back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moewh.warehouse.files import schema
from moewh.warehouse.files.schema import Table

ROW_GROUP_ROWS = 1 << 20
COUNTS_ROW_GROUP_ROWS = 1 << 17
"""Row group size of a table of counts."""


def write_table(folder: Path, table: Table, columns: dict[str, Any]) -> None:
    """Write one table's columns (in any order) as its Parquet file in `folder`."""
    arrow = pa.table({column.name: columns[column.name] for column in table.stored}, schema=table.arrow())
    pq.write_table(arrow, folder / table.file, row_group_size=ROW_GROUP_ROWS, **parquet_options(table))


def parquet_options(table: Table) -> dict[str, Any]:
    """Return pyarrow's options for a table's file: compression, page checksums, and each column's encoding."""
    encodings = {"delta": "DELTA_BINARY_PACKED", "byte_stream_split": "BYTE_STREAM_SPLIT"}
    named = {
        column.name + (".list.element" if column.type.endswith("[]") else ""): column.encoding
        for column in table.stored
    }
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        # Only size ends a page: otherwise rows that take a tenth of a bit would make thousands of pages.
        "max_rows_per_page": ROW_GROUP_ROWS,
        "use_dictionary": [name for name, encoding in named.items() if encoding == "dictionary"],
        "column_encoding": {name: encodings[kind] for name, kind in named.items() if kind in encodings},
    }


def read_rows(file: Path, columns: list[str] | None = None) -> pa.Table:
    """Return a file's rows, or some of their columns.

    `pq.read_table` starts a scan of a data set, which takes four times as long for a small file.
    """
    with pq.ParquetFile(file) as opened:
        return opened.read(columns=columns)


def run_row(folder: Path, columns: list[str] | None = None) -> dict[str, Any] | None:
    """Return a run's row of `runs`, or some of its columns, from the run's own folder; None if it is not there."""
    try:
        (row,) = read_rows(folder / schema.RUNS.file, columns).to_pylist()
    except (FileNotFoundError, NotADirectoryError):  # not looked for before: another command may delete the run
        return None
    return dict(row)


def write_chunks(path: Path, table: Table, chunks: Iterable[pa.Table]) -> None:
    """Write chunks as they come, grouping small ones of the same kind.

    A row group never spans kinds, and the row groups of a large layer never span layers, so that a query can skip row
    groups it does not need. Special tokens are few, but choose nearly as many different pairs of experts as all others.
    """
    with pq.ParquetWriter(path, table.arrow(), **parquet_options(table)) as writer:
        waiting: list[pa.Table] = []
        for chunk in chunks:
            if waiting and (
                sum(map(len, waiting)) >= COUNTS_ROW_GROUP_ROWS or (len(chunk) and _kind(chunk) != _kind(waiting[0]))
            ):
                writer.write_table(pa.concat_tables(waiting), row_group_size=COUNTS_ROW_GROUP_ROWS)
                waiting = []
            if len(chunk):
                waiting.append(chunk)
        if waiting:
            writer.write_table(pa.concat_tables(waiting), row_group_size=COUNTS_ROW_GROUP_ROWS)


def _kind(chunk: pa.Table) -> str | None:
    """Return the kind of a non-empty chunk, whose rows all have the same kind; None for a table without kinds."""
    return chunk["kind"][0].as_py() if "kind" in chunk.column_names else None
