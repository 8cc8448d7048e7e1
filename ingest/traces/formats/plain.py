"""moewh's own neutral format, for all other programs: JSON lines or Parquet, one sequence per object or row.

Fields (docs/import.md): `expert_ids` [R, L, K], required; `weights` of the same shape; `ordered`, true where the ids of
a sequence without weights are in rank order; `token_ids` [T]; `first`, the position of the first row with routing;
`generated_from`; `text`, `domain`, `source`; `metadata`, an object. L are all hidden layers or the MoE layers; a row of
-1 is one that was not captured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moewh.ingest.traces.arrays import IN_PIECES, as_array, require_distinct
from moewh.ingest.traces.documents import read_documents
from moewh.ingest.traces.trace import Array, Sequence, TraceFile, TraceModel, each
from moewh.warehouse.errors import short_message

_TYPES: dict[str, type] = {
    "ordered": bool,
    "first": int,
    "generated_from": int,
    "text": str,
    "domain": str,
    "source": str,
    "metadata": dict,
}
_ARRAYS = {"expert_ids": 3, "weights": 3, "token_ids": 1}
"""Field → dimensions."""
_AT_ONCE = 4
"""Rows of a Parquet file read at once."""


def _read(file: TraceFile, _: TraceModel) -> Iterator[Sequence]:
    found = _parquet(file) if file.path.suffix.lower() == ".parquet" else _lines(file)
    for where, fields, arrays in found:
        yield _sequence(where, fields, arrays, file)


def _lines(file: TraceFile) -> Iterator[tuple[str, dict[str, Any], dict[str, Array]]]:
    for where, record in read_documents(file, tuple(_ARRAYS)):
        given = {name: record.pop(name) for name in _ARRAYS if record.get(name) is not None}
        arrays = {
            name: as_array(value, f"{where}, {name}", file.most_values, _ARRAYS[name]) for name, value in given.items()
        }
        yield where, record, arrays


def _parquet(file: TraceFile) -> Iterator[tuple[str, dict[str, Any], dict[str, Array]]]:
    try:
        with pq.ParquetFile(file.path, **IN_PIECES) as parquet:
            require_distinct(parquet.schema_arrow.names, "column", file)
            number = 0
            for batch in parquet.iter_batches(batch_size=_AT_ONCE):
                rest = batch.select([name for name in batch.schema.names if name not in _ARRAYS]).to_pylist()
                for index, record in enumerate(rest):
                    where = f"{file.name}, row {number}"
                    given = {name: batch.column(name)[index] for name in _ARRAYS if name in batch.schema.names}
                    known = {name: value for name, value in given.items() if value.is_valid}
                    arrays = {name: _nested(value, f"{where}, {name}", file) for name, value in known.items()}
                    yield where, record, arrays
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise file.error(f"cannot be read as Parquet: {short_message(error)}.") from error


def _nested(value: pa.Scalar, where: str, file: TraceFile) -> Array:
    """Return nested lists as an array. Raises the file's error if their lengths differ, or they hold NULLs."""
    shape: list[int] = []
    array = value.values if isinstance(value, pa.ListScalar) else pa.array([value.as_py()])
    shape.append(len(array))
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = pc.min_max(pc.list_value_length(array)).as_py()
        if array.null_count or lengths["min"] != lengths["max"]:
            raise file.error(f"{where}: its lists are not of one length.")
        shape.append(lengths["max"] or 0)
        array = pc.list_flatten(array)
    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise file.error(f"{where}: has NULLs, or {array.type}, where numbers must be.")
    found: Array = array.to_numpy(zero_copy_only=False).reshape(shape)
    return found


def _sequence(where: str, fields: dict[str, Any], arrays: dict[str, Array], file: TraceFile) -> Sequence:
    if "expert_ids" not in arrays:
        raise file.error(f"{where} has no expert_ids.")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        if name not in _TYPES:
            raise file.error(f"{where} has a field {name!r}. Known: {', '.join((*_ARRAYS, *_TYPES))}.")
        if name == "metadata" and isinstance(value, str):
            fields = {**fields, name: _object(value, where, file)}
        elif type(value) is not _TYPES[name]:
            raise file.error(f"{where}: its {name} is {value!r}, not {_TYPES[name].__name__}.")
    weights = arrays.get("weights")
    return Sequence(
        where,
        arrays["expert_ids"],
        None if weights is None else weights.astype(np.float64) if weights.dtype.kind in "iu" else weights,
        vocab_ids_T=arrays.get("token_ids"),
        **{"source": file.path.name, **fields},
    )


def _object(text: str, where: str, file: TraceFile) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise file.error(f"{where}: its metadata are not a JSON object.")
    return value


FORMAT = each(_read)
