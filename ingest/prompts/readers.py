"""Readers: from a file of any supported format to batches of (text, form, domain, source, metadata).

Three steps. A file's bytes become plain ones (decompressed, UTF-8 without a byte order mark). Compiled readers make
records of them: DuckDB reads JSON, Arrow everything else. `moewh.ingest.prompts.records` says which columns of a
record are its prompt. What the compiled readers cannot say in one plain line, such as the very line that is broken, is
looked up again only after they failed.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from moewh.ingest.options import PromptFormat
from moewh.ingest.prompts.plain import bad_utf8, plain_file
from moewh.ingest.prompts.records import (
    BESIDE,
    INPUT_IDS,
    MESSAGES,
    Convention,
    RecordColumns,
    conventions,
    nested_path,
    problem_of,
    prompts_sql,
)
from moewh.ingest.prompts.spelling import as_text, holds, spelled, strict_json, unwrapped
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import glob_literal

__all__ = ["BATCH_ROWS", "CANONICAL", "INPUT_IDS", "MESSAGES", "PromptFile", "read_prompts", "read_tables"]

CANONICAL = pa.schema([(name, pa.string()) for name in ("text", "form", "domain", "source", "metadata")])
BATCH_ROWS = 16_384
_BLOCK_BYTES = 16 << 20
_LONGEST_LINE = 256 << 20
_DELIMITERS = ",\t;|"
"""What may stand between the columns of a .csv file; the first that makes a prompt's column of the header is taken."""


@dataclass(frozen=True)
class PromptFile:
    """One input: where its bytes are, what to call it, and how its columns are named."""

    path: Path
    format: PromptFormat
    name: str
    """As the user wrote it, for messages."""
    source: str
    """For prompts that name no source themselves."""
    text_column: str | None = None
    """None: by the conventions of `moewh.ingest.prompts.records`."""
    domain_column: str = "domain"
    domain: str | None = None
    """A label for every prompt, instead of a column."""
    delimiter: str | None = None
    """None: a tab in .tsv, and in .csv what the header shows."""

    def error(self, what: str) -> MoewhError:
        """Return the error to raise, with the file's name in front."""
        return MoewhError(f"{self.name}: {what}")


