"""TSV: CSV with tabs as the default delimiter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moewh.ingest.prompts.canonical import Format, PromptFile
from moewh.ingest.prompts.formats.csv import read_delimited


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_delimited(path, file, "\t" if file.delimiter is None else file.delimiter)


FORMAT = Format((".tsv",), _read)
