"""Plain text: one prompt per line, without other columns."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moewh.ingest.prompts.canonical import BLOCK_BYTES, Format, PromptFile
from moewh.ingest.prompts.plain import bad_utf8
from moewh.ingest.prompts.tables import read_tables


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_tables(_tables(path, file), file)


def _tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    """Yield one prompt per line; only \\n and \\r\\n end a line, other Unicode separators stay in the text."""
    name = file.text_column or "text"
    with io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", newline="\n") as lines:
        while True:
            try:
                block = lines.readlines(BLOCK_BYTES)
            except UnicodeDecodeError:
                raise file.error(bad_utf8(path) or "is not UTF-8.") from None
            if not block:
                return
            yield pa.table({name: [line.removesuffix("\n").removesuffix("\r") for line in block]})


FORMAT = Format((".txt",), _read)
