"""The segment writer: one segment's tokens and routing as sorted, checksummed Parquet, committed at once.

Nothing in a segment depends on the clock or the host, so equal inputs give byte-identical files.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.ingest.prompts.digest import PromptDigest
from moewh.ingest.record import Identity
from moewh.ingest.routing import KINDS, Ranked, RoutingBuffer, Texts, TokenisedSegment, VectorBuffer
from moewh.ingest.write.expert_outputs import write_expert_outputs
from moewh.ingest.write.rollups import RollupCounter, one_blas_thread
from moewh.ingest.write.run_files import vocabulary_key
from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import write_manifest
from moewh.warehouse.files.schema import Table
from moewh.warehouse.files.tables import ROW_GROUP_ROWS, parquet_options, write_table

_VECTOR_NUMBERS = 1 << 22
"""Numbers per row group of an opt-in table."""
_BATCH_ROWS = 1 << 16
"""Rows of routing encoded at once."""
_LABELS = pa.dictionary(pa.int32(), pa.string())
"""Arrow type for a column with few distinct texts."""
_THREADS = min(4, usable_cpus())
"""Threads that rank and count a segment's layers, besides the one that writes its rows."""

_Number = TypeVar("_Number", np.int32, np.float32)


@dataclass(frozen=True)
class Committed:
    """The size of a committed segment."""

    prompts: int
    tokens: int
    routing_rows: int
    bytes: int


def write_segment(
    layout: Layout,
    identity: Identity,
    number: int,
    segment: TokenisedSegment,
    routing: RoutingBuffer,
    *,
    texts: Texts,
    last: bool,
) -> Committed:
    """Write all tables of one segment of a run, whose own files are there, and commit them with one rename.

    `texts` maps vocabulary entries to their text; `last` marks the run's last segment. Losing a race for the segment to
    another process is success. Raises MoewhError if writing to disk fails.
    """
    target = layout.segment(identity.run_id, number)
    with layout.writing(), layout.staged(f"{target.parent.name}.{target.name}") as folder:
        rollups = RollupCounter(segment, texts)
        key = vocabulary_key(layout, identity.run_id)
        rows = write_routing(folder / schema.ROUTING.file, segment, routing, rollups, key)
        rollups.write(folder)
        if routing.vectors is not None:
            _write_opt_in(folder, segment, routing, routing.vectors, rollups)
        write_table(folder, schema.PROMPTS, _prompt_columns(segment, routing))
        write_table(folder, schema.TOKENS, _token_columns(segment, texts))
        counts = {"prompts": len(segment.status_P), "tokens": len(segment.vocab_id_T), "routing_rows": rows}
        summary = {**counts, "prompts_sha256": _prompts_sha256(segment), "last": last}
        write_table(folder, schema.SEGMENTS, {name: [value] for name, value in summary.items()})
        size = write_manifest(folder, identity.sha256, number)
        layout.commit_of_run(identity.run_id, folder, target)
    return Committed(**counts, bytes=size)


def write_routing(
    path: Path, segment: TokenisedSegment, routing: RoutingBuffer, rollups: RollupCounter, vocabulary_key: str
) -> int:
    """Write the routing table, sorted by layer, token_id and rank, and count it; row groups never span layers.

    While a layer is written, other threads rank the next one and count those before.
    """
    arrow, of_tokens = _routing_arrow(), _RoutedTokens(segment, vocabulary_key)
    rows = 0
    counting: deque[Future[None]] = deque()
    with (
        one_blas_thread(),
        ThreadPoolExecutor(_THREADS) as workers,
        pq.ParquetWriter(path, arrow, **_routing_options()) as writer,
    ):
        for layer, ranked in routing.layers(workers):
            counting.append(rollups.add(layer, ranked, workers))
            ids_TK, weights_TK = _routed(ranked.expert_ids_TK, ranked), ranked.weights_TK
            T, K = ids_TK.shape
            columns = {
                **of_tokens.columns(ranked.routed_T, K),
                "layer": np.full(T * K, layer, np.int32),
                "rank": np.tile(np.arange(K, dtype=np.int32), T) if ranked.ordered else pa.nulls(T * K),
                "expert": ids_TK.ravel(),
                "weight": pa.nulls(T * K) if weights_TK is None else _routed(weights_TK, ranked).ravel(),
            }
            writer.write_table(pa.table(columns, schema=arrow), row_group_size=ROW_GROUP_ROWS)
            rows += T * K
            while len(counting) > _THREADS:
                counting.popleft().result()
        for counted in counting:
            counted.result()
    for layer, tokens_E in routing.counts.items():
        rollups.add_load(layer, tokens_E)
    return rows


