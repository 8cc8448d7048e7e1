"""Readers: from a file of any supported format to batches of (text, form, domain, source, metadata).

A prompt is a text, or what stands in for one: chat messages or token ids, kept here as JSON under `text`, with
`form` saying which.

Compiled readers do the work (DuckDB for JSON lines, Arrow for CSV and Parquet); what they cannot say
in one plain line, such as the very line that is broken, is looked up again only after they failed.
"""

from __future__ import annotations

import codecs
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
from warehouse.layout import glob_literal

CANONICAL = pa.schema([(name, pa.string()) for name in ("text", "form", "domain", "source", "metadata")])
MESSAGES, INPUT_IDS = "messages", "input_ids"
"""The columns that may stand in for a text, and the values of `form` for them; else it is `text`."""
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
    """Yield the file's prompts as batches of the canonical schema. Raises MoewhError naming the file or bad line."""
    with duckdb.connect() as connection:
        try:
            yield from _READERS[file.format](connection, file)
        except OSError as error:
            raise file.error(f"cannot be read: {error.strerror or error}.") from error


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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise file.error(f"not a readable Parquet file: {_first_line(error)}") from None


def _read_jsonl(connection: duckdb.DuckDBPyConnection, file: PromptFile) -> Iterator[pa.RecordBatch]:
    query = """
        with records as (
            select json_type(json) as kind,
                   json_type(json, $text) as text_kind,
                   json_type(json, $domain) as domain_kind,
                   case when json_type(json, $text) is not null then 'text'
                        when json_type(json, '$."messages"') = 'ARRAY' then 'messages'
                        when json_type(json, '$."input_ids"') = 'ARRAY' then 'input_ids' end as form,
                   json
            from read_ndjson_objects($path, maximum_object_size = $longest)
        )
        select kind,
               text_kind,
               domain_kind,
               form,
               case form when 'text' then json ->> $text
                         when 'messages' then (json -> '$."messages"')::varchar
                         when 'input_ids' then (json -> '$."input_ids"')::varchar end as text,
               json ->> $domain as domain,
               json ->> '$."source"' as source,
               nullif(json_merge_patch(case when kind = 'OBJECT' then json else '{}' end,
                                       case form when 'messages' then $used_messages
                                                 when 'input_ids' then $used_input_ids
                                                 else $used end)::varchar, '{}') as metadata
        from records
    """

    def used(column: str) -> str:
        return json.dumps(dict.fromkeys((column, file.domain_column, "source")))

    parameters = {
        "text": _json_key(file.text_column),
        "domain": _json_key(file.domain_column),
        "used": used(file.text_column),
        "used_messages": used(MESSAGES),
        "used_input_ids": used(INPUT_IDS),
        "path": glob_literal(file.path),
        "longest": _LONGEST_LINE,
    }
    try:
        reader: pa.RecordBatchReader = connection.sql(query, params=parameters).to_arrow_reader(BATCH_ROWS)
        before = labelled = 0
        batch: pa.RecordBatch
        for batch in reader:
            _check_records(batch, before, file)
            yield from _canonical(pa.Table.from_batches([batch]), file)
            before += batch.num_rows
            labelled += batch.num_rows - batch.column("domain_kind").null_count
    except (duckdb.Error, pa.ArrowException) as error:
        raise file.error(_bad_json(file.path) or f"not valid JSON lines: {_first_line(error)}") from None
    if not labelled and before and file.domain_column != "domain":
        raise file.error(f"no record has {file.domain_column!r}. Check --domain-column.")


