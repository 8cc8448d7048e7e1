"""TensorRT-LLM's expert statistics (EXPERT_STATISTIC_PATH): only counts.

Give the folder, or its `rankN.safetensors`: keys `<iteration>_<layer>` with the tokens of each expert. `meta_info.json`
beside them states E and K, which must be the model's. Files of ranks are added up; `rankN_raw.safetensors` are left
out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
from safetensors import SafetensorError, safe_open

from moewh.ingest.traces.arrays import sibling
from moewh.ingest.traces.trace import Counts, Format, TraceFile, TraceModel
from moewh.warehouse.errors import short_message

_RANK = re.compile(r"rank\d+\.safetensors")
_WHOLE = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
"""Dtypes of whole numbers, as safetensors names them; numpy has not all of the others."""
_KEY = re.compile(r"(\d+)_(\d{1,5})")


def _read(files: list[TraceFile], model: TraceModel) -> Iterator[Counts]:
    ranks = [file for file in files if _RANK.fullmatch(file.path.name)]
    if not ranks:
        raise files[0].error("give the folder of statistics, or its files rankN.safetensors.")
    for file in ranks:
        _require_model(file, model)
        yield _counts(file, model)


def _require_model(file: TraceFile, model: TraceModel) -> None:
    """Raise the file's error if its meta_info.json belongs to another model."""
    try:
        meta = json.loads(sibling(file, "meta_info.json").read_bytes())
        stated = (meta["num_experts"], meta["num_experts_per_token"])
    except (ValueError, TypeError, LookupError, RecursionError):
        raise file.error("its meta_info.json does not state num_experts and num_experts_per_token.") from None
    if stated != (int(model.experts_L.max()), model.top_k):
        raise file.error(
            f"is of a model with {stated[0]} experts, {stated[1]} per token; {model.name} has {model.experts_L.max()}, "
            f"{model.top_k} per token. Check --model."
        )


def _counts(file: TraceFile, model: TraceModel) -> Counts:
    counts_LE = np.zeros((model.num_hidden_layers, int(model.experts_L.max())))
    iterations = set()
    try:
        with safe_open(file.path, "np") as tensors:
            for name in sorted(tensors.keys()):
                key = _KEY.fullmatch(name)
                shape = tuple(tensors.get_slice(name).get_shape())
                if key is None or shape != counts_LE.shape[1:] or int(key[2]) >= len(counts_LE):
                    raise file.error(f"has {name} of shape {list(shape)}, not that of a layer of {model.name}.")
                dtype = tensors.get_slice(name).get_dtype()
                if dtype not in _WHOLE or ((tokens_E := tensors.get_tensor(name)) < 0).any():
                    raise file.error(f"{name} is {dtype}, or has less than 0 tokens: it has no counts.")
                counts_LE[int(key[2])] += tokens_E
                iterations.add(int(key[1]))
    except (SafetensorError, OSError) as error:
        raise file.error(f"cannot be read as safetensors: {short_message(error)}.") from error
    return Counts(file.name, counts_LE, file.path.name, {"iterations": len(iterations)})


FORMAT = Format(read_counts=_read)
