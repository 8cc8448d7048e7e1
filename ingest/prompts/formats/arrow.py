"""Arrow IPC: files (.feather) or streams, which the `datasets` library stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moewh.ingest.prompts.canonical import BATCH_ROWS, Format, PromptFile
from moewh.ingest.prompts.tables import read_tables
from moewh.warehouse.errors import first_line


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_tables(_tables(path, file), file)


def _tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    try:
        with pa.memory_map(str(path)) as data:
            try:
                reader = pa.ipc.open_file(data)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                data.seek(0)
                batches = pa.ipc.open_stream(data)
            for batch in batches:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield pa.Table.from_batches([batch.slice(start, BATCH_ROWS)])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise file.error(f"not a readable Arrow file: {first_line(error)}") from None


FORMAT = Format((".arrow", ".feather"), _read, text=False)
