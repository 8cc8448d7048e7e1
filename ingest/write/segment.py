"""The segment writer: one segment's tokens and routing as sorted, checksummed Parquet, committed at once.

Nothing in a segment depends on the clock or the host, so equal inputs give byte-identical files.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.ingest.prompts.digest import PromptDigest
from moewh.ingest.record import Identity
from moewh.ingest.routing import KINDS, RoutingBuffer, Texts, TokenisedSegment, VectorBuffer
from moewh.ingest.write.rollups import RollupCounter, one_thread_a_product
from moewh.ingest.write.tables import ROW_GROUP_ROWS, parquet_options, write_table
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout, commit
from moewh.warehouse.files.manifest import write_manifest
from moewh.warehouse.files.schema import Table

_VECTOR_NUMBERS = 1 << 22
"""Numbers of an opt-in table in one row group."""
_THREADS = min(4, os.cpu_count() or 1)
"""Threads that rank and count a segment's layers, beside the one that writes its rows."""


@dataclass(frozen=True)
class Committed:
    """What a committed segment holds."""

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
    """Write all tables of one segment of a run and commit them with one rename.

    `texts` gives the text of vocabulary entries; `last` says that no segment follows. Losing a race for the segment to
    another process is success. Raises MoewhError if the disk refuses.
    """
    target = layout.segment(identity.run_id, number)
    with layout.writing(), layout.staged(f"{target.parent.name}.{target.name}") as folder:
        rollups = RollupCounter(segment, texts)
        rows = write_routing(folder / schema.ROUTING.file, segment, routing, rollups)
        rollups.write(folder, parquet_options)
        if routing.vectors is not None:
            for opt_in in routing.vectors.tables:
                _write_vectors(folder, opt_in, segment, routing.vectors)
        write_table(folder, schema.PROMPTS, _prompt_columns(segment, routing))
        write_table(folder, schema.TOKENS, _token_columns(segment, texts))
        counts = {"prompts": len(segment.status_P), "tokens": len(segment.vocab_id_T), "routing_rows": rows}
        summary = {**counts, "prompts_sha256": _prompts_sha256(segment), "last": last}
        write_table(folder, schema.SEGMENTS, {name: [value] for name, value in summary.items()})
        size = write_manifest(folder, identity.sha256, number)
        commit(folder, target)
    return Committed(**counts, bytes=size)


def write_routing(path: Path, segment: TokenisedSegment, routing: RoutingBuffer, rollups: RollupCounter) -> int:
    """Write the routing table sorted by layer, token_id, rank, and count it; row groups never span layers.

    While a layer is written, other threads rank the next one and count those before.
    """
    table = schema.ROUTING
    token_id_T = segment.token_id_T
    rows = 0
    counting: deque[Future[None]] = deque()
    with (
        one_thread_a_product(),
        ThreadPoolExecutor(_THREADS) as workers,
        pq.ParquetWriter(path, table.arrow(), **parquet_options(table)) as writer,
    ):
        for layer, ranked in routing.layers(workers):
            counting.append(rollups.add(layer, ranked, workers))
            ids_TK, weights_TK = ranked.expert_ids_TK[ranked.routed_T], ranked.weights_TK
            T, K = ids_TK.shape
            columns = {
                "token_id": np.repeat(token_id_T[ranked.routed_T], K),
                "layer": np.full(T * K, layer, np.int32),
                "rank": np.tile(np.arange(K, dtype=np.int32), T) if ranked.ordered else pa.nulls(T * K),
                "expert": ids_TK.ravel(),
                "weight": pa.nulls(T * K) if weights_TK is None else weights_TK[ranked.routed_T].ravel(),
            }
            writer.write_table(pa.table(columns, schema=table.arrow()), row_group_size=ROW_GROUP_ROWS)
            rows += T * K
            while len(counting) > _THREADS:
                counting.popleft().result()
        for counted in counting:
            counted.result()
    for layer, tokens_E in routing.counts.items():
        rollups.add_load(layer, tokens_E)
    return rows


def _write_vectors(folder: Path, table: Table, segment: TokenisedSegment, vectors: VectorBuffer) -> None:
    """Write an opt-in table sorted by layer and token_id, some tokens at a time."""
    token_id_T = segment.token_id_T
    with pq.ParquetWriter(folder / table.file, table.arrow(), **parquet_options(table)) as writer:
        for layer, array, places in vectors.of(table):
            width = array.shape[1]
            at_once = max(1, _VECTOR_NUMBERS // width)
            for start in range(0, len(places), at_once):
                part = places[start : start + at_once]
                offsets = pa.array(np.arange(0, (len(part) + 1) * width, width, dtype=np.int32))
                lists = pa.ListArray.from_arrays(offsets, pa.array(array[part].reshape(-1)))
                columns = [pa.array(token_id_T[part]), pa.array(np.full(len(part), layer, np.int32)), lists]
                writer.write_table(pa.table(columns, schema=table.arrow()))


def _prompt_columns(segment: TokenisedSegment, routing: RoutingBuffer) -> dict[str, Any]:
    status_P = list(segment.status_P)
    failed = routing.failed_prompts.union(*(segment.prompt_T[places].tolist() for places in routing.invalid().values()))
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
    kinds = pa.DictionaryArray.from_arrays(pa.array(segment.kind_T), list(KINDS))
    return {
        "token_id": segment.token_id_T,
        "prompt_id": segment.prompt_T,
        "position": segment.position_T,
        "context": segment.context_T,
        "vocab_id": segment.entry_T,
        "token": segment.texts(texts),
        "kind": kinds.cast(pa.string()),
    }
