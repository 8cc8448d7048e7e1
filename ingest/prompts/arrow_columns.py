"""Convert Arrow columns to ones that DuckDB reads correctly, where necessary value by value, as JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

Tests = tuple[Callable[[pa.DataType], bool], ...]
_NO_NUMBER = "NaN|Infinity"
_VIEWS = (pa.types.is_list_view, pa.types.is_large_list_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary)
_FIXED_BYTES = (pa.types.is_fixed_size_binary, pa.types.is_binary_view)
"""Bytes that Arrow casts to strings only by way of plain ones."""
_WRAPPED = (pa.ExtensionScalar, pa.DictionaryScalar, pa.RunEndEncodedScalar)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a text column as plain strings, whether dictionary-encoded, run-end encoded or UTF-8 bytes.

    Any other column is returned unchanged. Raises pa.ArrowInvalid for bytes that are not UTF-8.
    """
    if not _is_text(column.type):
        return column
    if isinstance(column.type, pa.BaseExtensionType):
        return as_text(pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type))
    if pa.types.is_dictionary(column.type):
        return as_text(pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type))
    if pa.types.is_run_end_encoded(column.type):
        decoded = [pc.run_end_decode(chunk) for chunk in column.chunks]
        return as_text(pa.chunked_array(decoded, column.type.value_type))
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    return column.cast(pa.large_string())


def with_texts(column: pa.ChunkedArray, keys: Sequence[str] = ()) -> pa.ChunkedArray:
    """Return a column whose UTF-8 bytes are strings, at any depth, or only within the field that `keys` lead to.

    Raises pa.ArrowInvalid for other bytes.
    """
    for tests, by in ((_FIXED_BYTES, pa.binary()), (_BYTES, pa.string())):
        kind = _replaced(column.type, tests, by, keys)
        column = column if kind == column.type else column.cast(kind)
    return column


def _replaced(kind: pa.DataType, tests: Tests, by: pa.DataType, keys: Sequence[str] = ()) -> pa.DataType:
    """Return a type in which `by` stands for each type that passes a test."""
    if any(test(kind) for test in tests):
        return by
    if pa.types.is_struct(kind):
        there = [
            field if keys and field.name != keys[0] else field.with_type(_replaced(field.type, tests, by, keys[1:]))
            for field in kind
        ]
        return pa.struct(there)
    if pa.types.is_map(kind):
        return pa.map_(_replaced(kind.key_type, tests, by), _replaced(kind.item_type, tests, by))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_replaced(kind.value_type, tests, by), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_replaced(kind.value_type, tests, by))
    return pa.list_(_replaced(kind.value_type, tests, by)) if pa.types.is_list(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, *_VIEWS)
    return any(test(kind) for test in lists)


def _is_text(kind: pa.DataType) -> bool:
    kind = _content(kind)
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in strings + binaries)


def _content(kind: pa.DataType) -> pa.DataType:
    """Return the value type of an encoding, or of an extension type over strings."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _content(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and pa.types.is_string(kind.storage_type):
        return kind.storage_type
    return kind


def holds(kind: pa.DataType, form: str) -> bool:
    """Return whether a column of this type can hold prompts of a form: texts, or lists (possibly as JSON text)."""
    if _is_text(kind):
        return True
    if not _is_list(_content(kind)):
        return False
    item = _content(_content(kind).value_type)
    if form == "text":
        return any(test(item) for test in (pa.types.is_struct, pa.types.is_map, pa.types.is_integer))
    return True


def unwrapped(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without the encodings that DuckDB misreads or cannot read, at any depth.

    DuckDB 2.0 assumes that list views are in order, and reads dictionaries in fixed-size lists as their indices; 1.5
    reads a slice of a union from the union's beginning.
    """
    if not _is_wrapped(column.type):
        return column
    chunks = [_unwrapped(chunk) for chunk in column.chunks]
    return pa.chunked_array(chunks, None if chunks else pa.null())


def _is_wrapped(kind: pa.DataType) -> bool:
    wrapped = (pa.types.is_dictionary, pa.types.is_run_end_encoded, pa.types.is_float16, pa.types.is_union, *_VIEWS)
    if any(test(kind) for test in wrapped):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return _is_wrapped(kind.storage_type)
    return any(_is_wrapped(kind.field(index).type) for index in range(kind.num_fields))


