"""How a stored table becomes a Parquet file: compression, page checksums, and each column's encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moewh.warehouse.files.schema import Table

ROW_GROUP_ROWS = 1 << 20


def write_table(folder: Path, table: Table, columns: dict[str, Any]) -> None:
    """Write one table's columns (in any order) as its Parquet file in `folder`."""
    arrow = pa.table({column.name: columns[column.name] for column in table.stored}, schema=table.arrow())
    pq.write_table(arrow, folder / table.file, row_group_size=ROW_GROUP_ROWS, **parquet_options(table))


def parquet_options(table: Table) -> dict[str, Any]:
    """Return how pyarrow writes a table's file: compression, page checksums, and each column's encoding."""
    encodings = {"delta": "DELTA_BINARY_PACKED", "byte_stream_split": "BYTE_STREAM_SPLIT"}
    named = {
        column.name + (".list.element" if column.type.endswith("[]") else ""): column.encoding
        for column in table.stored
    }
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        # Pages end by size alone: rows that take a tenth of a bit would else make thousands of them.
        "max_rows_per_page": ROW_GROUP_ROWS,
        "use_dictionary": [name for name, encoding in named.items() if encoding == "dictionary"],
        "column_encoding": {name: encodings[kind] for name, kind in named.items() if kind in encodings},
    }
