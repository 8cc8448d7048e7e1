"""A model's checkpoint, of which one layer's router and experts are in memory at a time.

In: a hub id, a folder or the demo. Out: the model on the meta device, and its MoE layers, each filled with its
numbers while it is looked at. Which tensors of the files become which parameter, and how (experts stored one by one
are fused, some are transposed, MXFP4 and FP8 are turned into floats), is transformers' own business: its conversion
runs here on the tensors of one layer.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from ingest.architecture import empty_model
from ingest.blocks import Site
from ingest.model import Source, load_failure
from ingest.sites import find_sites
from warehouse.errors import MoewhError

NO_SAFETENSORS = "{title} has no safetensors weights, and `moewh geometry` reads no others. Convert the model first."
Place = tuple[str, str]
"""A stored tensor: its key, and the file that it is in."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DEQUANTIZED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Ways to store weights in fewer bits that transformers can undo without a GPU."""


class Checkpoint:
    """A model without numbers, and the files that hold them.

    Raises MoewhError for a model that moewh cannot record, and for weights that it cannot read.
    """

    def __init__(self, source: Source, config: Any, revision: str | None, trust_remote_code: bool = False) -> None:
        self.title = source.title
        self._quantizer, config = _quantizer(source.title, config)
        try:
            files = _files(source, config, revision)
            self.model: Any = empty_model(config, trust_remote_code)
            if self._quantizer is not None:
                self._quantizer.preprocess_model(model=self.model, dtype=config.dtype, checkpoint_files=files)
            self._stored = self._places(files)
        except (OSError, ValueError, KeyError, ImportError, TypeError, RuntimeError, SafetensorError) as error:
            raise MoewhError(load_failure(source.title, error)) from error
        self.sites = find_sites(self.model, self.model.config).sites

    @contextmanager
    def layer(self, site: Site) -> Iterator[None]:
        """Fill a layer's router and experts with their numbers; afterwards they are empty again.

        Raises MoewhError if the files lack any of them.
        """
        wanted = _parameters(self.model, site)
        try:
            failures = self._load({name: self._stored[name] for name in wanted if name in self._stored})
            for name in wanted:
                if self.model.get_parameter(name).is_meta:
                    reason = failures.get(name) or "the checkpoint holds nothing of it, or of another shape"
                    raise MoewhError(f"{self.title}: {name} cannot be read: {reason}. Check the model's files.")
            yield
        finally:
            site.whole_layer.to("meta")

    def bytes_of(self, site: Site) -> int:
        """Bytes that a layer's router and experts take in the files."""
        total = 0
        for name in _parameters(self.model, site):
            for key, file in self._stored.get(name, []):
                with safe_open(file, framework="pt") as opened:
                    part = opened.get_slice(key)
                    total += torch.Size(part.get_shape()).numel() * _bits(part.get_dtype()) // 8
        return total

    def _places(self, files: list[str]) -> dict[str, list[Place]]:
        """Which tensors, as (key, file), each parameter is made of; in the order in which transformers takes them."""
        keys: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                keys |= dict.fromkeys(opened.keys(), file)
        mapping = self._mapping()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        known, prefix = self.model.state_dict(), self.model.base_model_prefix
        stored: dict[str, list[Place]] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, _ = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:  # as transformers does: it was in its final form already
                name, _ = rename_source_key(key, [], [], prefix, known)
            stored.setdefault(name, []).append((key, keys[key]))
        return stored

    def _mapping(self) -> list[Any]:
        """The conversion from the files' tensors to the model's parameters; it keeps state, so each use has its own."""
        return list(get_model_conversion_mapping(self.model, hf_quantizer=self._quantizer))

    def _load(self, stored: dict[str, list[Place]]) -> dict[str, str]:
        """Convert the tensors of some parameters; return what went wrong, by the parameter's name."""
        with ExitStack() as opened:
            files = {
                file: opened.enter_context(safe_open(file, framework="pt"))
                for file in {file for places in stored.values() for _, file in places}
            }
            slices: dict[str, Any] = {}
            for name, places in stored.items():
                slices |= {key: files[file].get_slice(key) for key, file in places}
                _take_dtype(self.model, name, slices[places[0][0]].get_dtype())
            config = LoadStateDictConfig(weight_mapping=self._mapping(), hf_quantizer=self._quantizer)
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        return {name: " ".join(str(error).split())[:200] for name, error in info.conversion_errors.items()}


def _parameters(model: nn.Module, site: Site) -> list[str]:
    """Names of the parameters of a layer's experts and router."""
    modules = (site.experts, site.router) if site.router is not None else (site.experts,)
    of_layer = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in of_layer]


def _take_dtype(model: nn.Module, name: str, stored: str) -> None:
    """Let an empty parameter have the dtype of what is stored, so that nothing is rounded; 8-bit floats become 32."""
    dtype = _FLOATS.get(stored) or (torch.float32 if stored.startswith("F8") else None)
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if dtype is not None and (parameter := module._parameters.get(last)) is not None:
        module._parameters[last] = nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False)


def _quantizer(title: str, config: Any) -> tuple[Any, Any]:
    """Return what turns quantised weights into floats, and the configuration it leaves; None for weights as they are.

    Raises MoewhError for a way to quantise that is not undone here.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None, config
    method = str(stored["quant_method"] if isinstance(stored, dict) else stored.quant_method.value)
    if method not in _DEQUANTIZED:
        raise MoewhError(
            f"{title}: its weights are quantised ({method}). `moewh geometry` reads weights as they are, "
            f"{' and '.join(_DEQUANTIZED)}: give the model that it was made from."
        )
    if importlib.util.find_spec("accelerate") is None:
        raise MoewhError(f"{title}: weights in {method} need accelerate. Install it: pip install 'moewh[accelerate]'.")
    quantizer, config, _ = get_hf_quantizer(
        copy.deepcopy(config), _DEQUANTIZED[method](dequantize=True), None, True, {}
    )
    return quantizer, config


def _files(source: Source, config: Any, revision: str | None) -> list[str]:
    """Return the paths of a model's safetensors files, downloaded if need be. Raises MoewhError if there are none."""
    single = getattr(config, "transformers_weights", None) or SAFE_WEIGHTS_NAME
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if not single.endswith(".index.json") and (file := cached_file(source.location, single, **optional)):
        return [file]
    index = single if single.endswith(".index.json") else SAFE_WEIGHTS_INDEX_NAME
    if found := cached_file(source.location, index, **optional):
        shards, _ = get_checkpoint_shard_files(source.location, found, revision=revision)
        return list(shards)
    raise MoewhError(NO_SAFETENSORS.format(title=source.title))


def _bits(dtype: str) -> int:
    """Bits of one number of a safetensors dtype, such as 16 of BF16."""
    digits = "".join(char for char in dtype.partition("_")[0] if char.isdigit())
    return int(digits) if digits else 8
