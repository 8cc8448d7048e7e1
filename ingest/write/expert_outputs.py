"""The opt-in table `expert_outputs` and its rollup, sorted as routing is.

In: a segment's routing, and per layer the numbers that `moewh.ingest.capture.expert_outputs` measured, in slot order.
Out: one row per row of routing, and their sums by kind, domain, layer and expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.ingest.routing import Ranked, RoutingBuffer, TokenisedSegment
from moewh.ingest.write.rollups import TokenGroups, to_arrow
from moewh.warehouse.files import schema
from moewh.warehouse.files.tables import ROW_GROUP_ROWS, parquet_options, write_chunks

Floats = npt.NDArray[np.float32]


def write_expert_outputs(
    folder: Path, segment: TokenisedSegment, routing: RoutingBuffer, groups: TokenGroups, workers: Executor
) -> None:
    """Write both files of a segment; row groups of the table never span layers."""
    table, chunks = schema.EXPERT_OUTPUTS, []
    with pq.ParquetWriter(folder / table.file, table.arrow(), **parquet_options(table)) as writer:
        for layer, ranked, norm_TK, cosine_TK in _layers(routing, workers):
            rows = _rows(segment, layer, ranked, norm_TK, cosine_TK)
            writer.write_table(pa.table(rows, schema=table.arrow()), row_group_size=ROW_GROUP_ROWS)
            chunks += [((group, layer), columns) for group, columns in _sums(groups, ranked, norm_TK, cosine_TK)]
    counts = schema.EXPERT_OUTPUT_COUNTS
    chunks.sort(key=lambda chunk: chunk[0])
    made = (to_arrow(counts, {**groups.label(group), "layer": layer, **sums}) for (group, layer), sums in chunks)
    write_chunks(folder / counts.file, counts, made)


def _layers(routing: RoutingBuffer, workers: Executor) -> Iterator[tuple[int, Ranked, Floats, Floats]]:
    """Yield each layer's rows in rank order, with the norms [T, K] and cosines [T, K] of the same choices."""
    assert routing.vectors is not None
    measured = routing.vectors.of(schema.EXPERT_OUTPUTS)
    for (layer, ranked), (_, both_T2K, _) in zip(routing.layers(workers), measured, strict=True):
        K = ranked.expert_ids_TK.shape[1]
        # An expert's output depends only on the token, so sorting both by expert aligns them.
        slot_TK, rank_TK = (np.argsort(ids, axis=1) for ids in (routing.chosen(layer), ranked.expert_ids_TK))
        norm_TK, cosine_TK = (np.empty((len(both_T2K), K), np.float32) for _ in range(2))
        for ordered_TK, as_chosen_TK in ((norm_TK, both_T2K[:, :K]), (cosine_TK, both_T2K[:, K:])):
            np.put_along_axis(ordered_TK, rank_TK, np.take_along_axis(as_chosen_TK, slot_TK, axis=1), axis=1)
        yield layer, ranked, norm_TK, cosine_TK


def _rows(segment: TokenisedSegment, layer: int, ranked: Ranked, norm_TK: Floats, cosine_TK: Floats) -> dict[str, Any]:
    routed_T = ranked.routed_T
    T, K = int(routed_T.sum()), norm_TK.shape[1]
    return {
        "token_id": np.repeat(segment.token_id_T[routed_T], K),
        "layer": np.full(T * K, layer, np.int32),
        "rank": np.tile(np.arange(K, dtype=np.int32), T),
        "expert": ranked.expert_ids_TK[routed_T].ravel(),
        "norm": _nan_as_null(norm_TK[routed_T].ravel()),
        "cosine": _nan_as_null(cosine_TK[routed_T].ravel()),
    }


def _nan_as_null(values: npt.NDArray[Any]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def _sums(
    groups: TokenGroups, ranked: Ranked, norm_TK: Floats, cosine_TK: Floats
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rollup's columns for each group of tokens, by expert; sums add in row order."""
    assert ranked.weights_TK is not None
    for group, part in groups.slices():
        rows = groups.order_T[part]
        rows = rows[ranked.routed_T[rows]]
        known = ~np.isnan(norm_TK[rows])
        expert = ranked.expert_ids_TK[rows][known]
        weight, norm, cosine = (
            array[rows][known].astype(np.float64) for array in (ranked.weights_TK, norm_TK, cosine_TK)
        )
        choices_E = np.bincount(expert)
        E, chosen = len(choices_E), np.flatnonzero(choices_E)
        max_E = np.zeros(E, np.float64)
        np.maximum.at(max_E, expert, norm)
        lies = ~np.isnan(cosine)
        cosines_E = np.bincount(expert[lies], minlength=E)
        cosine_sum_E = np.bincount(expert[lies], cosine[lies], minlength=E)
        yield (
            group,
            {
                "expert": chosen,
                "choices": choices_E[chosen],
                "norm_sum": np.bincount(expert, norm, minlength=E)[chosen],
                "weighted_norm_sum": np.bincount(expert, weight * norm, minlength=E)[chosen],
                "squared_norm_sum": np.bincount(expert, norm * norm, minlength=E)[chosen],
                "max_norm": max_E[chosen],
                "cosines": cosines_E[chosen],
                "cosine_sum": pa.array(cosine_sum_E[chosen], mask=cosines_E[chosen] == 0),
            },
        )
