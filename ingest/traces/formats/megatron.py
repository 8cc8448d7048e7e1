"""Megatron-Core's router trace: `router_trace_rankN.jsonl`, one line per step, block and layer.

Ids are in ascending order, so ranks are unknown; there are no weights and no token ids. A sequence is one forward pass
of a process: the lines of all its MoE layers, in order of their number, from 0 or from 1. A step of several
microbatches has several. Lines of the block `mtp` (layers that predict further ahead) are left out. Processes that hold
part of the layers (pipeline parallelism) cannot be combined: nothing shows which of their tokens are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moewh.ingest.traces.arrays import as_array
from moewh.ingest.traces.documents import read_documents
from moewh.ingest.traces.trace import Array, Sequence, TraceFile, TraceModel, each_rank

_Pass = dict[int, Array]
"""Layer, as numbered in the trace → [T, K]."""


def _read(file: TraceFile, model: TraceModel) -> Iterator[Sequence]:
    step: int | None = None
    passes: list[_Pass] = []
    for where, line in read_documents(file, ("top_indices",)):
        if line.get("block", "decoder") != "decoder":
            continue
        number, layer = (_whole(line, name, where, file) for name in ("step", "layer"))
        if number != step:
            yield from _sequences(step, passes, file, model)
            step, passes = number, []
        current = next((found for found in passes if layer not in found), None)
        if current is None:
            passes.append(current := {})
        current[layer] = _indices(line, where, file)
    if step is None:
        raise file.error("has no line of the block decoder.")
    yield from _sequences(step, passes, file, model)


def _sequences(step: int | None, passes: list[_Pass], file: TraceFile, model: TraceModel) -> Iterator[Sequence]:
    for index, found in enumerate(passes):
        where = f"{file.name}, step {step}, pass {index}"
        layers = model.numbered(found, where)
        lengths = {found[layer].shape for layer in layers}
        if len(lengths) > 1:
            raise file.error(f"step {step}, pass {index}: its layers have routing of shapes {sorted(lengths)}.")
        ids_RLK = np.stack([found[layer] for layer in layers], axis=1)
        metadata = {"step": step, "pass": index, "boundaries": "unknown"}
        yield Sequence(where, ids_RLK, source=file.path.name, metadata=metadata)


def _indices(line: dict[str, Any], where: str, file: TraceFile) -> Array:
    ids_TK = as_array(line.get("top_indices"), f"{where}: its top_indices", file.most_values, 2)
    if ids_TK.dtype.kind not in "iu":
        raise file.error(f"{where}: its top_indices are {ids_TK.dtype}, not whole numbers of 64 bits.")
    if ids_TK.shape != (line.get("num_tokens"), line.get("topk")):
        raise file.error(
            f"{where}: its top_indices have shape {ids_TK.shape}, and it says {line.get('num_tokens')} tokens with "
            f"{line.get('topk')} experts."
        )
    return ids_TK.astype(np.int64)


def _whole(line: dict[str, Any], name: str, where: str, file: TraceFile) -> int:
    value = line.get(name)
    if type(value) is not int:
        raise file.error(f"{where}: its {name} is {value!r}, not a whole number. It is not a line of a router trace.")
    return value


FORMAT = each_rank(_read)
