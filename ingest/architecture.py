"""From a configuration to the model class that holds its layers, loaded or empty; and what is refused on sight."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
)
from transformers.utils.quantization_config import Mxfp4Config

from warehouse.errors import MoewhError

OLDEST_TRANSFORMERS = (5, 19)
_AUTO_CLASSES: tuple[Any, ...] = (
    # With images first: for such a configuration, the causal class would be the text stack alone.
    AutoModelForImageTextToText,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoModel,
)


def check_versions() -> None:
    """Raise MoewhError if transformers is too old."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise MoewhError(
            f"transformers {transformers.__version__} is too old: experts cannot be observed as they run. "
            f"Install transformers {oldest} or newer."
        )


def read_config(location: str, **arguments: Any) -> Any:
    """Read a model's configuration; of a model of several stages (Qwen-Omni), that of the stage which reads text.

    Raises what transformers raises.
    """
    config = AutoConfig.from_pretrained(location, **arguments)
    return getattr(config, "thinker_config", None) or config


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the class to load a model with: the one its checkpoint names, else the first that takes the configuration.

    Raises MoewhError if there is none.
    """
    if trust_remote_code and getattr(config, "auto_map", None):
        named = (auto for auto in _AUTO_CLASSES if auto.__name__ in config.auto_map)
        return next(named, AutoModelForCausalLM)
    for name in config.architectures or ():
        if (known := getattr(transformers, name, None)) is not None:
            return known
    for auto in _AUTO_CLASSES:
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise MoewhError(
        f"transformers {transformers.__version__} has no language model for model type {config.model_type}. "
        "Install a newer transformers, or use another model."
    )


def loading_arguments(config: Any) -> dict[str, Any]:
    """Return what from_pretrained needs so that every expert's call can be observed.

    Native MXFP4 kernels call neither routers nor experts, so such weights are turned into bfloat16 on loading.
    """
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build the model on the meta device: every shape, and not one number."""
    kind = model_class(config, trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = (
            kind.from_config(config, trust_remote_code=True) if kind in _AUTO_CLASSES else kind._from_config(config)
        )
    return model


def check_parallel(model: nn.Module) -> None:
    """Raise MoewhError if the model's tensors are spread over processes: indices would be local ones."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise MoewhError(
                f"{name} is spread over several processes (tensor or expert parallel), where expert indices are "
                "local. Load the model whole: one process a model, or --device auto."
            )