def read_prompts(file: PromptFile, scratch: Path | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the file's prompts as batches of the canonical schema. Raises MoewhError naming the file or bad line.

    What has to be decompressed lies in `scratch` meanwhile.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        try:
            path = plain_file(file.path, Path(folder) / "plain", file.error, text=file.format in _TEXT_FORMATS)
            if file.format in ("json", "jsonl"):
                yield from _read_json(path, file)
            else:
                yield from read_tables(_TABLES[file.format](path, file), file)
        except OSError as error:
            raise file.error(f"cannot be read: {error.strerror or error}.") from error


# ------------------------------------------------------------------------------------------ JSON


def _read_json(path: Path, file: PromptFile) -> Iterator[pa.RecordBatch]:
    """JSON lines, or one document: an array of records, a record, or an object with one list of records."""
    bound = _Bound()
    names = {*(name for item in conventions(file.text_column) for name in item.columns), file.domain_column}
    paths: list[str] = []
    places: dict[str, list[int]] = {}
    for name in sorted(names | {*BESIDE, "source"}):
        keys = nested_path(name)
        spellings = [_json_key(name), *(["$." + ".".join(f'"{key}"' for key in keys)] if keys else [])]
        places[name] = [len(paths) + offset + 1 for offset in range(len(spellings))]
        paths += spellings

    def value(name: str) -> str:
        return f"coalesce({', '.join(f'v[{place}]' for place in places[name])})"

    def text(name: str) -> str:
        return f"{value(name)} ->> '$'"

    def metadata(convention: Convention) -> str:
        used = dict.fromkeys((*convention.columns, file.domain_column, "source"))
        patches = [bound(json.dumps(used)), *(_nested_patch(name, places[name], bound) for name in used)]
        record = "case when record_kind = 'OBJECT' then json else '{}' end"
        return f"nullif(json_merge_patch({', '.join([record, *filter(None, patches)])})::varchar, '{{}}')"

    connection = database()
    try:
        kind = file.format if file.format == "jsonl" else _json_kind(path, file)
        records = f"""
            select json, json_type(json) as record_kind, v, {value(file.domain_column)} is not null as labelled,
                   {value(file.domain_column)} ->> '$' as domain, {value("source")} ->> '$' as source
            from (select json, json_extract(json, [{", ".join(map(bound, paths))}]) as v
                  from {_json_records(connection, kind, path, file, bound)})
        """
        read = conventions(file.text_column)
        query = prompts_sql(records, read, RecordColumns(value, text, metadata, "json_keys(json)"))
        batches = connection.sql(query, params=bound.values).to_arrow_reader(BATCH_ROWS)
        yield from _canonical(batches, read, file, "record")
    except (duckdb.Error, pa.ArrowException) as error:
        if "maximum_object_size" in str(error):
            raise file.error(f"holds a record of more than {_LONGEST_LINE >> 20} MiB. Split it.") from None
        raise file.error(_bad_json(path, kind) or f"not valid JSON: {_first_line(error)}") from None
    finally:
        connection.close()


def _nested_patch(name: str, places: list[int], bound: _Bound) -> str | None:
    """SQL of the merge patch that takes a nested column out of a record; None for a column that is not nested."""
    keys = nested_path(name)
    if keys is None:
        return None
    literal, nested = (f"v[{place}] is not null" for place in places)
    return f"case when not {literal} and {nested} then {bound(_nested_null(keys))} else '{{}}' end"


def _nested_null(keys: list[str]) -> str:
    patch: Any = None
    for key in reversed(keys):
        patch = {key: patch}
    return json.dumps(patch)


def _json_kind(path: Path, file: PromptFile) -> str:
    """Tell what a .json file is: an array, JSON lines (many are), or anything else. Raises for half an array."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
        if not first.lstrip().startswith(b"["):
            return "jsonl" if _is_json(first) else "document"
        lines.seek(-min(lines.seek(0, io.SEEK_END), 4_096), io.SEEK_END)
        if not lines.read().rstrip().endswith(b"]"):  # DuckDB takes an array that ends after a comma
            raise file.error("is cut off: its array has no end. Get the file again.")
    return "array"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _json_records(connection: duckdb.DuckDBPyConnection, kind: str, path: Path, file: PromptFile, bound: _Bound) -> str:
    """SQL of the relation of a file's records, one `json` each."""
    form = {"jsonl": "newline_delimited", "array": "array", "document": "unstructured"}[kind]
    options = f"format = '{form}', compression = 'uncompressed', maximum_object_size = {_LONGEST_LINE}"
    place = glob_literal(path)
    records = f"read_json_objects({bound(place)}, {options})"
    if file.format != "json" or kind == "array":
        return records
    whole = connection.execute(f"select json from read_json_objects($1, {options}) limit 2", [place]).fetchall()
    key = _list_of_records(json.loads(whole[0][0]), file) if len(whole) == 1 else None
    if key is None:
        return records
    return f"(select unnest(json_extract(json, {bound(_json_key(key))})::json[]) as json from {records})"


def _list_of_records(document: Any, file: PromptFile) -> str | None:
    """Return the one key of a document that holds a list of records; None if it is a record itself."""
    if not isinstance(document, dict):
        return None
    heads = {name for item in conventions(file.text_column) for name in (item.head, item.head.split(".")[0])}
    lists = [key for key, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 and not heads & document.keys() else None


# ------------------------------------------------------------------------------------------ tables


def _txt_tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    """One prompt per line; only \\n and \\r\\n end a line, other Unicode separators stay in the text."""
    name = file.text_column or "text"
    with io.TextIOWrapper(path.open("rb"), encoding="utf-8-sig", newline="\n") as lines:
        while True:
            try:
                block = lines.readlines(_BLOCK_BYTES)
            except UnicodeDecodeError:
                raise file.error(bad_utf8(path) or "is not UTF-8.") from None
            if not block:
                return
            yield pa.table({name: [line.removesuffix("\n").removesuffix("\r") for line in block]})


def _csv_tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    """Every column is read as text. A row that does not fit into a block is read again in a larger one."""
    if not path.stat().st_size:
        return
    parse = pacsv.ParseOptions(delimiter=_delimiter(path, file), newlines_in_values=True)
    done = 0
    for block_bytes in (_BLOCK_BYTES, _LONGEST_LINE):
        read = pacsv.ReadOptions(block_size=block_bytes, use_threads=False)
        try:
            with path.open("rb") as handle:
                names = pacsv.open_csv(handle, read_options=read, parse_options=parse).schema.names
            strings = pacsv.ConvertOptions(column_types={name: pa.string() for name in names})
            seen = 0
            with path.open("rb") as handle:
                for batch in pacsv.open_csv(handle, read_options=read, parse_options=parse, convert_options=strings):
                    if seen + batch.num_rows > done:
                        yield pa.Table.from_batches([batch.slice(done - seen)])
                    seen += batch.num_rows
                    done = max(done, seen)
            return
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            too_long = "straddling" in str(error)
            if too_long and block_bytes < _LONGEST_LINE:
                continue
            what = (
                f"holds a row of more than {block_bytes >> 20} MiB, or a quote that never ends." if too_long else None
            )
            raise file.error(bad_utf8(path) or what or f"not valid CSV: {_first_line(error)}") from None


def _delimiter(path: Path, file: PromptFile) -> str:
    """Return what stands between columns: what was asked for, else what makes a prompt's column of the header."""
    if file.delimiter is not None:
        return file.delimiter
    if file.format == "tsv":
        return "\t"
    with path.open("rb") as handle:
        header = handle.readline().decode("utf-8-sig", errors="replace").strip("\r\n")
    heads = {item.head for item in conventions(file.text_column)}
    for delimiter in _DELIMITERS:
        if heads & {name.strip('"') for name in header.split(delimiter)}:
            return delimiter
    return ","


def _parquet_tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as reader:
            for batch in reader.iter_batches(BATCH_ROWS):
                batch.validate(full=True)
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise file.error(f"not a readable Parquet file: {_first_line(error)}") from None


def _arrow_tables(path: Path, file: PromptFile) -> Iterator[pa.Table]:
    """Arrow's own format, of files (.feather) or of streams (what the `datasets` library keeps)."""
    try:
        with pa.memory_map(str(path)) as data:
            try:
                reader = pa.ipc.open_file(data)
                batches = (reader.get_batch(place) for place in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                data.seek(0)
                batches = pa.ipc.open_stream(data)
            for batch in batches:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    yield pa.Table.from_batches([batch.slice(start, BATCH_ROWS)])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise file.error(f"not a readable Arrow file: {_first_line(error)}") from None


def read_tables(tables: Iterable[pa.Table], file: PromptFile) -> Iterator[pa.RecordBatch]:
    """Bring Arrow tables of one schema to canonical batches; what no prompt takes up becomes JSON metadata."""
    tables = iter(tables)
    first = next(tables, None)
    if first is None:
        return
    read = _table_conventions(first.schema, file)
    yield from _canonical(_relabelled(chain([first], tables), read, file), read, file, "row")


def _table_conventions(columns: pa.Schema, file: PromptFile) -> tuple[Convention, ...]:
    """Return what may be a prompt among the columns of a table. Raises MoewhError for a table without."""
    names = columns.names
    if len(set(names)) < len(names):
        raise file.error("has two columns of the same name. Rename one.")
    listed = ", ".join(map(repr, names))
    if file.domain_column != "domain" and _root(file.domain_column, names) is None:
        raise file.error(f"has no column {file.domain_column!r}; it has {listed}. Check --domain-column.")
    known = conventions(file.text_column)
    there = [item for item in known if _root(item.head, names) is not None]
    kinds = {item.head: columns.field(item.head).type for item in there if item.head in names}
    read = [item for item in there if item.head not in kinds or holds(kinds[item.head], item.form)]
    texts = [item for item in there if item.form == "text"]
    if texts and texts[0] not in read and (len(there) == 1 or not pa.types.is_null(kinds[texts[0].head])):
        raise file.error(f"column {texts[0].head!r} holds {kinds[texts[0].head]}, not text.")
    if not read:
        raise file.error(f"has no column {known[0].head!r}; it has {listed}. Name it with --text-column.")
    return tuple(read)


def _root(name: str, names: list[str]) -> str | None:
    """Return the column of a table that holds a column: itself, or what `a.b` is nested in; None if there is none."""
    if name in names:
        return name
    keys = nested_path(name)
    return keys[0] if keys and keys[0] in names else None


def _relabelled(tables: Iterable[pa.Table], read: tuple[Convention, ...], file: PromptFile) -> Iterator[pa.RecordBatch]:
    """Yield what `prompts_sql` makes of tables. A column that DuckDB cannot read is spelled as JSON first."""
    connection = database()
    try:
        for table in tables:
            given = _with_plain_columns(table, read, file)
            try:
                batches = _relabel(connection, given, frozenset(), read, file)
            except duckdb.Error:
                connection.close()
                connection = database()  # some errors leave the old one of no use
                given, as_json = spelled(given)
                batches = _relabel(connection, given, as_json, read, file)
            yield from batches
    except duckdb.Error as error:
        raise file.error(f"holds what DuckDB cannot read: {_first_line(error)}") from None
    finally:
        connection.close()


def _with_plain_columns(table: pa.Table, read: tuple[Convention, ...], file: PromptFile) -> pa.Table:
    """Return a table whose text columns are plain strings, and whose others DuckDB reads right if it reads them."""
    texts = {name for item in read for name in item.columns}
    for place, name in enumerate(table.column_names):
        try:
            column = as_text(table.column(place)) if name in texts else table.column(place)
        except pa.ArrowInvalid:
            raise file.error(f"column {name!r} holds bytes that are not UTF-8.") from None
        table = table.set_column(place, name, unwrapped(column))
    return table


def _relabel(
    connection: duckdb.DuckDBPyConnection,
    table: pa.Table,
    as_json: frozenset[int],
    read: tuple[Convention, ...],
    file: PromptFile,
) -> list[pa.RecordBatch]:
    """Run `prompts_sql` on a table. DuckDB knows its columns by their places: to it, `Text` and `text` are one name."""
    bound = _Bound()
    names = table.column_names
    empty_is_null = file.format in ("csv", "tsv")
    columns = {name: f"c{place}" + ("::json" if place in as_json else "") for place, name in enumerate(names)}
    texts = {name for item in read if item.form == "text" for name in item.columns if name in names}
    strings = {name for name in texts if pa.types.is_large_string(table.schema.field(name).type)}

    def value(name: str) -> str:
        root = _root(name, names)
        if root is None:
            return "null::json"
        if root != name:
            path = "$." + ".".join(f'"{key}"' for key in (nested_path(name) or [])[1:])
            return f"json_extract(to_json({columns[root]}), {bound(path)})"
        if name in strings:  # only whether there is one counts: `text` says which
            return f"case when {text(name)} is not null then '\"\"'::json else 'null'::json end"
        column = f"nullif({columns[name]}, '')" if empty_is_null else columns[name]
        return f"coalesce(to_json({column}), 'null'::json)"

    def text(name: str) -> str:
        if name not in strings:
            return f"{value(name)} ->> '$'"
        return f"nullif({columns[name]}, '')" if empty_is_null else columns[name]

    def label(name: str) -> str:
        if name not in columns or columns[name].endswith("json"):
            return f"{value(name)} ->> '$'"
        return f"nullif({columns[name]}::varchar, '')" if empty_is_null else f"{columns[name]}::varchar"

    def metadata(convention: Convention) -> str:
        used = (*convention.columns, file.domain_column, "source")
        rest = ", ".join(f"{bound(name)}, {columns[name]}" for name in names if name not in used)
        nested = [name for name in used if _root(name, names) not in (None, name)]
        patches = [
            f"case when {value(name)} is not null then {bound(_nested_null(nested_path(name) or []))} else '{{}}' end"
            for name in nested
        ]
        packed = f"json_object({rest})" if rest else "null"
        return f"json_merge_patch({', '.join([packed, *patches])})::varchar" if patches else f"{packed}::varchar"

    needed = sorted({*(name for item in read for name in item.columns), *BESIDE})
    values = {name: value(name) for name in needed}
    v = {name: f"v{place}" for place, name in enumerate(needed)}
    labelled = f"{value(file.domain_column)} is not null"
    records = f"""
        select *, 'OBJECT' as record_kind, {labelled} as labelled, {label(file.domain_column)} as domain,
               {label("source")} as source, {", ".join(f"{values[name]} as {v[name]}" for name in needed)}
        from given
    """
    keys = f"[{', '.join(map(bound, names))}]"
    query = prompts_sql(records, read, RecordColumns(v.__getitem__, text, metadata, keys))
    connection.register("given", table.rename_columns([f"c{place}" for place in range(len(names))]))
    batches: list[pa.RecordBatch] = connection.sql(query, params=bound.values).to_arrow_table().to_batches()
    return batches


# ------------------------------------------------------------------------------------------ both


class _Bound:
    """Values of a query's parameters; calling it with one returns the SQL that stands for it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def __call__(self, value: str) -> str:
        name = f"p{len(self.values)}"
        self.values[name] = value
        return f"${name}"


def _canonical(
    batches: Iterable[pa.RecordBatch], read: Sequence[Convention], file: PromptFile, word: str
) -> Iterator[pa.RecordBatch]:
    """Check that every record is a prompt, fill in the file's own labels, and yield exactly the canonical schema.

    Raises MoewhError for the first record that is no prompt, named by its place.
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
    """Make messages and ids valid JSON; texts stay what they are."""
    is_text = pc.equal(forms, "text")
    return texts if pc.all(is_text).as_py() else pc.if_else(is_text, texts, strict_json(texts, pc.invert(is_text)))


def database() -> duckdb.DuckDBPyConnection:
    """Return a DuckDB in memory whose answers do not depend on where in the world it runs."""
    connection = duckdb.connect()
    connection.execute("set TimeZone = 'UTC'")
    return connection


def _bad_json(path: Path, kind: str) -> str | None:
    """Name the first line that is not UTF-8 or not JSON, if Python's reader sees one."""
    if not_utf8 := bad_utf8(path):
        return not_utf8
    if kind != "jsonl":
        return _bad_json_text(path.read_bytes(), "")
    with path.open("rb") as lines:
        found = (_bad_json_text(line, f"line {number} ") for number, line in enumerate(lines, 1) if line.strip())
        return next((problem for problem in found if problem), None)


def _bad_json_text(content: bytes, where: str) -> str | None:
    try:
        json.dumps(json.loads(content), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return f"{where}holds half of a surrogate pair (\\ud800 to \\udfff), which is no character."
    except RecursionError:
        return f"{where}is nested too deeply."
    except ValueError as error:
        return f"{where}is not valid JSON: {error}."
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _json_key(name: str) -> str:
    """JSON pointer to a top-level key, whatever characters it has; a path cannot name the empty key."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


_TABLES: dict[str, Callable[[Path, PromptFile], Iterator[pa.Table]]] = {
    "txt": _txt_tables,
    "csv": _csv_tables,
    "tsv": _csv_tables,
    "parquet": _parquet_tables,
    "arrow": _arrow_tables,
}
_TEXT_FORMATS = ("json", "jsonl", "csv", "tsv", "txt")
