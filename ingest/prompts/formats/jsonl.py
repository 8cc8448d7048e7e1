"""JSON lines: one record per line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moewh.ingest.prompts.canonical import Format, PromptFile
from moewh.ingest.prompts.json_records import json_objects, read_json


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    return read_json(path, file, "jsonl", lambda _connection, bound: json_objects(path, "jsonl", bound))


FORMAT = Format((".jsonl", ".ndjson"), _read)
