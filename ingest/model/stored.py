"""The tensors in a model's files, read from their headers, and the parameter of the model that each goes to.

In: a hub id or folder. Out: the files' paths, the key, shape and dtype of every stored tensor, and the tensors that
each parameter is made of. No tensor data is read. A fault in a file or index is a one-line error that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from moewh.ingest.model.repository import FETCH_LFS, is_lfs_pointer
from moewh.warehouse.errors import MoewhError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
"""Torch dtypes by their names in safetensors."""


class StoredTensor(NamedTuple):
    """One tensor of a file, as its header describes it."""

    key: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    """The name in safetensors, such as BF16."""


@dataclass(frozen=True)
class Part:
    """One of the stored tensors that a parameter is made of."""

    tensor: StoredTensor
    pattern: str | None
    """Source pattern of the converter that takes it; None for a tensor used unchanged."""


@dataclass(frozen=True)
class Sources:
    """The stored tensors, by the parameter that they go to."""

    parts: dict[str, list[Part]]
    """By parameter name, in the order in which transformers takes them. Includes names that no parameter has."""
    converters: dict[str, WeightConverter]
    """The converter of each source pattern."""

    def made(self) -> set[str]:
        """Return the names of all parameters that have stored tensors."""
        return set().union(*map(self.made_of, self.parts))

    def made_of(self, name: str) -> set[str]:
        """Return the parameters that the tensors of `name` are converted to: a converter may make several."""
        names = {name}
        for pattern in {part.pattern for part in self.parts[name] if part.pattern is not None}:
            first, *others = self.converters[pattern].target_patterns
            names |= {name.replace(first, other) for other in others}
        return names


def first_names(names: list[str], separator: str = ", ") -> str:
    """Return up to three names, and how many more there are, as text."""
    return separator.join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def weight_files(location: str, config: Any, revision: str | None, *, pickled: bool = False) -> list[str]:
    """Return the paths of the weight files that transformers would choose for a model, downloading them if needed.

    With `pickled`, PyTorch's files are used where there are no others. Empty if there are none. Raises MoewhError for
    a wrong index, and OSError as transformers does.
    """
    named = getattr(config, "transformers_weights", None)
    singles = [named or SAFE_WEIGHTS_NAME, *([WEIGHTS_NAME] if pickled else [])]
    indexes = [SAFE_WEIGHTS_INDEX_NAME, *([WEIGHTS_INDEX_NAME] if pickled else [])]
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for single, index in zip(singles, indexes, strict=True):
        if not single.endswith(".index.json") and (file := cached_file(location, single, **optional)):
            return [file]
        index_name = single if single.endswith(".index.json") else index
        if found := cached_file(location, index_name, **optional):
            read_index(Path(found))
            shards, _ = get_checkpoint_shard_files(location, found, revision=revision)
            absent = [Path(shard).name for shard in shards if not Path(shard).is_file()]
            if absent:
                raise MoewhError(f"{found} lists {first_names(absent)}, which are not there. Fetch the missing files.")
            return list(shards)
    return []


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor by the index. Raises MoewhError for a file that is not an index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoewhError(f"{path} is not valid JSON ({error}). Fetch the index again.") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise MoewhError(f"{path} has no weight_map from tensors to files. Fetch the index again.")
    if not isinstance(index.get("metadata"), dict):
        raise MoewhError(f'{path} has no "metadata", which transformers reads. Fetch the index again.')
    return dict(files)


def stored_tensors(files: Iterable[str]) -> dict[str, StoredTensor]:
    """Return every tensor of some files by its key, without its data.

    Raises MoewhError for a damaged file, for a tensor in two files, and for one that the index places elsewhere.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _headers(file):
            if (other := tensors.get(tensor.key)) is not None:
                raise MoewhError(
                    f"{tensor.key} is in both {Path(other.file).name} and {Path(file).name}. Keep the files of one "
                    "checkpoint only."
                )
            tensors[tensor.key] = tensor
    _check_against_index(tensors)
    return tensors


def parameter_sources(model: Any, stored: Iterable[StoredTensor], quantizer: Any = None) -> Sources:
    """Find the parameter that each stored tensor goes to, by transformers' own rules for the model's family."""
    mapping = conversion(model, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    parts: dict[str, list[Part]] = {}
    for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.key)):
        name, pattern = rename_source_key(tensor.key, renamings, converters, prefix, known)
        if name not in known and tensor.key in known:  # as in transformers: it is in its final form already
            name, pattern = rename_source_key(tensor.key, [], [], prefix, known)
        parts.setdefault(name, []).append(Part(tensor, pattern))
    return Sources(parts, {pattern: entry for entry in converters for pattern in entry.source_patterns})


def conversion(model: Any, quantizer: Any) -> list[Any]:
    """Return the conversion from stored tensors to parameters. It keeps state, so each use needs its own."""
    return list(get_model_conversion_mapping(model, hf_quantizer=quantizer))


def _headers(file: str) -> list[StoredTensor]:
    if not file.endswith(".safetensors"):
        names = {dtype: name for name, dtype in DTYPES.items()}
        tensors = load_state_dict(file, map_location="meta")
        return [
            StoredTensor(key, file, tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
            for key, tensor in tensors.items()
        ]
    try:
        with safe_open(file, framework="pt") as opened:
            slices = [(key, opened.get_slice(key)) for key in opened.keys()]  # noqa: SIM118 - not a dict
            return [StoredTensor(key, file, tuple(part.get_shape()), part.get_dtype()) for key, part in slices]
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(Path(file)):
            raise MoewhError(f"cannot load the model: {FETCH_LFS.format(names=file)}") from error
        raise MoewhError(
            f"cannot load the model: {file} is damaged or was written only in part ({error}). Fetch that file again."
        ) from error


def _check_against_index(tensors: dict[str, StoredTensor]) -> None:
    """Raise MoewhError for a tensor in a different file from the one in the index beside it."""
    files = {file: Path(file) for file in {tensor.file for tensor in tensors.values()}}  # few, of many tensors
    names = {path.name for path in files.values()}
    for folder in {path.parent for path in files.values()}:
        path = folder / SAFE_WEIGHTS_INDEX_NAME
        if not path.is_file() or not names <= set((listed := read_index(path)).values()):
            continue  # these files belong to no index, or to another one
        for key, file in listed.items():
            if key in tensors and (found := files[tensors[key].file].name) != file:
                raise MoewhError(
                    f"{path} says that {key} is in {file}, but it is in {found}. The index does not belong to these "
                    "files: fetch both again."
                )
