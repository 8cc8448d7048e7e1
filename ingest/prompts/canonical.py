"""The parts that all readers of prompts share: the canonical columns, one input, the format interface, final checks.

In: batches of (text, form, domain, source, metadata) that DuckDB makes with the SQL of `moewh.ingest.prompts.records`.
Out: the same with the file's own labels filled in, in exactly the canonical schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from moewh.ingest.prompts.arrow_columns import strict_json
from moewh.ingest.prompts.records import Convention, problem_of
from moewh.warehouse.errors import MoewhError

CANONICAL = pa.schema([(name, pa.string()) for name in ("text", "form", "domain", "source", "metadata")])
BATCH_ROWS = 16_384
BLOCK_BYTES = 16 << 20
LONGEST_LINE = 256 << 20


@dataclass(frozen=True)
class PromptFile:
    """One input: where its bytes are, its name, and the names of its columns."""

    path: Path
    format: str
    """Its module in `moewh.ingest.prompts.formats`."""
    name: str
    """As the user wrote it, for messages."""
    source: str
    """The source of prompts that do not state their own."""
    text_column: str | None = None
    """None: by the conventions in `moewh.ingest.prompts.records`."""
    domain_column: str = "domain"
    domain: str | None = None
    """A label for every prompt, instead of a column."""
    delimiter: str | None = None
    """None: as the format or the header decides."""
    format_given: bool = False
    """Whether the user named the format; else the suffix did."""

    def error(self, what: str) -> MoewhError:
        """Return an error to raise, with the file's name in front."""
        return MoewhError(f"{self.name}: {what}")


@dataclass(frozen=True)
class Format:
    """One format of prompts: the `FORMAT` of a file in `moewh.ingest.prompts.formats`, whose name is the format's."""

    suffixes: tuple[str, ...]
    """Suffixes of its files, in lower case with the dot."""
    read: Callable[[Path, PromptFile], Iterator[pa.RecordBatch]]
    """(path of the plain bytes, file) → canonical batches. Raises `PromptFile.error` for what it cannot read."""
    text: bool = True
    """Whether its bytes are text, which is converted to UTF-8 without a byte order mark before reading."""


def canonical(
    batches: Iterable[pa.RecordBatch], read: Sequence[Convention], file: PromptFile, word: str
) -> Iterator[pa.RecordBatch]:
    """Check that every record is a prompt, fill in the file's own labels, and yield exactly the canonical schema.

    Raises MoewhError, with its index, for the first record that is not a prompt.
    """
    before = labelled = 0
    for batch in batches:
        bad = pc.index(pc.is_valid(batch.column("problem")), pa.scalar(True)).as_py()
        if bad >= 0:
            problem = problem_of(batch.slice(bad, 1).to_pylist()[0], read)
            raise file.error(f"{word} {before + bad + 1} {problem}.")
        columns = {name: batch.column(name).cast(pa.string()) for name in CANONICAL.names}
        if file.domain is not None:
            columns["domain"] = pa.array([file.domain] * batch.num_rows, pa.string())
        columns["text"] = _strict_payloads(pc.fill_null(columns["text"], ""), columns["form"])
        columns["source"] = pc.fill_null(columns["source"], file.source)
        columns["metadata"] = strict_json(columns["metadata"])
        yield pa.RecordBatch.from_arrays(list(columns.values()), schema=CANONICAL)
        before += batch.num_rows
        labelled += pc.sum(batch.column("labelled")).as_py() or 0
    if not labelled and before and file.domain_column != "domain":
        raise file.error(f"no {word} has {file.domain_column!r}. Check --domain-column.")


def _strict_payloads(texts: pa.StringArray, forms: pa.StringArray) -> pa.StringArray:
    """Make messages and ids valid JSON; texts are unchanged."""
    is_text = pc.equal(forms, "text")
    return texts if pc.all(is_text).as_py() else pc.if_else(is_text, texts, strict_json(texts, pc.invert(is_text)))


class Bound:
    """Collects the values of a query's parameters."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def __call__(self, value: str) -> str:
        """Add a value and return its placeholder in SQL."""
        name = f"p{len(self.values)}"
        self.values[name] = value
        return f"${name}"


def nested_null(keys: list[str]) -> str:
    """Return the merge patch that removes a nested column from a record."""
    patch: Any = None
    for key in reversed(keys):
        patch = {key: patch}
    return json.dumps(patch)


def database() -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB whose results do not depend on the local time zone."""
    connection = duckdb.connect()
    connection.execute("set TimeZone = 'UTC'")
    return connection


def run(connection: duckdb.DuckDBPyConnection, sql: str, values: dict[str, str]) -> list[pa.RecordBatch]:
    """Return the rows of a query over one batch. As a relation, DuckDB would plan it twice, longer than it runs."""
    connection.execute(f"create or replace temp table converted as {sql}", values)
    batches: list[pa.RecordBatch] = connection.sql("from converted").to_arrow_table().to_batches()
    return batches
