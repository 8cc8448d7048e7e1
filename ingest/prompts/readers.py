"""Readers: from a file of any supported format to batches of (text, form, domain, source, metadata).

In three steps: a file's bytes become plain ones (decompressed, UTF-8 without a byte order mark); compiled readers turn
them into records, with one module per format in `moewh.ingest.prompts.formats`; `moewh.ingest.prompts.records` decides
which columns of a record are its prompt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pyarrow as pa

from moewh.ingest.options import PROMPT_FORMATS
from moewh.ingest.prompts import formats
from moewh.ingest.prompts.canonical import Format, PromptFile
from moewh.ingest.prompts.plain_bytes import plain_file

FORMATS: dict[str, Format] = {name: import_module(f"{formats.__name__}.{name}").FORMAT for name in PROMPT_FORMATS}
"""Every format by its name."""
SUFFIXES = {suffix: name for name, form in FORMATS.items() for suffix in form.suffixes}
"""Format names, by the suffixes of their files."""


def read_prompts(file: PromptFile, scratch: Path | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the file's prompts as batches of the canonical schema. Raises MoewhError with the file or bad line.

    Decompressed data is kept in `scratch` meanwhile.
    """
    form = FORMATS[file.format]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            path = plain_file(file.path, Path(folder) / "plain", file.error, text=form.text)
            yield from form.read(path, file)
        except OSError as error:
            raise file.error(f"cannot be read: {error.strerror or error}.") from error
