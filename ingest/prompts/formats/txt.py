"""Plain text: one prompt per line, without other columns."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from moewh.ingest.prompts.canonical import BLOCK_BYTES, Format, PromptFile
from moewh.ingest.prompts.formats.csv import DELIMITERS
from moewh.ingest.prompts.plain_bytes import bad_utf8
from moewh.ingest.prompts.records import conventions
from moewh.ingest.prompts.tables import read_tables


def _read(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    if not file.format_given and (kind := _looks_like(path)):
        raise file.error(
            f"looks like {kind}, not one prompt per line. Give --prompts-format {kind} (or txt for lines)."
        )
    return read_tables(_tables(path, file), file)


def _looks_like(path: Path) -> str | None:
    """Return the format that the first line is of: an object with a prompt, or a header that names a prompt column."""
    with path.open("rb") as lines:
        first = lines.readline(1 << 20).decode("utf-8-sig", errors="replace").strip()
    heads = {item.head for item in conventions(None)}
    if first.startswith("{"):
        try:
            record = json.loads(first)
        except (ValueError, RecursionError):
            return None
        return "jsonl" if isinstance(record, dict) and heads & record.keys() else None
    for delimiter in DELIMITERS:
        names = [name.strip('"') for name in first.split(delimiter)]
        if len(names) > 1 and heads & set(names) and all(re.fullmatch(r"\w+", name) for name in names):
            return "tsv" if delimiter == "\t" else "csv"
    return None


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
            if "\r" in block[0].rstrip("\r\n") and not block[0].endswith("\n"):
                raise file.error("its lines end in a lone carriage return. Convert the line ends to \\n.")
            if any("\0" in line for line in block):
                raise file.error("holds NUL bytes: it is not text, or UTF-16 or UTF-32 without a byte order mark.")
            yield pa.table({name: [line.removesuffix("\n").removesuffix("\r") for line in block]})


FORMAT = Format((".txt",), _read)
