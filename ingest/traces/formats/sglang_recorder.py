"""SGLang's expert distribution recorder in the mode `per_token`: `.pt` dumps, one per process.

A record is one forward pass: `topk_ids_of_layer` [L, T, 8] with physical ids, -1 where there is none; the same file
holds the map from physical to logical ids. A prefill pass is cut into its sequences by `extend_seq_lens`; nothing links
the tokens of a decoding pass to their requests, so each is a separate context. Positions are those within the pass. The
order within a row means nothing. Under tensor parallelism without data-parallel attention, every process records the
same tokens: import one file only (two are refused).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moewh.ingest.routing import NO_ROUTE
from moewh.ingest.traces.arrays import as_array, load_torch
from moewh.ingest.traces.check import as_ids
from moewh.ingest.traces.trace import Array, Sequence, TraceFile, TraceModel, each_rank

_SLOTS = 8
"""Most experts per token in the recorder."""


def _read(file: TraceFile, model: TraceModel) -> Iterator[Sequence]:
    if model.top_k > _SLOTS:
        raise file.error(f"SGLang records {_SLOTS} experts per token, and {model.name} has {model.top_k}.")
    dump = load_torch(file)
    if not isinstance(dump, dict) or not isinstance(dump.get("records"), list):
        raise file.error("has no records: it is not a per_token dump. For the mode stat, import sglang-stat.")
    logical = dump.get("last_physical_to_logical_map")
    logical_LP = None if logical is None else as_array(logical, f"{file.name}, its map", file.most_values, 2)
    for number, record in enumerate(dump["records"]):
        where = f"{file.name}, record {number}"
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise file.error(f"record {number} has no topk_ids_of_layer: record with the mode per_token.")
        yield from _pass(where, record, logical_LP, file, model)


def _pass(
    where: str, record: dict[str, Any], logical_LP: Array | None, file: TraceFile, model: TraceModel
) -> Iterator[Sequence]:
    ids_LTK = as_array(record["topk_ids_of_layer"], where, file.most_values, 3)
    if ids_LTK.shape[2] < model.top_k or ids_LTK.dtype.kind != "i":
        raise file.error(f"{where}: its topk_ids_of_layer has shape {ids_LTK.shape}, not [layers, tokens, {_SLOTS}].")
    vocab_ids_T = as_ids(record.get("input_ids"), where)
    if len(vocab_ids_T) > ids_LTK.shape[1] or (ids_LTK[:, len(vocab_ids_T) :] >= 0).any():
        raise file.error(f"{where}: has {len(vocab_ids_T)} input_ids for routing of {ids_LTK.shape[1]} tokens.")
    most = 0 if logical_LP is None else logical_LP.shape[1]
    beyond_LTK = ids_LTK[:, :, model.top_k :]
    if ((beyond_LTK >= 0) & (beyond_LTK < most)).any():  # a fused shared expert has an id behind the routed ones
        raise file.error(
            f"{where}: has more than {model.top_k} experts per token, those of {model.name}. Check --model."
        )
    ids_LTK = ids_LTK[:, : len(vocab_ids_T), : model.top_k]
    ids_RLK = np.ascontiguousarray(_logical(ids_LTK, logical_LP, where, file).transpose(1, 0, 2))
    about = {"forward_pass_id": record.get("forward_pass_id"), "rank": record.get("rank")}
    if not len(ids_RLK):
        return  # a process without tokens takes part in every pass of the others
    given = record.get("extend_seq_lens")
    lengths = [] if given is None else as_ids(given, where, "extend_seq_lens").tolist()
    if not lengths:
        metadata = {**about, "pass": "decode"}
        own = np.arange(len(ids_RLK), dtype=np.int32)
        yield Sequence(where, ids_RLK, vocab_ids_T=vocab_ids_T, context_T=own, source=file.path.name, metadata=metadata)
        return
    if sum(lengths) != len(ids_RLK) or min(lengths) < 1:
        raise file.error(f"{where}: its extend_seq_lens are {lengths}, for {len(ids_RLK)} tokens.")
    positions = as_ids(record.get("positions"), where, "positions")
    start = 0
    for index, length in enumerate(lengths):
        part = slice(start, start + length)
        metadata = {
            **about,
            "pass": "prefill",
            "first_position": int(positions[start]) if start < len(positions) else None,
        }
        yield Sequence(
            f"{where}, sequence {index}",
            ids_RLK[part],
            vocab_ids_T=vocab_ids_T[part],
            source=file.path.name,
            metadata=metadata,
        )
        start += length


def _logical(ids_LTK: Array, logical_LP: Array | None, where: str, file: TraceFile) -> Array:
    """Return logical ids: the expert that each physical one is a copy of."""
    if logical_LP is None:
        raise file.error(f"{where}: the file has no last_physical_to_logical_map, and its ids are physical.")
    if logical_LP.ndim != 2 or len(logical_LP) != len(ids_LTK) or logical_LP.dtype.kind != "i":
        raise file.error(f"{where}: the file's map has shape {logical_LP.shape}, and there are {len(ids_LTK)} layers.")
    most = logical_LP.shape[1]
    if ids_LTK.size and int(ids_LTK.max()) >= most:
        raise file.error(f"{where}: has the physical expert {ids_LTK.max()}, and its map has {most}.")
    mapped = np.take_along_axis(logical_LP, np.maximum(ids_LTK, 0).reshape(len(ids_LTK), -1).astype(np.int64), axis=1)
    return np.where(ids_LTK >= 0, mapped.reshape(ids_LTK.shape), NO_ROUTE)


FORMAT = each_rank(_read)
