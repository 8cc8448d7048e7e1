"""Parquet: one row per record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moewh.ingest.prompts.canonical import BATCH_ROWS, Format, PromptFile
from moewh.ingest.prompts.tables import read_tables
from moewh.warehouse.errors import first_line


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_tables(_tables(path, file), file)


def _tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as reader:
            for batch in reader.iter_batches(BATCH_ROWS):
                batch.validate(full=True)
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise file.error(f"not a readable Parquet file: {first_line(error)}") from None


FORMAT = Format((".parquet",), _read, text=False)
