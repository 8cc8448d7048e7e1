"""A model's checkpoint, loaded one layer's router and experts at a time.

In: a hub id, a folder or the demo. Out: the model on the meta device, and its MoE layers, each filled with its weights
while it is used. transformers decides which stored tensors become which parameter, and how (experts stored one by one
are fused, some are transposed, MXFP4 and FP8 are dequantised): its conversion runs here on the tensors of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moewh.ingest.families.rule import MoELayer
from moewh.ingest.model.architecture import DEQUANTIZED, dequantizer, empty_model, quantization_method
from moewh.ingest.model.layers import find_moe_layers
from moewh.ingest.model.loading import Source, explaining
from moewh.ingest.model.stored import DTYPES, StoredTensor, conversion, parameter_sources, stored_tensors, weight_files
from moewh.ingest.model.weights import check_sources
from moewh.warehouse.errors import MoewhError, short_message

NO_SAFETENSORS = "{title} has no safetensors weights, and `moewh geometry` reads no others. Convert the model first."


class Checkpoint:
    """A model without data, and the files that hold its weights.

    Raises MoewhError for a model that moewh cannot record, or weights that it cannot read.
    """

    def __init__(self, source: Source, config: Any, revision: str | None, trust_remote_code: bool = False) -> None:
        self.title = source.title
        with explaining(source.title):
            self._quantizer, config = _quantizer(source.title, config)
            files = weight_files(source.location, config, revision)
            if not files:
                raise MoewhError(NO_SAFETENSORS.format(title=source.title))
            self.model = self._empty(config, files, trust_remote_code)
            self._sources = parameter_sources(self.model, stored_tensors(files).values(), self._quantizer)
        self._stored = {name: [part.tensor for part in parts] for name, parts in self._sources.parts.items()}
        self.moe_layers = find_moe_layers(self.model, self.model.config).moe_layers

    def _empty(self, config: Any, files: list[str], trust_remote_code: bool) -> Any:
        model = empty_model(config, trust_remote_code)
        if self._quantizer is not None:
            self._quantizer.preprocess_model(model=model, dtype=config.dtype, checkpoint_files=files)
        return model

    @contextmanager
    def layer(self, moe: MoELayer) -> Iterator[None]:
        """Fill a layer's router and experts with their weights, and empty them again afterwards.

        Raises MoewhError if the files lack any of them.
        """
        wanted = _parameters(self.model, moe)
        check_sources(self.title, self.model, wanted, self._sources, self._quantizer)
        try:
            failures = self._load({name: self._stored[name] for name in wanted if name in self._stored})
            for name in wanted:
                if self.model.get_parameter(name).is_meta:
                    reason = failures.get(name) or "the checkpoint does not hold it, or holds it in another shape"
                    raise MoewhError(f"{self.title}: {name} cannot be read: {reason}. Check the model's files.")
            yield
        finally:
            moe.whole_layer.to("meta")

    def bytes_of(self, moe: MoELayer) -> int:
        """Return the bytes that a layer's router and experts take in the files."""
        tensors = [tensor for name in _parameters(self.model, moe) for tensor in self._stored.get(name, [])]
        return sum(math.prod(tensor.shape) * _bits(tensor.dtype) // 8 for tensor in tensors)

    def _load(self, stored: dict[str, list[StoredTensor]]) -> dict[str, str]:
        """Convert the tensors of some parameters; return the failures by parameter name."""
        with ExitStack() as opened:
            files = {
                file: opened.enter_context(safe_open(file, framework="pt"))
                for file in {tensor.file for tensors in stored.values() for tensor in tensors}
            }
            slices: dict[str, Any] = {}
            for name, tensors in stored.items():
                slices |= {tensor.key: files[tensor.file].get_slice(tensor.key) for tensor in tensors}
                _take_dtype(self.model, name, tensors[0].dtype)
            mapping = conversion(self.model, self._quantizer)
            config = LoadStateDictConfig(weight_mapping=mapping, hf_quantizer=self._quantizer)
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, config)
        return {name: short_message(error) for name, error in info.conversion_errors.items()}


def _parameters(model: nn.Module, moe: MoELayer) -> list[str]:
    """Return the names of the parameters of a layer's experts and router."""
    modules = (moe.experts, moe.router) if moe.router is not None else (moe.experts,)
    of_layer = {id(parameter) for module in modules for parameter in module.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in of_layer]


def _take_dtype(model: nn.Module, name: str, stored: str) -> None:
    """Give an empty parameter the stored dtype, so that nothing is rounded; 8-bit floats become 32-bit."""
    dtype = torch.float32 if stored.startswith("F8") else DTYPES.get(stored)
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if dtype is not None and dtype.is_floating_point and (parameter := module._parameters.get(last)) is not None:
        module._parameters[last] = nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False)


def _quantizer(title: str, config: Any) -> tuple[Any, Any]:
    """Return the quantizer that dequantises the weights, and the resulting configuration; None if not quantised.

    Raises MoewhError for a quantisation that cannot be undone here.
    """
    method = quantization_method(config)
    if method is None:
        return None, config
    if method not in DEQUANTIZED:
        raise MoewhError(
            f"{title}: its weights are quantised ({method}). `moewh geometry` reads unquantised weights and "
            f"{' and '.join(DEQUANTIZED)}. Give the model that it was made from."
        )
    if (undone := dequantizer(config)) is None:
        raise MoewhError(f"{title}: weights in {method} need accelerate. Install it: pip install 'moewh[accelerate]'.")
    return undone


def _bits(dtype: str) -> int:
    """Return the bits per number of a safetensors dtype, such as 16 for BF16."""
    digits = "".join(char for char in dtype.partition("_")[0] if char.isdigit())
    return int(digits) if digits else 8
