"""Prompts in memory: any iterable of records, read once, becomes an input of the prompt stream.

A record is a mapping with the columns of a prompts file, or a string.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path, PurePath
from typing import Any
from uuid import UUID

import pyarrow as pa

from moewh.ingest.options import RECORDS, IngestOptions
from moewh.ingest.prompts.readers import read_prompts
from moewh.ingest.prompts.sources import Found, Input, prompt_file
from moewh.warehouse.errors import MoewhError


def in_memory(records: Iterable[Any]) -> Found:
    """Return an input that reads these records. Anything that is not a record is refused when it is read."""

    def batches(scratch: Path, options: IngestOptions) -> Iterator[pa.RecordBatch]:
        path = scratch / "records.jsonl"
        with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
            for number, record in enumerate(islice(records, options.limit), 1):  # a stream may be endless
                file.write(_line(number, record) + "\n")
        yield from read_prompts(prompt_file(path, "jsonl", RECORDS, RECORDS, options), scratch)

    return Found([Input(RECORDS, RECORDS, None, batches)])


def _line(number: int, record: Any) -> str:
    """Return a record as a line of JSON. Raises MoewhError if it is not a record."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        forms = ", such as {'messages': …} or {'input_ids': …}" if isinstance(record, Iterable) else ""
        raise MoewhError(f"record {number} of the prompts is a {type(record).__name__}. Give strings or dicts{forms}.")
    try:
        return json.dumps(
            {name: None if _is_nan(value) else value for name, value in record.items()}, default=plain_value
        )
    except (TypeError, ValueError) as error:
        raise MoewhError(f"record {number} of the prompts cannot be stored as JSON: {error}.") from None


def _is_nan(value: Any) -> bool:
    """Return whether a value is what pandas has for a missing one."""
    return (isinstance(value, float) and math.isnan(value)) or (isinstance(value, date) and str(value) == "NaT")


def plain_value(value: Any) -> Any:
    """Return arrays and tensors as lists, their scalars as numbers, and times, paths and such as text."""
    if isinstance(value, date | time | PurePath | UUID | Decimal):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it holds a {type(value).__name__}")