class _RoutedTokens:
    """The columns of routing that a token's rows share, made once for all layers where every token is routed."""

    def __init__(self, segment: TokenisedSegment, vocabulary_key: str) -> None:
        domain_P = segment.prompts.column("domain").combine_chunks().dictionary_encode()
        domain_T = domain_P.indices.take(pa.array(segment.prompt_T - segment.first_prompt))
        self._columns_T = {
            "token_id": pa.array(segment.token_id_T),
            "vocab_id": segment.entry_T,
            "kind": _kinds(segment).cast(_LABELS),
            "domain": pa.DictionaryArray.from_arrays(domain_T, domain_P.dictionary),
            "prompt_id": pa.array(segment.prompt_T),
            "vocabulary_key": pa.DictionaryArray.from_arrays(np.zeros(len(domain_T), np.int32), [vocabulary_key]),
        }
        self._whole: dict[int, dict[str, pa.Array]] = {}

    def columns(self, routed_T: npt.NDArray[np.bool_], K: int) -> dict[str, pa.Array]:
        """Return the columns of the tokens routed at a layer, each value K times."""
        if not routed_T.all():
            return self._repeated(np.flatnonzero(routed_T), K)
        if K not in self._whole:
            self._whole[K] = self._repeated(np.arange(len(routed_T)), K)
        return self._whole[K]

    def _repeated(self, index_T: npt.NDArray[np.int64], K: int) -> dict[str, pa.Array]:
        repeated = pa.array(np.repeat(index_T, K))
        return {name: column.take(repeated) for name, column in self._columns_T.items()}


def _routed(array_TK: npt.NDArray[_Number], ranked: Ranked) -> npt.NDArray[_Number]:
    """Return the rows of the routed tokens, without a copy if all are routed."""
    return array_TK if ranked.routed_T.all() else array_TK[ranked.routed_T]


def _routing_arrow() -> pa.Schema:
    """Return the schema for the writer: texts as dictionary indices, so that it need not hash every row."""
    fields = list(schema.ROUTING.arrow())
    return pa.schema([field.with_type(_LABELS) if field.type == pa.string() else field for field in fields])


def _routing_options() -> dict[str, Any]:
    """Return the writer's options for the routing table: those of any table, plus tuning for its many short rows."""
    return parquet_options(schema.ROUTING) | {
        "store_schema": False,  # the file holds plain strings, although the writer gets dictionaries
        "write_batch_size": _BATCH_ROWS,
        # Every row group has every kind and one key, so their minimum and maximum would exclude nothing.
        "write_statistics": [c.name for c in schema.ROUTING.stored if c.name not in ("kind", "vocabulary_key")],
    }


def _write_opt_in(
    folder: Path, segment: TokenisedSegment, routing: RoutingBuffer, vectors: VectorBuffer, rollups: RollupCounter
) -> None:
    for table in vectors.tables:
        if table is schema.EXPERT_OUTPUTS:
            with ThreadPoolExecutor(_THREADS) as workers:
                write_expert_outputs(folder, segment, routing, rollups.groups, workers)
        else:
            _write_vectors(folder, table, segment, vectors)


def _write_vectors(folder: Path, table: Table, segment: TokenisedSegment, vectors: VectorBuffer) -> None:
    """Write an opt-in table, sorted by layer and token_id, some tokens at a time."""
    token_id_T = segment.token_id_T
    with pq.ParquetWriter(folder / table.file, table.arrow(), **parquet_options(table)) as writer:
        for layer, array, token_indices in vectors.of(table):
            width = array.shape[1]
            at_once = max(1, _VECTOR_NUMBERS // width)
            for start in range(0, len(token_indices), at_once):
                part = token_indices[start : start + at_once]
                offsets = pa.array(np.arange(0, (len(part) + 1) * width, width, dtype=np.int32))
                lists = pa.ListArray.from_arrays(offsets, pa.array(array[part].reshape(-1)))
                columns = [pa.array(token_id_T[part]), pa.array(np.full(len(part), layer, np.int32)), lists]
                writer.write_table(pa.table(columns, schema=table.arrow()))


def _prompt_columns(segment: TokenisedSegment, routing: RoutingBuffer) -> dict[str, Any]:
    status_P = list(segment.status_P)
    failed = routing.failed_prompts.union(
        *(segment.prompt_T[token_indices].tolist() for token_indices in routing.invalid().values())
    )
    for prompt in failed:
        status_P[prompt - segment.first_prompt] = "failed"
    columns = {name: segment.prompts.column(name) for name in ("domain", "source", "metadata")}
    prompt_id_P = np.arange(segment.first_prompt, segment.first_prompt + len(status_P), dtype=np.int64)
    return {
        **columns,
        "text": segment.text_P,
        "prompt_id": prompt_id_P,
        "num_tokens": segment.num_tokens_P,
        "status": status_P,
    }


def _prompts_sha256(segment: TokenisedSegment) -> str:
    digest = PromptDigest()
    for batch in segment.prompts.to_batches():
        digest.update(batch)
    return digest.hexdigest()


def _token_columns(segment: TokenisedSegment, texts: Texts) -> dict[str, Any]:
    return {
        "token_id": segment.token_id_T,
        "prompt_id": segment.prompt_T,
        "position": segment.position_T,
        "context": segment.context_T,
        "vocab_id": segment.entry_T,
        "token": segment.texts(texts),
        "kind": _kinds(segment).cast(pa.string()),
    }


def _kinds(segment: TokenisedSegment) -> pa.DictionaryArray:
    """Return tokens.kind [T], as an index into KINDS."""
    return pa.DictionaryArray.from_arrays(pa.array(segment.kind_T), list(KINDS))
