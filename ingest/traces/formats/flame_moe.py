"""FLAME-MoE's published traces: `samples/NNN.parquet` with token ids, and one `layer_NN.parquet` per MoE layer.

Give both: the layer files of one capture, and all files of samples. Row i of every layer is row i of all samples in
order of their numbers. `scores` are the softmax probabilities of the chosen experts, which the model uses as weights;
ranks follow from them, ties by expert. There are no prompt boundaries: a prompt is a piece of PIECE tokens, as its
metadata states.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moewh.ingest.traces.arrays import IN_PIECES, require_distinct
from moewh.ingest.traces.trace import Array, Format, Sequence, TraceFile, TraceModel
from moewh.warehouse.errors import short_message

PIECE = 1 << 14
"""Tokens per prompt."""
_LAYER = re.compile(r"layer_(\d+)\.parquet")


class _Rows:
    """Rows of one or more Parquet files as one stream, `PIECE` at a time."""

    def __init__(self, files: list[TraceFile], columns: list[str], stack: ExitStack) -> None:
        self._files, self._columns, self._stack = files, columns, stack
        self._batches = self._read()
        self._rest: list[pa.RecordBatch] = []

    def next(self) -> pa.Table | None:
        """Return the next rows, at most PIECE; None at the end."""
        while sum(map(len, self._rest)) < PIECE and (batch := next(self._batches, None)) is not None:
            self._rest.append(batch)
        if not self._rest:
            return None
        try:
            whole = pa.concat_tables(
                map(pa.Table.from_batches, ([batch] for batch in self._rest)), promote_options="permissive"
            )
        except pa.ArrowException:
            kinds = ", ".join(sorted({str(batch.schema.field(0).type) for batch in self._rest}))
            raise self._files[0].error(f"and the files after it hold {kinds} as {self._columns[0]}.") from None
        self._rest = [batch for batch in whole.slice(PIECE).to_batches() if len(batch)]
        return whole.slice(0, PIECE)

    def _read(self) -> Iterator[pa.RecordBatch]:
        for file in self._files:
            try:
                parquet = self._stack.enter_context(pq.ParquetFile(file.path, **IN_PIECES))
                require_distinct(parquet.schema_arrow.names, "column", file)
                missing = set(self._columns) - set(parquet.schema_arrow.names)
                if missing:
                    raise file.error(f"has no column {sorted(missing)[0]}.")
                yield from parquet.iter_batches(batch_size=PIECE, columns=self._columns)
            except (pa.ArrowException, OSError) as error:
                raise file.error(f"cannot be read as Parquet: {short_message(error)}.") from error


def _read(files: list[TraceFile], model: TraceModel) -> Iterator[Sequence]:
    by_layer = {int(found[1]): file for file in files if (found := _LAYER.fullmatch(file.path.name))}
    samples = [file for file in files if not _LAYER.fullmatch(file.path.name)]
    samples.sort(key=lambda file: (len(file.path.name), file.path.name))  # 9.parquet before 10.parquet
    layers = model.numbered(by_layer, files[0].name)
    if not samples or len(samples) + len(layers) != len(files):
        raise files[0].error(
            f"give the samples, and the layers of one capture: {len(samples)} and {len(files) - len(samples)} files."
        )
    for kind, given in (("layers", [by_layer[layer] for layer in layers]), ("samples", samples)):
        if other := next((file for file in given if file.path.parent != given[0].path.parent), None):
            raise other.error(f"is in another folder than {given[0].name}. Give the {kind} of one capture.")
    with ExitStack() as stack:
        tokens = _Rows(samples, ["token_id"], stack)
        routing = [(by_layer[layer], _Rows([by_layer[layer]], ["scores", "indices"], stack)) for layer in layers]
        piece = 0
        while (table := tokens.next()) is not None:
            where = f"tokens from {piece * PIECE:,}"
            parts = [(file, rows.next()) for file, rows in routing]
            arrays = [_layer(file, part, len(table), where, model.top_k) for file, part in parts]
            yield Sequence(
                f"{files[0].name}, {where}",
                np.stack([ids for ids, _ in arrays], axis=1),
                np.stack([scores for _, scores in arrays], axis=1),
                vocab_ids_T=_plain(table["token_id"], samples[0]),
                source=routing[0][0].path.parent.name,
                metadata={"boundaries": "unknown", "first_row": piece * PIECE},
            )
            piece += 1
        for file, rows in routing:
            if rows.next() is not None:
                raise file.error("has more rows than there are tokens in the samples. Give all files of samples.")


def _layer(file: TraceFile, part: pa.Table | None, tokens: int, where: str, top_k: int) -> tuple[Array, Array]:
    """Return the ids and scores of a piece at a layer, [T, K] each."""
    if part is None or len(part) != tokens:
        raise file.error(f"{where}: has {0 if part is None else len(part):,} rows for {tokens:,} tokens.")
    return _matrix(part["indices"], tokens, top_k, file, where), _matrix(part["scores"], tokens, top_k, file, where)


def _matrix(column: pa.ChunkedArray, tokens: int, top_k: int, file: TraceFile, where: str) -> Array:
    if not hasattr(column.type, "value_type"):
        raise file.error(f"{where}: has {column.type}, where lists of {top_k} numbers must be.")
    lengths = pc.list_value_length(column)
    if column.null_count or pc.min_max(lengths).as_py() != {"min": top_k, "max": top_k}:
        raise file.error(f"{where}: has rows of other lengths than {top_k} experts. Check --model.")
    return _plain(pc.list_flatten(column), file).reshape(tokens, top_k)


def _plain(column: pa.ChunkedArray, file: TraceFile) -> Array:
    if column.null_count or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise file.error(f"has NULLs, or {column.type}, where numbers must be.")
    found: Array = column.to_numpy()
    return found


FORMAT = Format(_read)