def _check_records(batch: pa.RecordBatch, before: int, file: PromptFile) -> None:
    """Raise MoewhError for the first record that is no object with a prompt, named by its place."""
    column = file.text_column
    text, standing_in = pc.equal(batch.column("text_kind"), "VARCHAR"), pc.equal(batch.column("form"), "text")
    good = pc.or_kleene(pc.fill_null(text, False), pc.invert(pc.fill_null(standing_in, True)))
    bad = pc.index(good, pa.scalar(False)).as_py()
    if bad < 0:
        return
    kind, text_kind = batch.column("kind")[bad].as_py(), batch.column("text_kind")[bad].as_py()
    if kind != "OBJECT":
        what = "is not a JSON object"
    elif text_kind is None:
        what = f"has no {column!r}, nor messages or input_ids. Name the column with --text-column"
    else:
        what = f"has a {column!r} that is no string ({text_kind.lower()})"
    raise file.error(f"record {before + bad + 1} {what}.")


def _relabel(
    connection: duckdb.DuckDBPyConnection, table: pa.Table, file: PromptFile, *, empty_is_null: bool
) -> Iterator[pa.RecordBatch]:
    """Bring a CSV or Parquet batch to the canonical columns; what is left becomes JSON metadata.

    DuckDB knows the columns by their places: to it, `Text` and `text` are one name.
    """
    form, given = _prompt_column(table.schema, file)
    places = {name: f"c{place}" for place, name in enumerate(table.column_names)}
    rest = [name for name in places if name not in (given, file.domain_column, "source")]

    def column(name: str) -> str:
        if name not in places:
            return "null"
        value = f"{places[name]}::varchar"
        return f"nullif({value}, '')" if empty_is_null and name != given else value

    text = column(given) if form == "text" else f"to_json({places[given]})::varchar"
    packed = ", ".join(f"${places[name]}, {places[name]}" for name in rest)
    metadata = f"json_object({packed})::varchar" if rest else "null::varchar"
    query = f"""
        select {text} as text, '{form}' as form, {column(file.domain_column)} as domain,
               {column("source")} as source, {metadata} as metadata
        from given
    """
    try:
        connection.register("given", table.rename_columns(list(places.values())))
        relabelled = connection.sql(query, params={places[name]: name for name in rest}).to_arrow_table()
    except duckdb.Error as error:
        raise file.error(f"holds what DuckDB cannot read: {_first_line(error)}") from None
    yield from _canonical(relabelled, file)


def _prompt_column(columns: pa.Schema, file: PromptFile) -> tuple[str, str]:
    """Return the form of a table's prompts and the column that holds them. Raises MoewhError for a table without."""
    names = columns.names
    if len(set(names)) < len(names):
        raise file.error("has two columns of the same name. Rename one.")
    if file.domain_column not in ("domain", *names):
        raise file.error(f"has no column {file.domain_column!r}; it has {', '.join(names)}. Check --domain-column.")
    if file.text_column in names:
        kind = columns.field(file.text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise file.error(f"column {file.text_column!r} holds {kind}, not text.")
        return "text", file.text_column
    for form in (MESSAGES, INPUT_IDS):
        if form in names and pa.types.is_list(columns.field(form).type):
            return form, form
    raise file.error(
        f"has no column {file.text_column!r}; it has {', '.join(map(repr, names))}. Name it with --text-column."
    )


def _canonical(table: pa.Table, file: PromptFile) -> Iterator[pa.RecordBatch]:
    """Fill in the file's own labels (domain, source) and yield batches of exactly the canonical schema."""
    columns = {name: table.column(name) for name in table.column_names}
    if file.domain is not None:
        columns["domain"] = pa.array([file.domain] * table.num_rows, pa.string())
    for name in CANONICAL.names:
        columns.setdefault(name, pa.nulls(table.num_rows, pa.string()))
    columns["form"] = pc.fill_null(columns["form"].cast(pa.string()), "text")
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
        if lines.read(3) == codecs.BOM_UTF8:
            return "begins with a byte order mark, which JSON does not allow. Save it as UTF-8 without one."
        lines.seek(0)
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
    """JSON pointer to a top-level key, whatever characters it has; a path cannot name the empty key."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


_READERS = {"txt": _read_txt, "csv": _read_csv, "parquet": _read_parquet, "jsonl": _read_jsonl}
