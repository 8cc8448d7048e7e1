"""Readers: from a file of any supported format to batches of (text, domain, source, metadata).

Compiled readers do the work (DuckDB for JSON lines, Arrow for CSV and Parquet); what they cannot say
in one plain line, such as the very line that is broken, is looked up again only after they failed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ingest.options import PromptFormat
from warehouse.errors import MoewhError

CANONICAL = pa.schema([(name, pa.string()) for name in ("text", "domain", "source", "metadata")])
BATCH_ROWS = 16_384
_BLOCK_BYTES = 16 << 20
_LONGEST_LINE = 256 << 20


@dataclass(frozen=True)
class PromptFile:
    """One input: where its bytes are, what to call it, and how its columns are named."""

    path: Path
    format: PromptFormat
    name: str
    """As the user wrote it, for messages."""
    source: str
    """For prompts that name no source themselves."""
    text_column: str
    domain_column: str
    domain: str | None
    """A label for every prompt, instead of a column."""

    def error(self, what: str) -> MoewhError:
        """Return the error to raise, with the file's name in front."""
        return MoewhError(f"{self.name}: {what}")


def read_prompts(file: PromptFile) -> Iterator[pa.RecordBatch]:
    """Yield the file's prompts as batches of the canonical schema. Raises MoewhError naming the bad line."""
    with duckdb.connect() as connection:
        yield from _READERS[file.format](connection, file)


def _read_txt(_: duckdb.DuckDBPyConnection, file: PromptFile) -> Iterator[pa.RecordBatch]:
    """One prompt a line; only \\n and \\r\\n end a line, other Unicode separators stay in the text."""
    with io.TextIOWrapper(file.path.open("rb"), encoding="utf-8-sig", newline="\n") as lines:
        while True:
            try:
                block = lines.readlines(_BLOCK_BYTES)
            except UnicodeDecodeError:
                raise file.error(_bad_utf8(file.path) or "is not UTF-8") from None
            if not block:
                return
            texts = [line.removesuffix("\n").removesuffix("\r") for line in block]
            yield from _canonical(pa.table({"text": texts}), file)


def _read_csv(connection: duckdb.DuckDBPyConnection, file: PromptFile) -> Iterator[pa.RecordBatch]:
    """Every column is read as text; only a prompt's own text may be an empty string, others become NULL."""
    if not file.path.stat().st_size:
        return
    parse = pacsv.ParseOptions(newlines_in_values=True)
    read = pacsv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
    try:
        with file.path.open("rb") as handle:
            names = pacsv.open_csv(handle, read_options=read, parse_options=parse).schema.names
        strings = pacsv.ConvertOptions(column_types={name: pa.string() for name in names})
        with file.path.open("rb") as handle:
            reader = pacsv.open_csv(handle, read_options=read, parse_options=parse, convert_options=strings)
            for batch in reader:
                yield from _relabel(connection, pa.Table.from_batches([batch]), file, empty_is_null=True)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise file.error(_bad_utf8(file.path) or f"not valid CSV: {_first_line(error)}") from None