def _unwrapped(array: pa.Array) -> pa.Array:
    kind = array.type
    if not _is_wrapped(kind):
        plain = array
    elif isinstance(kind, pa.BaseExtensionType):
        plain = _unwrapped(array.storage)
    elif pa.types.is_dictionary(kind):
        plain = _unwrapped(array.dictionary_decode())
    elif pa.types.is_run_end_encoded(kind):
        plain = _unwrapped(pc.run_end_decode(array))
    elif pa.types.is_float16(kind):
        plain = array.cast(pa.float32())
    elif _is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(array), 0)
        offsets = pa.concat_arrays([pa.array([0], pa.int64()), pc.cumulative_sum(lengths.cast(pa.int64()))])
        plain = pa.LargeListArray.from_arrays(offsets, _unwrapped(array.flatten()), mask=array.is_null())
    elif pa.types.is_struct(kind):
        children = [_unwrapped(child) for child in array.flatten()]
        plain = pa.StructArray.from_arrays(children, [field.name for field in kind], mask=array.is_null())
    else:  # maps and unions are converted value by value
        texts = [_json_text(value) for value in array]
        plain = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
    return plain


def as_json_text(table: pa.Table) -> tuple[pa.Table, frozenset[int]]:
    """Return a table whose columns DuckDB can read, and the indices of those that are now JSON text."""
    indices = [index for index in range(table.num_columns) if not _is_read(table.column(index))]
    for index in indices:
        texts = [_json_text(value) for value in table.column(index)]
        table = table.set_column(index, table.column_names[index], pa.array(texts, pa.string()))
    return table, frozenset(indices)


def _is_read(column: pa.ChunkedArray) -> bool:
    with duckdb.connect() as connection:
        try:
            connection.register("given", pa.table({"c": column}))
            connection.sql("select to_json(c)::varchar, c::varchar from given").fetchall()
        except duckdb.Error:
            return False
        return True


def _json_text(value: pa.Scalar) -> str:
    return json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False)


def _plain(value: pa.Scalar) -> Any:
    """Return a value as JSON has it: finite numbers, lists, objects, and text for everything else."""
    if not value.is_valid:
        return None
    plain: Any
    if pa.types.is_map(value.type):
        plain = {_key(item["key"]): _plain(item["value"]) for item in value.values}
    elif pa.types.is_struct(value.type):
        plain = dict(zip((field.name for field in value.type), map(_plain, value.values()), strict=True))
    elif pa.types.is_union(value.type):
        index = value.type.type_codes.index(value.type_code)
        plain = {value.type.field(index).name: _plain(value.value)}  # as DuckDB writes the unions it can read
    elif isinstance(value, _WRAPPED):
        plain = _plain(value.value)
    elif pa.types.is_nested(value.type):
        plain = [_plain(item) for item in value.values]
    elif pa.types.is_boolean(value.type) or pa.types.is_integer(value.type):
        plain = value.as_py()
    elif pa.types.is_floating(value.type):
        plain = value.as_py() if math.isfinite(value.as_py()) else None
    else:
        plain = _text(value.as_py()) if _is_text(value.type) else _as_string(value)
    return plain


def _key(value: pa.Scalar) -> str:
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _text(value: str | bytes) -> str:
    """Return text unchanged, and bytes as DuckDB writes them."""
    if isinstance(value, str):
        return value
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b"\\\"'" else f"\\x{byte:02X}" for byte in value)


def _as_string(value: pa.Scalar) -> str:
    """Return Arrow's string for a value (times, decimals, durations), or the bare number where it has none."""
    try:
        return str(value.cast(pa.string()).as_py())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return str(getattr(value, "value", value))


def _finite(number: str) -> float | None:
    return float(number) if math.isfinite(float(number)) else None


def strict_json(texts: pa.StringArray, which: pa.BooleanArray | None = None) -> pa.StringArray:
    """Replace NaN and infinite numbers, which JSON lacks, with null, in all texts or those selected by `which`."""
    suspect = pc.fill_null(pc.match_substring_regex(texts, _NO_NUMBER), False)
    indices = pc.indices_nonzero(suspect if which is None else pc.and_(suspect, which)).to_pylist()
    if not indices:
        return texts
    rows = texts.to_pylist()
    for index in indices:
        found: list[str] = []
        record = json.loads(rows[index], parse_constant=found.append, parse_float=_finite)
        if found:
            rows[index] = json.dumps(record, separators=(",", ":"), ensure_ascii=False)
    return pa.array(rows, pa.string())