def _read_parquet(connection: duckdb.DuckDBPyConnection, file: PromptFile) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file.path) as reader:
            for batch in reader.iter_batches(BATCH_ROWS):
                batch.validate(full=True)
                yield from _relabel(connection, pa.Table.from_batches([batch]), file, empty_is_null=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise file.error(f"not a readable Parquet file: {_first_line(error)}") from None


def _read_jsonl(connection: duckdb.DuckDBPyConnection, file: PromptFile) -> Iterator[pa.RecordBatch]:
    text, domain = (_json_key(name) for name in (file.text_column, file.domain_column))
    used = dict.fromkeys((file.text_column, file.domain_column, "source"))
    query = """
        select json_type(json) as kind,
               json_type(json, $text) as text_kind,
               json ->> $text as text,
               json ->> $domain as domain,
               json ->> '$."source"' as source,
               nullif(json_merge_patch(case when json_type(json) = 'OBJECT' then json else '{}' end, $used)::varchar,
                      '{}') as metadata
        from read_ndjson_objects($path, maximum_object_size = $longest)
    """
    parameters = {
        "text": text,
        "domain": domain,
        "used": json.dumps(used),
        "path": _literal_glob(file.path),
        "longest": _LONGEST_LINE,
    }
    try:
        reader: pa.RecordBatchReader = connection.sql(query, params=parameters).to_arrow_reader(BATCH_ROWS)
        before = 0
        batch: pa.RecordBatch
        for batch in reader:
            _check_records(batch, before, file)
            yield from _canonical(pa.Table.from_batches([batch]).drop_columns(["kind", "text_kind"]), file)
            before += batch.num_rows
    except (duckdb.Error, pa.ArrowException) as error:
        raise file.error(_bad_json(file.path) or f"not valid JSON lines: {_first_line(error)}") from None


def _check_records(batch: pa.RecordBatch, before: int, file: PromptFile) -> None:
    """Raise MoewhError for the first record that is no object with a text, named by its place."""
    column = file.text_column
    good = pc.equal(batch.column("text_kind"), "VARCHAR")
    bad = pc.index(pc.fill_null(good, False), pa.scalar(False)).as_py()
    if bad < 0:
        return
    kind, text_kind = batch.column("kind")[bad].as_py(), batch.column("text_kind")[bad].as_py()
    if kind != "OBJECT":
        what = "is not a JSON object"
    elif text_kind is None:
        what = f"has no {column!r}. Name the column with --text-column"
    else:
        what = f"has a {column!r} that is no string ({text_kind.lower()})"
    raise file.error(f"record {before + bad + 1} {what}.")


def _relabel(
    connection: duckdb.DuckDBPyConnection, table: pa.Table, file: PromptFile, *, empty_is_null: bool
) -> Iterator[pa.RecordBatch]:
    """Bring a CSV or Parquet batch to the canonical columns; what is left becomes JSON metadata."""
    text, domain = file.text_column, file.domain_column
    if text not in table.column_names:
        raise file.error(
            f"has no column {text!r}; it has {', '.join(map(repr, table.column_names))}. Name it with --text-column."
        )
    if len(set(table.column_names)) < len(table.column_names):
        raise file.error("has two columns of the same name. Rename one.")
    if not (
        pa.types.is_string(table.schema.field(text).type) or pa.types.is_large_string(table.schema.field(text).type)
    ):
        raise file.error(f"column {text!r} holds {table.schema.field(text).type}, not text.")
    rest = [name for name in table.column_names if name not in (text, domain, "source")]

    def column(name: str) -> str:
        if name not in table.column_names:
            return "null"
        value = f"{_identifier(name)}::varchar"
        return f"nullif({value}, '')" if empty_is_null and name != text else value

    packed = ", ".join(f"{_identifier(name)} := {_identifier(name)}" for name in rest)
    metadata = f"to_json(struct_pack({packed}))::varchar" if rest else "null::varchar"
    query = f"""
        select {column(text)} as text, {column(domain)} as domain, {column("source")} as source,
               {metadata} as metadata
        from given
    """
    connection.register("given", table)
    yield from _canonical(connection.sql(query).to_arrow_table(), file)


def _canonical(table: pa.Table, file: PromptFile) -> Iterator[pa.RecordBatch]:
    """Fill in the file's own labels (domain, source) and yield batches of exactly the canonical schema."""
    columns = {name: table.column(name) for name in table.column_names}
    if file.domain is not None:
        columns["domain"] = pa.array([file.domain] * table.num_rows, pa.string())
    for name in CANONICAL.names:
        columns.setdefault(name, pa.nulls(table.num_rows, pa.string()))
    columns["text"] = pc.fill_null(columns["text"].cast(pa.string()), "")
    columns["source"] = pc.fill_null(columns["source"].cast(pa.string()), file.source)
    ordered = {name: columns[name].cast(pa.string()) for name in CANONICAL.names}
    yield from pa.table(ordered, schema=CANONICAL).to_batches()


def _bad_utf8(path: Path) -> str | None:
    """Name the first line that is not UTF-8, if there is one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte {error.start + 1} of the line). Convert the file to UTF-8."
    return None


def _bad_json(path: Path) -> str | None:
    """Name the first line that is not UTF-8 or not JSON, if Python's reader sees one."""
    if not_utf8 := _bad_utf8(path):
        return not_utf8
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    json.dumps(json.loads(line), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return f"line {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character."
            except ValueError as error:
                return f"line {number} is not valid JSON: {error}."
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _json_key(name: str) -> str:
    """JSON path of a top-level key, whatever characters it has."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'$."{escaped}"'


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal_glob(path: Path) -> str:
    """Spell a path so that DuckDB does not read its characters as a pattern."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in str(path))


_READERS = {"txt": _read_txt, "csv": _read_csv, "parquet": _read_parquet, "jsonl": _read_jsonl}
